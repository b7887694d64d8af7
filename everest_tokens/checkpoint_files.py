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
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]  # by name

_CONTAINERS = ("model", "module", "model_state", "state_dict")
# What plain tensors, optimizers' states and argparse's arguments need; nothing allocates by a number in the pickle.
_ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|argparse Namespace"
    r"|torch (Size|device|[a-z]+\d+(_\w+)?|bool|\w+Storage)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
)
_MOST_OBJECTS = 10**7  # counted as often as they are met; ViT-g with its optimizer has less than a tenth
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


def read_file(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read (tensors by name, the training script's arguments) of a `.safetensors` or `torch.save` file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, a pickle that wants more than tensors, or tensors without plain numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            return _checked(load_file(path), path.stat().st_size)
        _check_pickles(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _checked(torch.load(path, map_location="cpu", weights_only=True), path.stat().st_size)
    except Exception as error:  # damaged bytes fail in as many ways as there are readers; none gives a model
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no checkpoint to load ({type(error).__name__}: {text})") from error


def _checked(content: Any, size: int) -> tuple[Tensors, dict[str, Any]]:
    """Take tensors and arguments out of the content of a file of `size` bytes. Raises ValueError for any but these."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a state dict or a dict around one")
    state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
    arguments = content.get("args") if state is not content else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    left = 2 * size  # bytes; tensors may share their data, but not without end
    for key, value in state.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(value, Tensor):
            shown = repr(key[:80]) if isinstance(key, str) else f"a {type(key).__name__}"
            raise ValueError(f"expected tensors by name, got {shown}: {type(value).__name__}")
        if value.is_nested or value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(f"expected floating-point weights, got {value.dtype}, {value.layout} for {key}")
        claimed = math.prod(value.shape) * value.element_size()
        left -= claimed
        if not 0 < claimed <= value.untyped_storage().nbytes() or left < 0:
            shape = tuple(value.shape)
            raise ValueError(
                f"{key} has shape {shape}, expected no size of zero and no more than the file's data fills"
            )
    return state, arguments if isinstance(arguments, dict) else {}


def _check_pickles(path: Path) -> None:
    """Raise ValueError for a `torch.save` file that is not to be loaded, anything for bytes that are no pickle."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its records are compressed or overlap, expected them stored one after the other")
            if archive.start_dir != _stated_directory(file):
                raise ValueError(
                    "its directory isn't where the archive says: torch would read another one than zipfile"
                )
            for record in records:
                if record.filename.lower().endswith(".pkl"):  # as torch looks for it
                    _check_pickle(io.BytesIO(archive.read(record)))


def _stated_directory(file: IO[bytes]) -> int:
    """Read where a zip archive says that its directory begins: -1 for an end that torch.save doesn't write.

    zipfile forgives a wrong statement, torch believes it.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(length - 98)
    directory64, at64, end, directory, comment = struct.unpack("<48xQ8xQ4x4s12xIH", file.read())
    if end != b"PK\x05\x06" or comment:
        return -1
    file.seek(length - 42)
    if file.read(4) != b"PK\x06\x07":
        return directory
    return directory64 if at64 == length - 98 else -1


def _check_pickle(stream: IO[bytes]) -> None:
    """Follow a pickle's opcodes on a stack of sizes: of how many objects each object consists, the shared ones too."""
    stack: list[float | None] = []  # None marks where a tuple's or a container's items begin
    memo: dict[Any, float | None] = {}
    text = ""
    for opcode, argument, _ in pickletools.genops(stream):
        if "PUT" in opcode.name:
            memo[argument] = stack[-1]
            continue
        if "GET" in opcode.name or opcode.name == "MARK":
            stack.append(memo[argument] if argument is not None else None)
            continue
        if opcode.name == "BINUNICODE":
            text = str(argument)[:80]
        elif "GLOBAL" in opcode.name and not _ADMITTED.fullmatch(str(argument)):
            name = str(argument or "a name of pickle's protocol 4").replace("__builtin__ ", "builtins.")
            name = re.sub(r"^(\S+) (\S+)$", r"\1.\2", name)
            raise ValueError(
                f"{name} is wanted for what follows {text!r}, expected plain tensors, numbers and text. If you trust "
                "where the file comes from, load it there, in the repository that wrote it, and save its tensors alone:"
                " torch.save({'model': checkpoint['model']}, 'weights.pth')"
            )
        below, taken = list(opcode.stack_before), 0.0
        if pickletools.markobject in below:
            below = below[: below.index(pickletools.markobject)]
            while (item := stack.pop()) is not None:
                taken += item
        taken += sum(stack.pop() or 0 for _ in below)
        # 2 % for each level: a long chain of tuples in tuples is too deep for the interpreter's own stack.
        stack += [1 + 1.02 * taken] * len(opcode.stack_after)
        if stack and (stack[-1] or 0) > _MOST_OBJECTS:
            raise ValueError(f"objects nested too often in one another near {text!r}, expected a state dict")
