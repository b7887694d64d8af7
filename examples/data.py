"""What a script trains and tests on: lists of videos, or whatever `--data` names.

| --data | |
|---|---|
| a folder of videos, of folders for each label, or of train/, val/ and test/ | own_videos.py |
| a Hugging Face data set: its name on the hub, or a folder | hub_videos.py |
| WebDataset shards (.tar), or `--streaming true` with a data set of the hub | streams.py |
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub_videos
import streams
from checkpoints import complete_checkpoints
from clips import ClipCutter, Sampling, TrainingClips
from own_videos import Found, find_videos, first_few, split_off
from recorded import read
from torch.utils.data import Dataset
from transformers import TrainingArguments
from video_list import Entry, read_list

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    Args:
        train: videos, or a stream of them.
        videos: how many an epoch has.
        held_out: videos for the evaluation during training.
        labels: their names; empty where nothing says them.
        skipped: what of the data was left out, by kind.
        held_out_names: of videos that were split off from those to train on, relative to the data's folder.
    """

    train: list[Entry] | streams.Stream
    videos: int
    held_out: list[Entry] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    held_out_names: list[str] = field(default_factory=list)


def find(data: str, *, labelled: bool, labels: Sequence[str] | None = None) -> Found:
    """Whatever `--data` names but a stream; see `find_videos` and `find_rows`."""
    if Path(data).is_dir():
        look = hub_videos.find_rows if hub_videos.is_data_set(Path(data)) else find_videos
        return look(data, labelled=labelled, labels=labels)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data):
        raise ValueError(f"data: there is no folder {data}")
    try:
        hub_videos.import_datasets()
    except ImportError as error:
        raise ValueError(f"data: {data} is no folder; if it is a data set of the hub: {error}") from error
    return hub_videos.find_rows(data, labelled=labelled, labels=labels)


def load_data(recipe: Any, training: TrainingArguments) -> Data:
    """What a recipe's `data`, or its lists, name.

    Videos are held out by the run's seed. Where its folder, or else the checkpoint that it begins from, has an earlier
    part of the run, its split stays as it was, and videos that are new since are trained on.

    Args:
        recipe: of pre-training or fine-tuning. Fine-tuning wants labels, and may hold videos out.

    Raises:
        ValueError: there is nothing to train on, by the name of the setting.
    """
    labelled = hasattr(recipe, "num_labels")
    if recipe.data is None:
        found, root = _lists(recipe, labelled), recipe.data_root or Path(recipe.train_list).parent
    elif streams.is_shards(recipe.data) or recipe.streaming:
        return _stream(recipe, labelled)
    else:
        found, root = find(recipe.data, labelled=labelled), recipe.data
    train, held_out, names = found.train, found.val if labelled else [], []
    if labelled and recipe.val_fraction:
        if held_out:
            logger.warning("val_fraction is not needed: there are videos for validation")
        else:
            train, held_out = _hold_out(train, recipe, training, root)
            names = [name_of(entry, root) for entry in held_out]
    if recipe.limit:
        train, held_out = first_few(train, recipe.limit), first_few(held_out, recipe.limit)
    return Data(train, len(train), held_out, found.labels, found.skipped, names)


def _hold_out(
    entries: list[Entry], recipe: Any, training: TrainingArguments, root: str | Path
) -> tuple[list[Entry], list[Entry]]:
    # With another val_fraction: anew where no step was taken, and else refused (recorded.check_goes_on).
    given = training.resume_from_checkpoint
    before = given if given and not complete_checkpoints(training.output_dir) else training.output_dir
    recorded = read(before) if Path(before).exists() else {}
    same = all(recorded.get(name) == getattr(recipe, name) for name in ("data", "train_list", "val_fraction"))
    held_out = held_out_of(entries, recorded.get("held_out", []), root) if same else []
    if not held_out:
        return split_off(entries, recipe.val_fraction, training.seed)
    out = {entry.path for entry in held_out}
    return [entry for entry in entries if entry.path not in out], held_out


