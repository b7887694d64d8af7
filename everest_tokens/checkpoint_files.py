"""Read checkpoint files that nobody vouches for: nothing in them is run, nothing grows larger than the file.

`torch.load(weights_only=True)` runs no code, but it calls what allocates as much as a pickle says, `bytearray(10**12)`,
unpacks compressed records and hashes nested tuples for longer than anyone waits: a pickle's opcodes are read before.
"""

from __future__ import annotations

import argparse
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]  # by name

_CONTAINERS = ("model", "module", "model_state", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and hub classes
_PREFIXES = ("encoder_q.encoder.model.", "encoder.model.", "encoder.", "backbone.", "")
KERNEL = "patch_embed.proj.weight"
_HEAD = ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")  # may lie outside the encoder
OTHER_TARGETS = {  # parts that predict other things than pixels, by the beginning of their keys
    "MME's decoders": r"decoder\.\d+\.|encoder_to_decoder\.\d+\.",
    "MVD's decoders": r"(decoder|down|mask_token|pos_embed)_(img|vid)(\.|$)",
    "the momentum branch": r"encoder_k\.|encoder_q\.|queue",
}
BESIDE = "|".join((*OTHER_TARGETS.values(), r"decoder\.|encoder_to_decoder\.|mask_token$"))  # the encoder
LAYER_SCALE = {"attn.proj": "gamma_1", "mlp.fc2": "gamma_2"}
# What plain tensors, optimizers' states and argparse's arguments need; nothing allocates by a number in the pickle.
_ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|argparse Namespace"
    r"|torch (Size|device|[a-z]+\d+(_\w+)?|bool|\w+Storage)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
)
_MOST_OBJECTS = 10**7  # counted as often as they are met; ViT-g with its optimizer has less than a tenth
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


