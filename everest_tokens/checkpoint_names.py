"""How the repositories of the VideoMAE family name their tensors, and what of it transformers' VideoMAE has otherwise.

Between reading and loading, tensors go by their names in the repositories' models without wrappers: the encoder's bare,
`blocks.0.norm1.weight`, decoders' whole.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_tokens.checkpoint_files import Tensors

_WRAPPERS = r"((module|_orig_mod|model)\.)*"  # of DDP, torch.compile and hub classes
_PREFIXES = ("encoder_q.encoder.model.", "encoder.model.", "encoder.", "backbone.", "")
KERNEL = "patch_embed.proj.weight"
OTHER_TARGETS = {  # parts that predict other things than pixels, by the beginning of their keys
    "MME's decoders": r"decoder\.\d+\.|encoder_to_decoder\.\d+\.",
    "MVD's decoders": r"(decoder|down|mask_token|pos_embed)_(img|vid)(\.|$)",
    "the momentum branch": r"encoder_k\.|encoder_q\.|queue",
}
DECODER = {"the pixel decoder": r"decoder\.|encoder_to_decoder\.", "the mask token": r"mask_token$"}
_HEADS_KEYS = r"(head|fc|fc_norm)\.(weight|bias)$"
_OUTSIDE = re.compile("|".join((*OTHER_TARGETS.values(), *DECODER.values(), _HEADS_KEYS)))  # the encoder's prefix
_FAMILY_KEYS = {"mvd": OTHER_TARGETS["MVD's decoders"] + "|cls_token$", "mme": OTHER_TARGETS["MME's decoders"]}
_FAMILY_ARGUMENTS = {  # a word in the model's name and an argument, of one family's training scripts alone
    "mvd": ("masked_video_student", "remove_pos_emb"),
    "everest": ("videoms", "motion_centric_masking"),
    "mme": ("linear_probing", "linear_probing"),
}
_NAMES = (  # of transformers → of the repositories, replaced in this order; before 5.0 it has q_bias and v_bias itself
    ("videomae.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("videomae.encoder.layer.", "blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("videomae.layernorm", "norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("classifier", "head"),
    *((f"attention.attention.{part}.weight", f"attn.qkv.weight[{part}]") for part in ("query", "key", "value")),
    *((f"attention.attention.{part}.bias", f"attn.{part[0]}_bias") for part in ("query", "value")),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
LAYER_SCALE = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}


def bare_names(path: str | Path, state: Tensors) -> Tensors:
    """Take the tensors out by their names in the repositories' models: the encoder's bare, decoders' whole."""
    names = {key: re.sub(f"^{_WRAPPERS}", "", key) for key in state}
    prefix = next((prefix for prefix in _PREFIXES if prefix + KERNEL in names.values()), None)
    if prefix is None:
        some = ", ".join(map(repr, list(state)[:5])) or "nothing"
        raise ValueError(f"{path} is no checkpoint of the VideoMAE family: no {KERNEL} in it, but {some}")
    weights: Tensors = {}
    for key, name in names.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
        elif not _OUTSIDE.match(name):
            name = f"{name} outside {prefix}"  # known to no model
        name = re.sub(r"^fc\.(weight|bias)$", r"head.\1", name)  # MME calls its classifier so in some files
        if name in weights:
            raise ValueError(f"{path} has {name} twice, under different prefixes")
        weights[name] = state.pop(key)
    return weights


def family_of(weights: Tensors, arguments: dict[str, Any], family: str | None) -> tuple[str, list[str]]:
    """Find the family, and say what was assumed about it."""
    by_keys = next((f for f, keys in _FAMILY_KEYS.items() if any(re.match(keys, name) for name in weights)), None)
    if by_keys and family not in (None, by_keys):
        raise ValueError(f"family={family!r} was given, but the file's keys are those of {by_keys}")
    if by_keys or family:
        return by_keys or family or "", []
    for hinted, (word, argument) in _FAMILY_ARGUMENTS.items():
        if word in str(arguments.get("model")) or argument in arguments:
            return hinted, [f"family {hinted!r} by the file's args"]
    line = "family 'videomae' and its sinusoid positions assumed: keys and args don't tell (family='mvd' for MVD's)"
    return "videomae", [] if "pos_embed" in weights else [line]


def finite(name: str, tensor: Tensor) -> Tensor:
    """Copy a tensor in float32. Raises ValueError for numbers that aren't finite or can't become float32."""
    try:
        copied = tensor.detach().to(torch.float32, copy=True).contiguous()
    except RuntimeError as error:  # four-bit floats, two in a byte
        raise ValueError(f"{name} holds {tensor.dtype}, which torch can't convert to float32") from error
    if not torch.stack(copied.aminmax()).isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite numbers, expected finite ones in float32")
    return copied


def load(model: Any, weights: Tensors) -> None:
    """Load tensors that go by the repositories' names, taken out of their dict, into a transformers model.

    Raises:
        ValueError: a tensor too many, too few or of another shape, in the repositories' names.
    """
    _fold_layer_scale(weights)
    _split_queries_keys_values(weights)
    own = {name: _repository_name(name) for name in model.state_dict()}
    theirs = {repository: name for name, repository in own.items()}
    state = {theirs.get(name, f"the file's {name}"): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        said = textwrap.shorten(str(error).partition(":")[2], 2000)
        said = re.sub(r"(?<!file's )[\w.]+", lambda found: own.get(found[0], found[0]), said)
        raise ValueError(f"the checkpoint doesn't fit a VideoMAE: {said}") from error


def _fold_layer_scale(weights: Tensors) -> None:
    for name in [name for name in weights if re.match(r"(decoder\.)?blocks\.\d+\.gamma_[12]$", name)]:
        block, _, which = name.rpartition(".")
        gamma = weights.pop(name).double()
        for part in ("weight", "bias"):
            scaled = f"{block}.{LAYER_SCALE[which]}.{part}"
            if scaled in weights and weights[scaled].shape[:1] == gamma.shape:  # else loading will refuse it
                weights[scaled] = finite(scaled, torch.einsum("i,i...->i...", gamma, weights[scaled].double()))


def _split_queries_keys_values(weights: Tensors) -> None:
    for name in [name for name in weights if re.search(r"\.attn\.qkv\.(weight|bias)$", name)]:
        attention, _, part = name.rpartition("qkv.")
        thirds = torch.atleast_1d(weights.pop(name)).tensor_split(3)
        if part == "weight":
            names = [f"{name}[{which}]" for which in ("query", "key", "value")]
        else:  # a key's bias adds the same to all of a query's products
            names, thirds = [f"{attention}q_bias", f"{attention}v_bias"], thirds[::2]
        if any(name in weights for name in names):
            raise ValueError(f"{name} in a block that has {' and '.join(names)} too, expected one of the two")
        weights |= {which: third.clone() for which, third in zip(names, thirds, strict=True)}


def _repository_name(text: str) -> str:
    for theirs, own in _NAMES:
        text = text.replace(theirs, own)
    return text
