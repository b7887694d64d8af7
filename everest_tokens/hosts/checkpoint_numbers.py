"""What the numbers of a family checkpoint need and transformers' VideoMAE has no place for.

The eps of the layer norm that transformers builds with its own, a position table other than VideoMAE's sinusoid, and
MVD's class token. `config.everest` records which of them a model has; tensors travel in a file beside the weights.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as original
from transformers.utils import cached_file

from everest_tokens.positions import mvd_table
from everest_tokens.selectors import Grid

logger = logging.getLogger(__name__)

TENSORS_FILE = "everest.safetensors"
POSITIONS = ("sinusoid", "mvd", "stored")  # VideoMAE's formula, MVD's, or a table of the file's own
_NAMES = ("norm_eps", "position", "class_token")
_TRANSFORMERS_EPS = 1e-5  # of fc_norm and decoder.norm, whatever config.layer_norm_eps says


def numbers_in(recorded: dict[str, Any]) -> dict[str, Any]:
    """The part of `config.everest` that concerns this file. Raises ValueError for values that can't be."""
    numbers = {name: recorded[name] for name in _NAMES if name in recorded}
    eps, position, token = numbers.get("norm_eps", 1.0), numbers.get("position", "sinusoid"), numbers.get("class_token")
    if not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"config.everest records norm_eps {eps!r}: expected a positive number")
    if position not in POSITIONS:
        raise ValueError(f"config.everest records position {position!r}: expected one of {', '.join(POSITIONS)}")
    if token not in (None, True, False):
        raise ValueError(f"config.everest records class_token {token!r}: expected true or false")
    return numbers


def numbers_of(model: original.VideoMAEPreTrainedModel) -> dict[str, Any]:
    """What `config.everest` should record of a live model."""
    numbers = {"position": "sinusoid", **getattr(model, "_everest_numbers", {})}
    norm = own_norm(model)
    return numbers if norm is None else {**numbers, "norm_eps": norm.eps}


def is_equipped(model: original.VideoMAEPreTrainedModel) -> bool:
    return hasattr(model, "_everest_numbers")


