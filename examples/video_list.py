"""The list of videos that training and testing read: one video a line, with its label and its part where it has them.

videos/juggling/a.avi 12            path label
videos/juggling/a.avi               path
ego4d/7a3f.mp4 1 120.5 128.5        path label start end, in seconds: a part of a long video
"my videos/b.mp4" 3                 a path with spaces in quotes, a quote in it doubled,
my videos/b.mp4,3                   or with commas between the fields, as in VideoMAE's csv files
"""

from __future__ import annotations

import codecs
import math
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One line: a video file, its label, and where in it the part begins and ends, in seconds."""

    path: Path
    label: int | None = None
    start: float | None = None
    end: float | None = None

    def local(self) -> AbstractContextManager[Path]:
        """The file to read, for as long as it is read (videos of data sets have none before, see in_memory.py)."""
        return nullcontext(self.path)


def read_list(
    list_file: str | os.PathLike[str],
    data_root: str | os.PathLike[str] | None = None,
    *,
    labelled: bool,
    num_labels: int | None = None,
) -> list[Entry]:
    """Read a list of videos. Blank lines and lines that begin with # are skipped; no video is opened.

    Args:
        list_file: the list, a UTF-8 text file in the format above; its lines need not all have the same fields.
        data_root: the folder that relative paths start from; by default the list's own.
        labelled: every line must have a label. If False, labels are dropped: a labelled list will do for pre-training.
        num_labels: labels must lie below it.

    Raises:
        ValueError: the list or data_root doesn't exist, the list is empty, or, with file and line: a byte that isn't
            UTF-8, wrong number of fields, no label though `labelled`, a label that is not an integer or outside
            0 … num_labels - 1, a start or end that is not a finite number of seconds, or start >= end.
    """
    list_file = Path(list_file)
    if not list_file.is_file():
        raise ValueError(f"{list_file}: no such file, expected a list with one video a line")
    root = list_file.parent if data_root is None else Path(data_root)
    if not root.is_dir():
        raise ValueError(f"data_root must be a folder, got {str(root)!r}")
    entries = []
    content = list_file.read_bytes().removeprefix(codecs.BOM_UTF8)  # spreadsheets begin their csv files with it
    for number, raw in enumerate(content.splitlines(), start=1):  # bytes: a name may hold what text breaks lines at
        try:
            line = raw.decode().strip()
            if line and not line.startswith("#"):
                entries.append(_entry(_fields(line), root, labelled, num_labels))
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1} is {raw[error.start]:#04x}, which isn't UTF-8"
            hint = "save the list as UTF-8, e.g. with iconv -f LATIN1 (or UTF-16) -t UTF-8"
            raise ValueError(f"{list_file}:{number}: {place}: {hint}; got {raw!r}") from None
        except ValueError as error:
            raise ValueError(f"{list_file}:{number}: {error}, got {line!r}") from None
    if not entries:
        raise ValueError(f"{list_file}: the list is empty, expected one video a line")
    return entries


def _fields(line: str) -> list[str]:
    # Neither shlex, to which apostrophes and backslashes in file names mean something, nor csv, which knows no spaces.
    quoted = re.match(r'"((?:[^"]|"")*)"(?=[\s,]|$)', line)
    if quoted:
        path, rest = quoted[1].replace('""', '"'), line[quoted.end() :]
    else:
        path = re.match("[^,]*" if "," in line else r"\S*", line)[0]
        path, rest = path.strip(), line[len(path) :]
    others = rest.strip().removeprefix(",").split(",") if "," in rest else rest.split()
    return [path, *(field.strip().strip('"') for field in others)]


def _entry(fields: list[str], root: Path, labelled: bool, num_labels: int | None) -> Entry:
    counts = (2, 4) if labelled else (1, 2, 3, 4)
    if len(fields) not in counts or not fields[0]:
        expected = "`path label` or `path label start end`" if labelled else "`path [label] [start end]`"
        hint = "; a path with spaces needs quotes, or commas between the fields" if len(fields) > 2 else ""
        raise ValueError(f"expected {expected}{hint}")
    label = None
    if len(fields) in (2, 4):
        if not re.fullmatch("[+-]?[0-9]+", fields[1]):
            raise ValueError(f"expected an integer as the label, not {fields[1]!r}")
        label = int(fields[1])
        if labelled and (label < 0 or (num_labels is not None and label >= num_labels)):
            upper = "" if num_labels is None else f" and at most {num_labels - 1} ({num_labels} labels)"
            raise ValueError(f"expected a label of at least 0{upper}, not {label}")
    start, end = map(_seconds, fields[-2:]) if len(fields) > 2 else (None, None)
    if start is not None and end is not None and not 0 <= start < end:
        raise ValueError(f"expected 0 <= start < end in seconds, not {start:g} and {end:g}")
    return Entry(root / fields[0], label if labelled else None, start, end)


def _seconds(field: str) -> float:
    try:
        seconds = float(field)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"expected start and end in seconds, not {field!r}")
    return seconds