def _lists(recipe: Any, labelled: bool) -> Found:
    number = recipe.num_labels if labelled else None
    train = read_list(recipe.train_list, recipe.data_root, labelled=labelled, num_labels=number)
    val = []
    if labelled and recipe.eval_list:
        val = read_list(recipe.eval_list, recipe.data_root, labelled=True, num_labels=number)
    names = label_names(Path(recipe.train_list)) if labelled else []
    return Found(train, val, labels=names if len(names) == number else [])


def label_names(list_file: Path) -> list[str]:
    """What a list that prepare.py wrote says of its labels, in a comment."""
    with open(list_file, encoding="utf-8-sig") as lines:
        for line in lines:
            if line.startswith("# labels: ["):
                return json.loads(line.partition(":")[2])
            if not line.startswith("#"):
                break
    return []


def _stream(recipe: Any, labelled: bool) -> Data:
    if labelled and recipe.balanced:
        raise ValueError("balanced: the labels of a stream aren't known beforehand")
    open_it = streams.open_shards if streams.is_shards(recipe.data) else streams.open_hub
    stream = open_it(recipe.data, labelled=labelled)
    videos = recipe.clips_per_epoch or stream.length
    if not videos:
        raise ValueError(f"clips_per_epoch is not set: {recipe.data} doesn't say how many clips it holds")
    videos = min(videos, recipe.limit or videos)
    if not labelled:
        return Data(stream, videos)
    if not stream.labels and recipe.num_labels < 2:
        raise ValueError(f"num_labels is not set: {recipe.data} doesn't say how many labels it has")
    labels = stream.labels or [str(number) for number in range(recipe.num_labels)]
    if recipe.eval_list:
        held_out = read_list(recipe.eval_list, recipe.data_root, labelled=True, num_labels=len(labels))
    else:
        held_out = streams.find_held_out(recipe.data, labels).val if Path(recipe.data).is_dir() else []
    if recipe.val_fraction and not held_out:
        raise ValueError("val_fraction: nothing can be held out of a stream; give val*.tar, eval_list, or 0")
    return Data(stream, videos, first_few(held_out, recipe.limit or len(held_out)), labels)


def held_out_of(entries: Sequence[Entry], names: Sequence[str], root: str | Path) -> list[Entry]:
    """Those entries that were held out when a model was trained, by their recorded names."""
    known = set(names)
    return [entry for entry in entries if name_of(entry, root) in known]


def held_out_of_trained(entries: Sequence[Entry], trained: dict[str, Any], data: str) -> list[Entry]:
    """Those entries of `data` that a model wasn't trained on, where that is what it was trained on; else none.

    It is where it lies in the same place, or, moved, still has its last name and every video that was held out.

    Args:
        trained: what the model was trained with (`recorded.read`).
    """
    names = trained.get("held_out", [])
    root = trained.get("data") or trained.get("data_root") or Path(trained.get("train_list") or "").parent
    held_out, then, now = held_out_of(entries, names, data), Path(root).resolve(), Path(data).resolve()
    moved = then.name == now.name and {name_of(entry, data) for entry in held_out} == set(names)
    if names and not (then == now or moved):
        logger.warning("%s is not what the model was trained on: what was held out of that is not looked for", data)
        return []
    return held_out


def name_of(entry: Entry, root: str | Path) -> str:
    """How a video is called in what is recorded: relative to the data's folder, which may be moved."""
    path = entry.path
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def training_set(
    data: Data, recipe: Any, training: TrainingArguments, sampling: Sampling, geometry: Any
) -> Dataset[Any]:
    """The clips to train on, augmented: of a list, or of a stream."""
    if not isinstance(data.train, streams.Stream):
        return TrainingClips(data.train, sampling, geometry, repeats=recipe.repeats, seed=training.seed)
    batch = training.per_device_train_batch_size * max(1, training.n_gpu)
    whole = data.videos // (batch * training.world_size * training.gradient_accumulation_steps)
    return streams.TrainingStream(
        data.train,
        ClipCutter(sampling, geometry, recipe.repeats),
        steps=whole * training.gradient_accumulation_steps,
        batch=batch,
        seed=training.seed,
        shuffle_buffer=recipe.shuffle_buffer,
        process=training.process_index,
        processes=training.world_size,
        num_labels=len(data.labels) or None,
    )
