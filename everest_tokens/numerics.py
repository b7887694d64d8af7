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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as original
from transformers.utils import cached_file

from everest_tokens.positions import mvd_table

logger = logging.getLogger(__name__)

TENSORS_FILE = "everest.safetensors"
POSITIONS = ("sinusoid", "mvd", "stored")  # VideoMAE's formula, MVD's, or a table of the file's own
NORM_EPS = 1e-6  # of every layer norm of every family
_TRANSFORMERS_EPS = 1e-5  # of fc_norm and decoder.norm, whatever config.layer_norm_eps says
_RECORDED = {  # in config.everest: what is expected there, and whether a value is
    "norm_eps": ("a number in (0, 1)", lambda eps: isinstance(eps, (int, float)) and 0 < eps < 1),
    "position": (f"one of {', '.join(POSITIONS)}", lambda position: position in POSITIONS),
    "class_token": ("true or false", lambda token: token in (None, True, False)),
}


def numbers_in(recorded: dict[str, Any]) -> dict[str, Any]:
    """Pick the part of `config.everest` that concerns this file. Raises ValueError for values that can't be."""
    numbers = {name: recorded[name] for name in _RECORDED if name in recorded}
    for name, value in numbers.items():
        expected, is_possible = _RECORDED[name]
        if not is_possible(value):
            raise ValueError(f"config.everest records {name} {value!r}: expected {expected}")
    return numbers


def numbers_of(model: original.VideoMAEPreTrainedModel) -> dict[str, Any]:
    """Say what `config.everest` should record of a live model."""
    numbers = {"position": "sinusoid", **getattr(model, "_everest_numbers", {})}
    norm = own_norm(model)
    return numbers if norm is None else {**numbers, "norm_eps": norm.eps}


def is_equipped(model: original.VideoMAEPreTrainedModel) -> bool:
    return hasattr(model, "_everest_numbers")


def equip(
    model: original.VideoMAEPreTrainedModel, numbers: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    """Make a plain transformers model compute a checkpoint's numbers, for good: they are part of what it is.

    Args:
        numbers: as `config.everest` records them.
        tensors: "position_embeddings" (N, D) and "class_token" (1, 1, D) where `numbers` ask for them; default: read
            from the folder that the model came from.

    Raises:
        ValueError: a tensor that is needed is missing or doesn't fit.
    """
    config, embeddings, norm = model.config, model.base_model.embeddings, own_norm(model)
    patches, channels = embeddings.patch_embeddings, config.hidden_size
    position, class_token = numbers.get("position", "sinusoid"), bool(numbers.get("class_token"))
    if tensors is None:
        tensors = _tensors_beside(model) if position == "stored" or class_token else {}
    table = token = None
    if position == "mvd":
        (height, width), (rows, columns) = patches.image_size, patches.patch_size
        table = mvd_table((config.num_frames // patches.tubelet_size, height // rows, width // columns), channels)
    elif position == "stored":
        table = _fitting(tensors, "position_embeddings", (patches.num_patches, channels))
    if class_token:
        token = _fitting(tensors, "class_token", (1, 1, channels))

    if norm is not None:  # nothing fails from here on
        norm.eps = numbers.get("norm_eps", norm.eps)
    if table is not None:
        embeddings.position_embeddings = table[None]
    if token is not None:
        weight = patches.projection.weight
        embeddings.cls_token = nn.Parameter(token.to(weight.device, weight.dtype, copy=True), weight.requires_grad)
        embeddings.register_forward_hook(_prepend_class_token)
        if config.use_mean_pooling:
            model.base_model.register_forward_hook(_drop_class_token)
    model._everest_numbers = dict(numbers)
    if lacking(model):
        model.save_pretrained = partial(_save_pretrained, model)


def lacking(model: original.VideoMAEPreTrainedModel) -> list[str]:
    """Say what plain transformers would compute differently from a folder saved of this model."""
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
    """Find the layer norm that transformers builds with its own eps."""
    pretraining = isinstance(model, original.VideoMAEForPreTraining)
    return model.decoder.norm if pretraining else getattr(model, "fc_norm", None)


def _prepend_class_token(module: Any, args: Any, tokens: Tensor) -> Tensor:
    """Put the token before the others as in MVD: after the positions, without one of its own."""
    return torch.cat([module.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)


def _drop_class_token(module: nn.Module, args: Any, output: Any) -> Any:
    """Leave the mean to the other tokens, as MVD's pooling does."""
    if isinstance(output, tuple):
        return (output[0][:, 1:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, 1:]
    return output


def _save_pretrained(
    model: original.VideoMAEPreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save as transformers does, beside it the tensors that it has no place for, and say so in one line."""
    tensors = {}
    if model._everest_numbers.get("position") == "stored":
        tensors["position_embeddings"] = model.base_model.embeddings.position_embeddings[0].cpu().contiguous()
    if model._everest_numbers.get("class_token"):
        state_dict = dict(state_dict or model.state_dict())  # a sharded model's is gathered by the caller
        key = "embeddings.cls_token" if model is model.base_model else "videomae.embeddings.cls_token"
        tensors["class_token"] = state_dict.pop(key).detach().cpu().contiguous()
    if tensors and is_main_process:  # before the weights, which may be pushed to a hub at once
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(save_directory, TENSORS_FILE))
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
    if is_main_process:
        logger.warning(
            "plain transformers on %s would run %s; everest_tokens.patch_videomae on the loaded model restores the"
            " numbers",
            save_directory,
            ", ".join(lacking(model)),
        )


def _tensors_beside(model: original.VideoMAEPreTrainedModel) -> dict[str, Tensor]:
    commit = getattr(model.config, "_commit_hash", None)  # of a hub's
    try:
        return load_file(cached_file(model.config.name_or_path, TENSORS_FILE, _commit_hash=commit, revision=commit))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"config.everest says that this model needs {TENSORS_FILE}: load it from the folder that save_pretrained or"
            f" `everest-tokens convert` wrote ({error})"
        ) from error


def _fitting(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        got = "none" if tensor is None else str(tuple(tensor.shape))
        raise ValueError(f"expected {name} {shape} beside the model's weights, got {got}")
    return tensor.float()