def read_weights(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read (tensors, the training script's arguments) of a `.safetensors` or `torch.save` file.

    The tensors come by their names in the repositories' models without wrappers: the encoder's bare, decoders' whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, a pickle that wants more than tensors, or tensors without plain numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    content: Any = None
    reason = ""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif not (reason := _refusal(path)):
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in as many ways as there are readers; none gives a model
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {text})") from error
    if reason:
        raise ValueError(
            f"{path} was refused: {reason}. If you trust where the file comes from, load it there, in the repository "
            "that wrote it, and save its tensors alone: torch.save({'model': checkpoint['model']}, 'weights.pth')"
        )
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict around one")
    state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
    arguments = content.get("args") if state is not content else None
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    left = 2 * path.stat().st_size  # bytes; tensors may share their data, but not without end
    for key, value in state.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(value, Tensor):
            shown = repr(key[:80]) if isinstance(key, str) else f"a {type(key).__name__}"
            raise ValueError(f"{path}: expected tensors by name, got {shown}: {type(value).__name__}")
        if value.is_nested or value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(f"{path}: expected floating-point weights, got {value.dtype}, {value.layout} for {key}")
        claimed = math.prod(value.shape) * value.element_size()
        left -= claimed
        if claimed > value.untyped_storage().nbytes() or left < 0:
            raise ValueError(f"{path}: {key} claims a shape {tuple(value.shape)} that the file's data doesn't fill")
        if not claimed:
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, expected no size of zero")
    return _sorted_out(path, state), arguments if isinstance(arguments, dict) else {}


def _sorted_out(path: Path, state: Tensors) -> Tensors:
    tensors: Tensors = {}
    for key, tensor in state.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in tensors:
            raise ValueError(f"{path} has {name} twice, under different prefixes")
        tensors[name] = tensor
    prefix = next((prefix for prefix in _PREFIXES if prefix + KERNEL in tensors), None)
    if prefix is None:
        some = ", ".join(map(repr, list(tensors)[:5])) or "nothing"
        raise ValueError(f"{path} is no checkpoint of the VideoMAE family: no {KERNEL} in it, but {some}")
    weights: Tensors = {}
    for whole, tensor in tensors.items():
        name = whole.removeprefix(prefix)
        if prefix and name != whole and re.match(BESIDE, name):
            name = whole  # a decoder within the encoder
        elif not (whole.startswith(prefix) or re.match(BESIDE, whole) or whole in _HEAD):
            name = f"{whole} outside {prefix}"  # neither is known to any model
        if re.match(r"fc\.(weight|bias)$", name):  # MME calls its classifier so in some files
            name = name.replace("fc", "head")
        if name in weights:
            raise ValueError(f"{path} has {name} twice, inside and outside {prefix}")
        weights[name] = tensor
    return weights


def family_of(weights: Tensors, arguments: dict[str, Any], family: str | None) -> tuple[str, list[str]]:
    """Find the family, and say what was assumed about it."""
    by_keys = None
    if any(re.match(OTHER_TARGETS["MVD's decoders"], key) for key in weights) or "cls_token" in weights:
        by_keys = "mvd"
    elif any(re.match(OTHER_TARGETS["MME's decoders"], key) for key in weights):
        by_keys = "mme"
    if by_keys is not None and family not in (None, by_keys):
        raise ValueError(f"family={family!r} was given, but the file's keys are those of {by_keys}")
    if family is not None or by_keys is not None:
        return family or by_keys or "", []
    name = arguments.get("model")
    name = name if isinstance(name, str) else ""
    hints = {
        "mvd": "masked_video_student" in name or "remove_pos_emb" in arguments,
        "everest": "videoms" in name or "motion_centric_masking" in arguments,
        "mme": "linear_probing" in arguments,
    }
    if hinted := next((hint for hint, given in hints.items() if given), None):
        return hinted, [f"family {hinted!r} by the file's args"]
    line = "family 'videomae' and its sinusoid positions assumed: keys and args don't tell (family='mvd' for MVD's)"
    return "videomae", [] if "pos_embed" in weights else [line]


def finite(name: str, tensor: Tensor) -> Tensor:
    """Copy a tensor in float32. Raises ValueError for numbers that aren't finite."""
    copied = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not torch.stack(copied.aminmax()).isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite numbers, expected finite ones in float32")
    return copied


def transformers_parts(weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Take the weights out, in the file's order: (name, float32), qkv in thirds, layer scale folded in."""
    scales = [name for name in weights if re.match(r"(decoder\.)?blocks\.\d+\.gamma_[12]$", name)]
    gammas = {name: finite(name, weights.pop(name)) for name in scales}
    for name in list(weights):
        tensor = finite(name, weights.pop(name))
        head, inside, tail = name.partition("blocks.")
        number, _, rest = tail.partition(".")
        block, (module, _, part) = f"{head}{inside}{number}.", rest.rpartition(".")
        gamma = gammas.get(f"{block}{LAYER_SCALE.get(module)}")
        if module == "attn.qkv":
            thirds = torch.atleast_1d(tensor).tensor_split(3)
            for third, which in zip(thirds, ("query", "key", "value"), strict=True):
                if part == "weight":
                    yield f"{name}[{which}]", third.clone()
                elif which != "key":  # a key's bias adds the same to all of a query's products
                    yield f"{block}attn.{which[0]}_bias", third.clone()
        elif gamma is not None and tensor.shape[:1] == gamma.shape:
            scale = gamma.double().view(-1, *[1] * (tensor.ndim - 1))
            yield name, finite(name, tensor.double() * scale)
        else:
            yield name, tensor


def _refusal(path: Path) -> str:
    """Say why a `torch.save` file is not to be loaded, or "". Raises anything for bytes that are no pickle."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if sum(record.file_size for record in records) > path.stat().st_size:
                    return "its records are compressed or overlap, expected them stored one after the other"
                pickles = [io.BytesIO(archive.read(record)) for record in records if record.filename.endswith(".pkl")]
            return next(filter(None, map(_refusal_of_pickle, pickles)), "")
        file.seek(0)
        return next(filter(None, (_refusal_of_pickle(file) for _ in range(_LEGACY_PICKLES))), "")


def _refusal_of_pickle(stream: IO[bytes]) -> str:
    """Follow a pickle's opcodes on a stack of sizes: of how many objects each object consists, the shared ones too."""
    stack: list[float | None] = []  # None marks where a tuple's or a container's items begin
    memo: dict[Any, float | None] = {}
    text = ""
    for opcode, argument, _ in pickletools.genops(stream):
        if "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            if opcode.name == "BINUNICODE":
                text = str(argument)
            elif "GLOBAL" in opcode.name and not _ADMITTED.fullmatch(str(argument)):
                name = (argument or "a global").replace("__builtin__", "builtins").replace(" ", ".")
                return f"{name} is wanted for what follows {text[:80]!r}, expected plain tensors, numbers and text"
            below, taken = list(opcode.stack_before), 0.0
            if pickletools.markobject in below:
                below = below[: below.index(pickletools.markobject)]
                while (item := stack.pop()) is not None:
                    taken += item
            taken += sum(stack.pop() or 0 for _ in below)
            # 2 % for each level: a long chain of tuples in tuples is too deep for the interpreter's own stack.
            stack += [1 + 1.02 * taken] * len(opcode.stack_after)
            if 1.02 * taken > _MOST_OBJECTS:
                return f"objects nested too often in one another near {text[:80]!r}, expected a state dict"
    return ""