def equip(
    model: original.VideoMAEPreTrainedModel, numbers: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    """Make a plain transformers model compute a checkpoint's numbers.

    Args:
        numbers: as `config.everest` records them.
        tensors: "position_embeddings" (N, D) and "class_token" (1, 1, D) where `numbers` ask for them; default: read
            from the folder that the model came from.

    Raises:
        ValueError: a tensor that is needed is missing or doesn't fit.
    """
    embeddings = _backbone(model).embeddings
    patches = embeddings.patch_embeddings
    frames, (height, width), (rows, columns) = model.config.num_frames, patches.image_size, patches.patch_size
    grid: Grid = (frames // patches.tubelet_size, height // rows, width // columns)
    channels = model.config.hidden_size
    position, class_token = numbers.get("position", "sinusoid"), bool(numbers.get("class_token"))
    if tensors is None:
        tensors = _tensors_beside(model) if position == "stored" or class_token else {}

    norm = own_norm(model)
    before = {"table": embeddings.position_embeddings, "norm_eps": None if norm is None else norm.eps}
    table = token = None
    if position == "mvd":
        table = mvd_table(grid, channels)[None]
    elif position == "stored":
        table = _fitting(tensors, "position_embeddings", (patches.num_patches, channels))[None]
    if class_token:
        token = _fitting(tensors, "class_token", (1, 1, channels))

    if norm is not None and "norm_eps" in numbers:
        norm.eps = float(numbers["norm_eps"])
    if table is not None:
        embeddings.position_embeddings = table
    if token is not None:
        weight = patches.projection.weight
        embeddings.cls_token = nn.Parameter(token.to(weight.device, weight.dtype, copy=True))
        before["hooks"] = [embeddings.register_forward_hook(_prepend_class_token)]
        if model.config.use_mean_pooling:
            before["hooks"].append(_backbone(model).register_forward_hook(_drop_class_token))
    model._everest_numbers, model._everest_before = dict(numbers), before
    if lacking(model):
        model.save_pretrained = partial(_save_pretrained, model)


def unequip(model: original.VideoMAEPreTrainedModel) -> None:
    """Undo `equip`."""
    before, norm = model._everest_before, own_norm(model)
    embeddings = _backbone(model).embeddings
    embeddings.position_embeddings = before["table"]
    if norm is not None:
        norm.eps = before["norm_eps"]
    for hook in before.get("hooks", ()):
        hook.remove()
    if hasattr(embeddings, "cls_token"):
        del embeddings.cls_token
    model.__dict__.pop("save_pretrained", None)
    del model._everest_numbers, model._everest_before


def lacking(model: original.VideoMAEPreTrainedModel) -> list[str]:
    """What plain transformers would compute differently from a folder saved of this model."""
    numbers, lacks = numbers_of(model), []
    if numbers["position"] != "sinusoid":
        whose = "MVD's position table" if numbers["position"] == "mvd" else "the checkpoint's own position table"
        lacks.append(f"VideoMAE's sinusoid instead of {whose}")
    if numbers.get("class_token"):
        lacks.append("no class token")
    norm = own_norm(model)
    if norm is not None and norm.eps != _TRANSFORMERS_EPS:
        name = "decoder.norm" if isinstance(model, original.VideoMAEForPreTraining) else "fc_norm"
        lacks.append(f"{name} with eps {_TRANSFORMERS_EPS} instead of {norm.eps}")
    return lacks


def own_norm(model: original.VideoMAEPreTrainedModel) -> nn.LayerNorm | None:
    """The layer norm that transformers builds with its own eps."""
    pretraining = isinstance(model, original.VideoMAEForPreTraining)
    return model.decoder.norm if pretraining else getattr(model, "fc_norm", None)


def _backbone(model: original.VideoMAEPreTrainedModel) -> original.VideoMAEModel:
    return model if isinstance(model, original.VideoMAEModel) else model.videomae


def _prepend_class_token(module: Any, args: Any, tokens: Tensor) -> Tensor:
    """As in MVD: after the positions, without one of its own."""
    return torch.cat([module.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)


def _drop_class_token(module: nn.Module, args: Any, output: Any) -> Any:
    """As in MVD: mean pooling goes over the other tokens."""
    if isinstance(output, tuple):
        return (output[0][:, 1:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, 1:]
    return output


def _save_pretrained(model: original.VideoMAEPreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, the tensors that it has no place for, and a line that says so."""
    tensors = {}
    if model._everest_numbers.get("position") == "stored":
        tensors["position_embeddings"] = _backbone(model).embeddings.position_embeddings[0].cpu().contiguous()
    if model._everest_numbers.get("class_token"):
        state = dict(kwargs.get("state_dict") or model.state_dict())  # a sharded model's is gathered by the caller
        key = "embeddings.cls_token" if model is _backbone(model) else "videomae.embeddings.cls_token"
        tensors["class_token"] = state.pop(key).detach().cpu().contiguous()
        kwargs["state_dict"] = state
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    if tensors:
        save_file(tensors, Path(save_directory, TENSORS_FILE))
    logger.warning(
        "plain transformers on %s would run %s; everest_tokens.patch_videomae on the loaded model restores the numbers",
        save_directory,
        ", ".join(lacking(model)),
    )


def _tensors_beside(model: original.VideoMAEPreTrainedModel) -> dict[str, Tensor]:
    source = model.config.name_or_path
    path = cached_file(source, TENSORS_FILE, _raise_exceptions_for_missing_entries=False) if source else None
    if path is None:
        raise ValueError(
            f"config.everest says that this model needs {TENSORS_FILE}, which isn't in {source or 'any folder'!r}: "
            "load the model from the folder that save_pretrained or `everest-tokens convert` wrote"
        )
    return load_file(path)


def _fitting(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        got = "none" if tensor is None else str(tuple(tensor.shape))
        raise ValueError(f"expected {name} {shape} beside the model's weights, got {got}")
    return tensor.float()
