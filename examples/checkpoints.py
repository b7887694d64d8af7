"""The checkpoints of a run: written whole or not at all, never of what isn't finite, no more of them than allowed."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import transformers
from guards import Diverged, MachineFailed, RunEnded
from safetensors import SafetensorError
from torch import Tensor

logger = logging.getLogger(__name__)

# A file that is written last; a checkpoint without it was being written when the run was killed. It has a number that
# grows from one to the next in a run's folder: after a run went on from an older one, later steps are there of before.
_COMPLETE = "complete"

_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder that were written to their end, in the order in which they were written."""
    return sorted((path for path in _checkpoints(folder) if (path / _COMPLETE).is_file()), key=_number)


def _number(checkpoint: Path) -> int:
    return int((checkpoint / _COMPLETE).read_text() or 0)


def _checkpoints(folder: str | Path) -> list[Path]:
    """Folders that a run writes, in the order of their steps: checkpoint-best, say, is somebody's copy."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _is_checkpoint(path) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-[0-9]+", path.name) is not None


def checkpoint_to_resume(folder: str | Path) -> str | None:
    """The last complete checkpoint of a run, or None for a new one. Half-written ones are removed."""
    finished = complete_checkpoints(folder)
    for path in _checkpoints(folder):
        if path not in finished:
            logger.warning("%s was being written when the run was killed: removed", path)
            shutil.rmtree(path)
    return str(finished[-1]) if finished else None


def mark_complete(checkpoint: Path) -> None:
    """Say that all of a checkpoint has been written, after all others."""
    part = checkpoint / f"{_COMPLETE}.part"
    part.write_text(str(1 + max(map(_number, complete_checkpoints(checkpoint.parent)), default=0)))
    os.replace(part, checkpoint / _COMPLETE)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill leaves nothing that only looks complete."""
    (checkpoint / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def drop_oldest(written: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` complete checkpoints of a run, all for 0 or None; always the one just written, and the best.

    That one needn't be of the last step: where a run has gone on from an older one, later ones are there of before.
    """
    finished = complete_checkpoints(written.parent)
    if not limit or limit < 0:
        return
    kept = {written.name} | ({Path(best).name} if best else set())
    others = [path for path in finished if path.name not in kept]
    too_many = len(finished) - max(limit, len(finished) - len(others))
    for path in others[: max(0, too_many)]:
        remove(path)


@contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """Around whatever writes into a checkpoint or a run's folder: leaves no half of a model behind where that fails.

    Raises:
        MachineFailed: the disk is full, or fails. Other errors, of an upload say, pass: what is written is left.
    """
    is_checkpoint = _is_checkpoint(folder)
    if is_checkpoint:
        (folder / _COMPLETE).unlink(missing_ok=True)
    try:
        yield
    except RunEnded:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # of files, of torch.save, of safetensors
        reason = " ".join(str(error).split())
        if not _of_disk(error):
            raise
        if is_checkpoint:
            remove(folder)
        else:
            (folder / "model.safetensors").unlink(missing_ok=True)
        left = complete_checkpoints(folder.parent if is_checkpoint else folder)
        raise MachineFailed(
            f"{folder} could not be written ({reason}): is the disk full?"
            + (f" {left[-1]} is whole: with more room the same command goes on from it" if left else "")
        ) from error


def _of_disk(error: Exception) -> bool:
    if isinstance(error, OSError):  # of the network too: HfHubHTTPError is one
        return error.errno in _OF_DISK
    if isinstance(error, SafetensorError):
        return True
    # By place: for one and the same full disk torch.save says "unexpected pos", "iostream error" or "failed writing".
    places = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    return torch.serialization.__file__ in places


def check_finite(model: Iterable[tuple[str, Tensor]], optimizer: Any, agree: Any) -> None:
    """Raise Diverged where a weight, or what the optimiser knows of one, is NaN or infinite in any process.

    Args:
        model: (name, tensor) pairs.
        optimizer: a torch optimiser, or None before there is one.
        agree: float tensor (1,) → its sum over all processes.
    """
    states = [] if optimizer is None else [state for state in optimizer.state.values() if isinstance(state, dict)]
    inner = (("the optimiser's " + key, value) for state in states for key, value in state.items())
    first, device = "", torch.device("cpu")
    for name, value in [*model, *inner]:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = getattr(value, "_local_tensor", value)  # FSDP2's DTensors: this process's part
            device = value.device if value.ndim else device
            if not first and not bool(value.detach().isfinite().all()):
                first = name
    if bool(agree(torch.tensor([float(bool(first))], device=device)).any()):
        raise Diverged(f"{first or 'a weight'} is not finite: no checkpoint is written of it")


@contextmanager
def unreported() -> Iterator[None]:
    """Keep transformers from reporting weights that are new, left out or renamed on purpose; what is wrong raises."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
