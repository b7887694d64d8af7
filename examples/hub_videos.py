"""Videos of Hugging Face data sets, local or on the hub, as entries: `--data owner/name`, or such a data set's folder.

A row's video is read out of the data set when its clip is cut, by number, so that everything that is done with a list
can be done with its rows. It needs `datasets`, the `data` extra; torchcodec, which it decodes with, it does not need.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from in_memory import file_of
from own_videos import SUFFIXES, Found

EXTRA = "in a clone, pip install -e '.[data]'"
# A folder with one of these at its top, or in train/, is a data set and no plain folder of videos.
_MARKS = ("dataset_dict.json", "dataset_info.json", "metadata.*", "*.parquet", "*.arrow")
_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_LABELS = ("label", "labels", "cls")  # columns, where none is a ClassLabel


@dataclass(frozen=True)
class Row:
    """One row, in the place of an `Entry` (video_list.py); `path` is its name, and no file."""

    path: Path
    label: int | None
    rows: Any
    column: str
    number: int
    start: float | None = None
    end: float | None = None

    @contextmanager
    def local(self) -> Iterator[Path]:
        with local_file(self.rows[self.number][self.column]) as path:
            yield path


@contextmanager
def local_file(video: dict[str, Any]) -> Iterator[Path]:
    """Hold what a Video column gives without decoding, {"path", "bytes"}, as a file while the context is open.

    Raises:
        OSError: the path is a remote one that can't be read.
    """
    path, content = video["path"], video["bytes"]
    if content is None and os.path.exists(path):
        yield Path(path)
        return
    if content is None:
        import fsspec

        with fsspec.open(path, "rb") as file:
            content = file.read()
    with file_of(content, Path(path or "").suffix) as local:
        yield local


def is_data_set(folder: Path) -> bool:
    """Whether a folder is a data set that `datasets` wrote or describes (save_to_disk, Parquet, metadata files)."""
    return any(next(place.glob(mark), None) for place in (folder, folder / "train") for mark in _MARKS)


def find_rows(data: str, *, labelled: bool, labels: Sequence[str] | None = None) -> Found:
    """Load a data set: a folder of `save_to_disk`, or whatever `load_dataset` takes.

    Labels come from its ClassLabel column, else from a column label, labels or cls: numbers, or names to be sorted.

    Args:
        labels: those of a model that is tested, in its order; of them the data set may have any, and no others.

    Raises:
        ValueError: there is no such data set, or it has no column of videos, no train split (if `labels` aren't given)
            or, with labels, none of these columns, fewer than two labels or one that isn't among `labels`.
        ImportError: `datasets` is not installed.
    """
    datasets = import_datasets()
    with telling(data):
        on_disk = any(Path(data, name).is_file() for name in ("dataset_dict.json", "state.json"))
        loaded = datasets.load_from_disk(data) if on_disk else datasets.load_dataset(data)
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return rows_of(splits, data, labelled=labelled) if labels is None else find_parts(splits, data, labels)


def rows_of(splits: dict[str, Any], data: str, *, labelled: bool) -> Found:
    """The rows of loaded splits, as `find_rows` describes."""
    train = next((splits[name] for name in _NAMES["train"] if name in splits), None)
    if train is None:
        raise ValueError(f"data: {data} has no split train, but {', '.join(splits)}")
    if not labelled:
        return find_parts(splits, data, None)
    label, labels = label_column(train.features, data)
    if not labels:
        values = set(train[label]) - {None, -1}
        numbered = all(isinstance(value, int) for value in values)
        labels = [str(number) for number in range(max(values) + 1)] if numbered else sorted(values)
    if len(labels) < 2:
        raise ValueError(f"data: {data} has fewer than two labels: {', '.join(labels)}")
    return find_parts(splits, data, labels)


def find_parts(splits: dict[str, Any], data: str, labels: Sequence[str] | None) -> Found:
    """The rows of each split that is known by its name, with places among the labels, or without labels (None)."""
    found: dict[str, list[Any]] = {"train": []}
    skipped: Counter[str] = Counter()
    for part, known in _NAMES.items():
        for name in [name for name in known if name in splits][:1]:
            column = video_column(splits[name].features, data)
            found[part], unlabelled = _rows(splits[name], name, column, labels, data)
            skipped.update({"rows without a label": unlabelled} if unlabelled else {})
    return Found(**found, labels=list(labels or []), skipped=skipped)


def _rows(split: Any, name: str, column: str, labels: Sequence[str] | None, data: str) -> tuple[list[Any], int]:
    """(the rows of a split, how many have no label)."""
    raw = split.cast_column(column, import_datasets().Video(decode=False))
    names = list(_names(raw, name, column))
    if labels is None:
        return [Row(shown, None, raw, column, number) for number, shown in enumerate(names)], 0
    label, own = label_column(split.features, data)
    places = {text: place for place, text in enumerate(labels)}
    rows = []
    for number, (shown, value) in enumerate(zip(names, split[label], strict=True)):
        if value is None or value == -1:  # -1 is how the hub hides the labels of a test
            continue
        text = value if isinstance(value, str) else own[value] if own else str(value)
        if text not in places:
            raise ValueError(f"data: {data} has a label in {name} that is not among {', '.join(labels)}: {text}")
        rows.append(Row(shown, places[text], raw, column, number))
    return rows, len(names) - len(rows)


def _names(raw: Any, name: str, column: str) -> Iterator[Path]:
    """What each video is called: its path, or split and number where it is embedded, so that no two are alike."""
    number = 0
    for chunk in raw.select_columns([column]).with_format("arrow")[:][column].chunks:  # no content is read
        embedded = chunk.field("bytes").is_valid()
        for path, inside in zip(chunk.field("path").to_pylist(), embedded.to_pylist(), strict=True):
            end = f"-{Path(path).name}" if path else ""
            yield Path(f"{name}-{number:06d}{end}" if inside or not path else path)
            number += 1


def video_column(features: Any, data: str) -> str:
    """The name of the column of videos. Raises ValueError where there is none, or more than one."""
    datasets = import_datasets()
    # Older versions take a shard's videos, whose column is named by their suffix, for mere bytes.
    columns = [
        name
        for name, kind in (features or {}).items()
        if isinstance(kind, datasets.Video) or f".{name.rpartition('.')[2].lower()}" in SUFFIXES
    ]
    if len(columns) != 1:
        given = ", ".join(features or ()) or "no columns that are known beforehand"
        raise ValueError(f"data: expected one column of videos (datasets.Video), {data} has {len(columns)}: {given}")
    return columns[0]


def label_column(features: Any, data: str) -> tuple[str, list[str]]:
    """(the column of labels, their names where it states them). Raises ValueError where there is none."""
    datasets = import_datasets()
    for name, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            return name, list(kind.names)
    for name in _LABELS:
        if name in features:
            return name, []
    raise ValueError(
        f"data: {data} has no column of labels (a ClassLabel, {', '.join(_LABELS)}): {', '.join(features)}"
    )


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data sets and shards need datasets: {EXTRA}") from error
    return datasets


@contextmanager
def telling(data: str) -> Iterator[None]:
    """What goes wrong within is about the setting `data`, and told in one line: a ValueError."""
    datasets = import_datasets()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data: {data} is no folder, and no data set that can be loaded: {reason}") from error
