"""Reading checkpoint files of the VideoMAE family without running anything in them: their tensors, told apart."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_CONTAINERS = ("model", "module", "model_state", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and hub classes
_PREFIXES = ("encoder_q.encoder.model.", "encoder.model.", "encoder.", "backbone.", "")
# Parts that predict other things than pixels, by the beginning of their keys.
OTHER_TARGETS = {
    "MME's decoders": (r"decoder\.\d+\.", r"encoder_to_decoder\.\d+\.", r"mask_token$"),
    "MVD's decoders": (r"(decoder|down|mask_token|pos_embed)_(img|vid)(\.|$)",),
    "the momentum branch": (r"encoder_k\.", r"encoder_q\.", r"queue"),
}
PIXEL_DECODER = r"decoder\.|encoder_to_decoder\.|mask_token$"
BESIDE = (PIXEL_DECODER, *(key for keys in OTHER_TARGETS.values() for key in keys))


@dataclass
class Weights:
    """The tensors of a file, by their names in the repositories' fine-tuning model."""

    encoder: dict[str, Tensor]
    others: dict[str, Tensor]  # decoders and the like, by their whole names
    arguments: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """The file's tensors and arguments. Raises FileNotFoundError, and ValueError for anything but a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no readable safetensors file: {_one_line(error)}") from error
    else:
        content = _unpickled(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict around one")
    state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), content)
    arguments = content.get("args") if state is not content else None
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    weights = _sorted_out(path, state)
    weights.arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    return weights


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is no checkpoint that can be read without running what is in it") from error
        raise ValueError(
            f"{path} wants to run {wanted[1]} while it is loaded, which was refused. If you trust where the file comes"
            " from, load it there, in the repository that wrote it, and save its tensors alone:"
            " torch.save({'model': checkpoint['model']}, 'weights.pth')"
        ) from error
    except Exception as error:  # damaged bytes fail in as many ways as there are readers; none gives a model
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sorted_out(path: Path, state: Mapping[Any, Any]) -> Weights:
    """Strip wrappers and prefixes, and tell the encoder from what lies beside it."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(value, Tensor):
            raise ValueError(f"{path}: expected tensors by name, got {key!r}: {type(value).__name__}")
        name = key
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(f"{path}: expected floating-point weights, got {value.dtype}, {value.layout} for {key}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} claims a shape {tuple(value.shape)} that its data doesn't fill")
        if name in tensors:
            raise ValueError(f"{path} has {name} twice, under different prefixes")
        tensors[name] = value
    embedding = "patch_embed.proj.weight"
    prefix = next((prefix for prefix in _PREFIXES if prefix + embedding in tensors), None)
    if prefix is None:
        some = ", ".join(map(repr, list(tensors)[:5])) or "nothing"
        raise ValueError(f"{path} is no checkpoint of the VideoMAE family: no {embedding} in it, but {some}")
    weights = Weights({}, {})
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not (prefix == "" and matches(BESIDE, name)):
            weights.encoder[name.removeprefix(prefix)] = tensor
        elif name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"):
            if f"{prefix}{name}" in tensors:
                raise ValueError(f"{path} has both {name} and {prefix}{name}")
            weights.encoder[name] = tensor
        else:
            weights.others[name] = tensor
    for part in ("weight", "bias"):  # MME calls its classifier so in some files
        if f"fc.{part}" in weights.encoder and f"head.{part}" not in weights.encoder:
            weights.encoder[f"head.{part}"] = weights.encoder.pop(f"fc.{part}")
    return weights


def matches(patterns: tuple[str, ...], key: str) -> bool:
    """Whether a key begins as one of the patterns."""
    return any(re.match(pattern, key) for pattern in patterns)
