"""A video that comes as bytes, as a file: decoders that number frames reliably want one (see decoding.py)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
_ROOM = 64 * 2**20  # left free there: loaders hand their batches on in it


@contextmanager
def file_of(content: bytes, suffix: str) -> Iterator[Path]:
    """Hold `content` in a file whose name ends in `suffix` while the context is open: in memory where there is room.

    Raises:
        OSError: it can't be written.
    """
    handle, name = tempfile.mkstemp(suffix=suffix, prefix="everest-", dir=_folder(len(content)))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield Path(name)
    finally:
        os.unlink(name)


def _folder(size: int) -> Path | None:
    """Where to; None is the system's folder for temporary files."""
    try:
        has_room = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= size + _ROOM
    except OSError:
        return None
    return _MEMORY if has_room else None
