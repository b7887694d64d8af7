"""Videos that are read as a stream, for what is larger than a disk: WebDataset shards, and data sets of the hub.

    --data "shards/train-{000000..000049}.tar"    paths, globs and brace ranges, remote ones where fsspec can
    --data shards                                 a folder: train*.tar (all where there is none), val*.tar, test*.tar
    --data owner/name --streaming true            a data set of the hub, without downloading it

`datasets` reads them, splits them over processes and loaders' workers, and shuffles them: the shards, then samples
within a buffer. A shard's sample is a video (.mp4, .avi, …), with its label as a number beside it (.cls) to fine-tune.

An epoch is `clips_per_epoch` samples, which the processes share alike, so that all take as many steps, and within them
their workers. A worker goes through its shards in another order each time, and begins anew where its share of an epoch
is more than they hold; where it is less, the next epoch has others of them. With shards whose number the processes
divide, each reads its own alone; otherwise each reads all of them and leaves the others' samples out.

A run that goes on with as many processes and workers sees the very samples that it would have seen uninterrupted: none
of the epoch is repeated or left out. What the epoch had before is read past, without decoding it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from glob import has_magic
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from clips import ClipCutter, item_generator
from hub_videos import EXTRA, find_parts, import_datasets, label_column, local_file, telling, video_column
from own_videos import Found
from torch.utils.data import IterableDataset, get_worker_info

_PASSES = 1_000_003  # between the seeds of two epochs: more than the passes of one


@dataclass(frozen=True)
class Sample:
    """A video of a stream, in the place of an `Entry` (video_list.py); `path` is its name, and no file."""

    path: Path
    label: int | None
    video: dict[str, Any]
    start: float | None = None
    end: float | None = None

    def local(self) -> AbstractContextManager[Path]:
        return local_file(self.video)


@dataclass(frozen=True)
class Stream:
    """An open stream.

    Args:
        samples: a `datasets.IterableDataset`.
        video, label: its columns; label is None without labels.
        labels: their names, where it states them.
        length: its samples, where it states them.
    """

    samples: Any
    video: str
    label: str | None
    labels: list[str]
    length: int | None


def is_shards(data: str) -> bool:
    """Whether `--data` names WebDataset shards."""
    return data.endswith(".tar") or (Path(data).is_dir() and any(Path(data).glob("*.tar")))


def shards_of(data: str) -> dict[str, list[str]]:
    """The shards of each part, "train", "val" and "test", in order.

    Raises:
        ValueError: there are none to train on.
    """
    if Path(data).is_dir():
        files = sorted(str(path) for path in Path(data).glob("*.tar"))
        parts = {
            part: [file for file in files if Path(file).name.startswith(part)] for part in ("train", "val", "test")
        }
        return parts if parts["train"] else {"train": [file for file in files if file not in chain(*parts.values())]}
    try:
        import fsspec
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise ImportError(f"data sets and shards need datasets, fsspec and braceexpand: {EXTRA}") from error
    try:
        names = list(braceexpand(data))
    except (UnbalancedBracesError, ValueError) as error:
        raise ValueError(f"data: {data} is no brace range: {error}") from error
    files = []
    for name in names:
        if has_magic(name):
            file_system, pattern = fsspec.core.url_to_fs(name)
            files += [file_system.unstrip_protocol(path) for path in sorted(file_system.glob(pattern))]
        elif "://" not in name and not Path(name).is_file():
            raise ValueError(f"data: there is no shard {name}")
        else:
            files.append(name)
    if not files:
        raise ValueError(f"data: no shards match {data}")
    return {"train": files}


def open_shards(data: str, *, labelled: bool) -> Stream:
    """The shards to train on.

    Raises:
        ValueError: there are none, they hold no videos or, with labels, no `.cls`.
    """
    files = shards_of(data)["train"]
    with telling(data):
        samples = import_datasets().load_dataset(
            "webdataset", data_files={"train": files}, split="train", streaming=True
        )
    return _stream(samples, data, labelled, length=None)


def open_hub(data: str, *, labelled: bool) -> Stream:
    """The split train of a data set of the hub. Raises ValueError as `hub_videos.find_rows`."""
    with telling(data):
        samples = import_datasets().load_dataset(data, split="train", streaming=True)
    splits = samples.info.splits or {}
    return _stream(samples, data, labelled, length=splits["train"].num_examples if "train" in splits else None)


def _stream(samples: Any, data: str, labelled: bool, length: int | None) -> Stream:
    datasets = import_datasets()
    column = video_column(samples.features, data)
    label, labels = label_column(samples.features, data) if labelled else (None, [])
    if label and samples.features[label].dtype == "string":
        raise ValueError(f"data: the labels of a stream have to be numbers, {data} has names in {label}")
    return Stream(samples.cast_column(column, datasets.Video(decode=False)), column, label, labels, length)


def find_held_out(data: str, labels: list[str]) -> Found:
    """The val and test shards of a folder, as rows that can be read by number (`datasets` unpacks them to its cache).

    Raises:
        ValueError: they hold no videos, no `.cls`, or a number that `labels` has no name for.
    """
    files = {part: names for part, names in shards_of(data).items() if names and part != "train"}
    if not files:
        return Found([])
    with telling(data):
        loaded = import_datasets().load_dataset("webdataset", data_files=files)
    return find_parts(loaded, data, labels)


class TrainingStream(IterableDataset[dict[str, Any]]):
    """`ClipCutter`'s items of a stream of videos, in batches that this process and its workers share.

    Where a sample is unreadable the next one is shown in its place too, with its own label, and "bad" names it. An item
    depends on (seed, epoch, process, worker, place) and on their numbers alone.

    Args:
        stream: of `open_shards` or `open_hub`.
        cut: makes an item of the next samples.
        steps: batches of this process in an epoch.
        batch: samples of a batch.
        seed: of all that is random here.
        shuffle_buffer: samples, undecoded, among which each worker draws the next one.
        process, processes: this one's number, and how many there are.
        num_labels: of the model, where there are labels.

    Raises:
        ValueError: steps, batch or shuffle_buffer is below 1. On iterating: a worker's shards hold no samples, or a
            sample's label is missing or none of 0 … num_labels - 1.
    """

    def __init__(
        self,
        stream: Stream,
        cut: ClipCutter,
        *,
        steps: int,
        batch: int,
        seed: int = 0,
        shuffle_buffer: int = 100,
        process: int = 0,
        processes: int = 1,
        num_labels: int | None = None,
    ) -> None:
        for name, value in (("steps", steps), ("batch", batch), ("shuffle_buffer", shuffle_buffer)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        from datasets.distributed import split_dataset_by_node

        shuffled = stream.samples.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.samples = split_dataset_by_node(shuffled, rank=process, world_size=processes)
        self.stream, self.cut, self.steps, self.batch = stream, cut, steps, batch
        self.seed, self.process, self.num_labels = seed, process, num_labels
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # reaches workers that are running
        self._skip = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def most_workers(self) -> int:
        """More of them would have no shard."""
        return max(1, self.samples.num_shards)

    def set_epoch(self, epoch: int) -> None:
        """Change the order and what is drawn, from the next iteration on."""
        self._epoch.fill_(epoch)

    def skip(self, batches: int) -> None:
        """In the next iteration give nothing, {}, in the place of the first batches' items: they are skipped anyway."""
        self._skip.fill_(batches)

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, skip = int(self._epoch), int(self._skip)
        samples = self._endless(epoch)
        ahead: deque[Sample] = deque()

        def following() -> Iterator[Sample]:
            for position in count():
                if position == len(ahead):
                    ahead.append(next(samples))
                yield ahead[position]

        def mine(batches: int) -> int:
            """Of so many batches, the samples that this worker gives: a loader takes its workers' batches in turn."""
            return self.batch * max(0, math.ceil((batches - number) / workers))

        for place in range(mine(self.steps)):
            if place < mine(skip):
                next(samples)
                yield {}
            else:
                yield self.cut(following(), item_generator(self.seed, epoch, self.process, number, place))
                ahead.popleft()  # and no more, whatever was unreadable: places alone say which sample is whose

    def _endless(self, epoch: int) -> Iterator[Any]:
        """This worker's samples in the order of an epoch, from their beginning again where they end."""
        for again in count():
            self.samples.set_epoch(epoch * _PASSES + again)
            none = True
            for row in self.samples:
                none = False
                video = row[self.stream.video]
                name = row.get("__key__") or video["path"] or "a video"
                label = None if self.stream.label is None else self._label(row[self.stream.label], name)
                yield Sample(Path(name), label, video)
            if none:
                raise ValueError("data: the shards of a process or of a loader's worker hold no samples")

    def _label(self, value: Any, name: str) -> int:
        if value is None or not 0 <= value < (math.inf if self.num_labels is None else self.num_labels):
            allowed = "not negative" if self.num_labels is None else f"from 0 to {self.num_labels - 1}"
            raise ValueError(f"data: the label of {name} must be {allowed}, got {value}")
        return int(value)
