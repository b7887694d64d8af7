"""The data that people have, `--data`: a folder of one's own videos, labelled by its sub-folders, and how it is split.

videos/cat/1.mp4, videos/dog/a/2.mov, …            a folder for each label, at any depth below it
videos/train/cat/1.mp4, …, videos/val/…, …/test/…  the same, already split
videos/1.mp4, videos/anything/2.mp4, …             without labels, for pre-training

Hugging Face data sets come as the same `Found` (hub_videos.py); shards of more than a disk holds are streams.py's.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from video_list import Entry

SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
}
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Found:
    """What `--data` holds.

    Args:
        train, val, test: videos; val and test are empty where nobody split them off.
        labels: their names, whose places are the entries' labels; empty without labels.
        skipped: what was left out, by kind.
    """

    train: list[Entry]
    val: list[Entry] = field(default_factory=list)
    test: list[Entry] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def find_videos(root: str | os.PathLike[str], *, labelled: bool, labels: Sequence[str] | None = None) -> Found:
    """Look through a folder in one of the layouts above. No video is opened.

    It counts as already split where all of its sub-folders are called train, val or test, train being among them.
    Labels are the names in sorted order. Hidden files and folders, files without a video's suffix, videos beside the
    folders of labels and folders without videos are left out and counted.

    Args:
        labels: those of a model that is tested, in its order; of them the folder may have any, and no others.

    Raises:
        ValueError: there is no such folder, it has no videos, or, with labels, fewer than two labels; val or test has a
            label that train lacks, or any part one that isn't among `labels`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: {root} is no folder")
    skipped: Counter[str] = Counter()
    folders = {path.name: path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if "train" in folders and folders.keys() <= set(PARTS):
        parts = {name: folders[name] for name in PARTS if name in folders}
        _count_files(root, skipped)
    else:
        parts = {"train": root}
    if not labelled:
        found = {name: [Entry(path) for path in _below(folder, skipped)] for name, folder in parts.items()}
        if not found["train"]:
            raise ValueError(f"data: {parts['train']} holds no videos ({_told(skipped) or 'nothing at all'})")
        return Found(**found, skipped=skipped)
    by_label = {name: _by_label(folder, skipped) for name, folder in parts.items()}
    known = f"{parts['train']} lacks" if labels is None else "the model wasn't trained on"
    if labels is None and len(by_label["train"]) < 2:
        raise ValueError(
            f"data: expected a folder for each label, {parts['train']}/<label>/*.mp4, and two labels at least;"
            f" got {', '.join(by_label['train']) or 'none'} ({_told(skipped) or 'nothing left out'})"
        )
    labels = sorted(by_label["train"]) if labels is None else list(labels)
    for name, found_here in by_label.items():
        if unknown := sorted(found_here.keys() - set(labels)):
            raise ValueError(f"data: {parts[name]} has labels that {known}: {', '.join(unknown)}")
    return Found(
        **{
            name: [Entry(path, labels.index(label)) for label in sorted(videos) for path in videos[label]]
            for name, videos in by_label.items()
        },
        labels=labels,
        skipped=skipped,
    )


def _by_label(folder: Path, skipped: Counter[str]) -> dict[str, list[Path]]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            skipped["hidden"] += 1
        elif path.is_dir():
            if videos := _below(path, skipped):
                found[path.name] = videos
            else:
                skipped["folders without videos"] += 1
        elif path.suffix.lower() in SUFFIXES:
            skipped["videos without a label"] += 1
        else:
            skipped["other files"] += 1
    return found


def _below(folder: Path, skipped: Counter[str]) -> list[Path]:
    """The videos at any depth below a folder, links followed, in sorted order."""
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        skipped.update("hidden" for name in folders if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                skipped["hidden"] += 1
            elif Path(name).suffix.lower() in SUFFIXES:
                found.append(Path(here, name))
            else:
                skipped["other files"] += 1
    return sorted(found)


def _count_files(folder: Path, skipped: Counter[str]) -> None:
    """Count what lies beside train, val and test."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            skipped["hidden"] += 1
        elif path.is_file():
            is_video = path.suffix.lower() in SUFFIXES
            skipped["videos beside train, val and test" if is_video else "other files"] += 1


def _told(skipped: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()) if number)


def split_off(entries: Sequence[Entry], fraction: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Hold out a share of the videos for validation: (the rest, the held-out ones), each in the order of `entries`.

    It is drawn by video file, so that parts of one file (links to it included) are all on one side, and within each
    label: the share of its files, rounded, but at least one and never all. A label with a single file is not held out.
    A file with parts of several labels counts for its first one. The same entries, fraction and seed give the same
    split.

    Raises:
        ValueError: the fraction is not between 0 and 1, or nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    label_of: dict[str, int | None] = {}
    for entry in entries:
        label_of.setdefault(os.path.realpath(entry.path), entry.label)
    files: dict[int | None, list[str]] = defaultdict(list)
    for file, label in label_of.items():
        files[label].append(file)
    held_out: set[str] = set()
    for label, of_label in files.items():
        number = min(max(round(fraction * len(of_label)), 1), len(of_label) - 1)
        held_out.update(random.Random(f"{seed} {label}").sample(sorted(of_label), number))
    if not held_out:
        raise ValueError(f"val_fraction: no label has two videos, of which one could be held out ({len(files)} labels)")
    sides: tuple[list[Entry], list[Entry]] = [], []
    for entry in entries:
        sides[os.path.realpath(entry.path) in held_out].append(entry)
    return sides


def first_few(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """At most `limit` entries, the labels in turn, so that a few clips still have all labels; in their own order."""
    seen: Counter[int | None] = Counter()
    turns = []
    for place, entry in enumerate(entries):
        turns.append((seen[entry.label], place))
        seen[entry.label] += 1
    return [entries[place] for place in sorted(place for _, place in sorted(turns)[:limit])]
