"""The layouts in which five data sets are published: their annotations, read, and where each clip's file may lie."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

LAYOUTS = """\
what ROOT must hold:
  ucf101   ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt and <Class>/*.avi (also below UCF-101/ or videos/)
  hmdb51   testTrainMulti_7030_splits/<class>_test_splitN.txt and <class>/*.avi (also below hmdb51_org/ or videos/)
  k400     annotations/{train,val}.csv and {train,val}/<youtube id>_<start>_<end>.mp4, as CVDF distributes them, flat or
           in class folders; files in replacement/ win. Without annotations, the class folders themselves:
           {train,val}/<class>/*.mp4. Not every annotated video is still published: use --allow-missing
  ssv2     {train,validation,labels}.json (also in labels/ or annotations/, or named something-something-v2-*.json) and
           videos/<id>.webm (or 20bn-something-something-v2/; converted to .mp4 will do)
  oscc     fho_oscc-pnr_{train,val}.json (also in annotations/) and the full-length full_scale/<video uid>.mp4
           (smaller copies in video_540ss/ are preferred), as Ego4D's command downloads them to <folder>/v2
"""

# Written at the head of every list: only files that begin with it are ever overwritten.
MARK = "# made by prepare.py"
VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi"}


@dataclass(frozen=True)
class Clip:
    """An annotated clip: the folders (relative to ROOT) and names under which its file may lie, the best first."""

    folders: tuple[str, ...]
    names: tuple[str, ...]
    label: int
    start: float | None = None  # seconds of the file
    end: float | None = None


@dataclass(frozen=True)
class Annotations:
    labels: list[str]  # the name of label 0, 1, …
    train: list[Clip]
    held_out: list[Clip]


# --- the data sets ---


def ucf101(root: Path, split: int) -> Annotations:
    """UCF101 (Soomro et al., 2012), one of three splits; labels in the order of classInd.txt, which counts from 1."""
    index, train, test = find_files(
        root, ("ucfTrainTestlist", "."), ("classInd.txt",), (f"trainlist0{split}.txt",), (f"testlist0{split}.txt",)
    )
    labels: list[str] = []
    for place, line in lines(index):
        number, _, name = line.partition(" ")
        if number != str(len(labels) + 1) or not name:
            raise ValueError(f"{place}: expected '{len(labels) + 1} <Class>', found {line!r}")
        labels.append(name)

    def read(file: Path) -> list[Clip]:
        clips = []
        for place, line in lines(file):
            match = re.fullmatch(r"([^/]+)/([^/]+\.avi)(?:\s+(\d+))?", line)  # only the training lists have numbers
            if match is None:
                raise ValueError(f"{place}: expected '<Class>/<video>.avi', then perhaps its number, found {line!r}")
            name, video, number = match.groups()
            if name not in labels:
                raise ValueError(f"{place}: {name!r} is not one of the {len(labels)} classes of {index}")
            label = labels.index(name)
            if number is not None and int(number) != label + 1:
                raise ValueError(f"{place}: {name!r} has number {number} here and {label + 1} in {index}")
            clips.append(Clip((name, f"UCF-101/{name}", f"videos/{name}"), (video,), label))
        return clips

    return Annotations(labels, read(train), read(test))


def hmdb51(root: Path, split: int) -> Annotations:
    """HMDB51 (Kuehne et al., 2011), one of three splits of 70 training and 30 test clips a class, labels by name."""
    ending = f"_test_split{split}.txt"
    folders = [root / "testTrainMulti_7030_splits", root / "test_train_splits" / "testTrainMulti_7030_splits", root]
    files = next((found for folder in folders if (found := list(folder.glob(f"*{ending}")))), [])
    if not files:
        raise ValueError(f"looked for <class>{ending} in {', '.join(map(str, folders))}: found none")
    by_class = {file.name.removesuffix(ending): file for file in files}
    labels = sorted(by_class)
    parts: dict[str, list[Clip]] = {"0": [], "1": [], "2": []}  # in neither part, in training, in testing
    for label, name in enumerate(labels):
        for place, line in lines(by_class[name]):
            match = re.fullmatch(r"([^/]+\.avi)\s+([012])", line)
            if match is None:
                raise ValueError(f"{place}: expected '<video>.avi' and 0, 1 or 2, found {line!r}")
            clip = Clip((name, f"hmdb51_org/{name}", f"videos/{name}"), (match[1],), label)
            parts[match[2]].append(clip)
    return Annotations(labels, parts["1"], parts["2"])


def k400(root: Path) -> Annotations:
    """Kinetics-400 (Kay et al., 2017) from its annotations, or from class folders where there are none."""
    annotated = [folder for folder in ("annotations", ".") if foreign_file(root / folder / "train.csv")]
    if annotated:
        return _k400_annotated(*find_files(root, annotated, ("train.csv",), ("val.csv", "validate.csv")))
    for above in (".", "videos"):
        if _class_folders(root / above / "train") and _class_folders(root / above / "val"):
            return _k400_folders(root, above)
    raise ValueError(
        f"looked for train.csv with val.csv in {root / 'annotations'} and {root}, and for class folders train/<class>/ "
        f"with val/<class>/ in {root} and {root / 'videos'}: found neither"
    )


def _k400_annotated(train: Path, val: Path) -> Annotations:
    rows = {"train": _kinetics_rows(train), "val": _kinetics_rows(val)}
    labels = sorted({name for _, name, _ in rows["train"]})
    numbers = {name: number for number, name in enumerate(labels)}
    # CVDF's replacements of broken files come first; its script arrange_by_classes.py makes videos/<part>/<class>/, and
    # torchvision's Kinetics class folders with underscores.
    folders = {
        (part, name): (
            *("replacement/replacement_for_corrupted_k400", "replacement_for_corrupted_k400", "replacement"),
            *(f"{part}{below}" for below in ("", f"/{name}", f"/{name.replace(' ', '_')}")),
            *(f"videos/{part}{below}" for below in ("", f"/{name}", f"/{name.replace(' ', '_')}")),
        )
        for part, name in product(rows, labels)
    }
    parts: dict[str, list[Clip]] = {"train": [], "val": []}
    for part, clips in parts.items():
        for place, name, video in rows[part]:
            if name not in numbers:
                raise ValueError(f"{place}: label {name!r} is not one of the {len(labels)} of {train}")
            clips.append(Clip(folders[part, name], (video,), numbers[name]))
    return Annotations(labels, parts["train"], parts["val"])


def _kinetics_rows(file: Path) -> list[tuple[str, str, str]]:
    """Of each row: where it stands, its label and the file name of its video."""
    columns = ("label", "youtube_id", "time_start", "time_end")
    reader = csv.DictReader(io.StringIO(read_text(file)))
    if not set(columns) <= set(reader.fieldnames or ()):
        raise ValueError(f"{file}:1: expected the columns {', '.join(columns)}, found {reader.fieldnames}")
    rows = []
    for row in reader:
        place = f"{file}:{reader.line_num}"
        label, video, start, end = (row[column] or "" for column in columns)
        if not (label and video and start.isdecimal() and end.isdecimal()):
            raise ValueError(f"{place}: expected a label, a YouTube id and whole seconds, found {list(row.values())}")
        rows.append((place, label, f"{video}_{int(start):06d}_{int(end):06d}.mp4"))
    return rows


def _k400_folders(root: Path, above: str) -> Annotations:
    # With spaces for underscores the alphabetical order is that of the annotations, however the folders are written.
    names = {
        part: {folder: folder.replace("_", " ") for folder in _class_folders(root / above / part)}
        for part in ("train", "val")
    }
    labels = sorted(set(names["train"].values()))
    numbers = {name: number for number, name in enumerate(labels)}
    unknown = [folder for folder, name in names["val"].items() if name not in numbers]
    if unknown:
        raise ValueError(f"{root / above / 'val' / unknown[0]}: there is no such class in {root / above / 'train'}")
    parts: dict[str, list[Clip]] = {"train": [], "val": []}
    for part, clips in parts.items():
        for folder, name in tqdm(names[part].items(), desc=f"{part}: scanning", unit="class", disable=None):
            below = f"{above}/{part}/{folder}"
            videos = sorted(file for file in file_names(root / below) if Path(file).suffix.lower() in VIDEO_SUFFIXES)
            clips += [Clip((below,), (video,), numbers[name]) for video in videos if not video.startswith(".")]
    return Annotations(labels, parts["train"], parts["val"])


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def ssv2(root: Path) -> Annotations:
    """Something-Something V2 (Goyal et al., 2017): labels.json numbers the templates, written without brackets."""
    train, validation, label_file = find_files(
        root,
        (".", "labels", "annotations"),
        *((f"{part}.json", f"something-something-v2-{part}.json") for part in ("train", "validation", "labels")),
    )
    names = read_json(label_file, dict)
    numbers = {name: int(number) for name, number in names.items() if str(number).isdecimal()}
    if sorted(numbers.values()) != list(range(len(names))):
        raise ValueError(f"{label_file}: expected names with the numbers 0 to {len(names) - 1}, found other values")
    archive = "20bn-something-something-v2"
    folders = ("videos", archive, f"videos/{archive}", ".")

    def read(file: Path) -> list[Clip]:
        clips = []
        for position, item in enumerate(read_json(file, list)):
            place = f"{file}: entry {position}"
            video = field(item, "id", (str, int), place)
            template = field(item, "template", str, place).replace("[", "").replace("]", "")
            if template not in numbers:
                raise ValueError(f"{place}: template {template!r} is not in {label_file}")
            clips.append(Clip(folders, (f"{video}.webm", f"{video}.mp4"), numbers[template]))
        return clips

    return Annotations(sorted(numbers, key=numbers.__getitem__), read(train), read(validation))


def oscc(root: Path) -> Annotations:
    """Object state change classification of Ego4D (Grauman et al., 2022): 8-second segments of full-length videos."""
    train, val = find_files(root, ("annotations", "."), ("fho_oscc-pnr_train.json",), ("fho_oscc-pnr_val.json",))

    def read(file: Path) -> list[Clip]:
        clips = []
        for position, item in enumerate(field(read_json(file, dict), "clips", list, str(file))):
            unique_id = field(item, "unique_id", str, f"{file}: clip {position}")
            place = f"{file}: clip {unique_id}"
            video = field(item, "video_uid", str, place)
            # "parent" seconds count from the start of the full-length video, "clip" seconds from that of a cut-out.
            start = float(field(item, "parent_start_sec", (int, float), place))
            end = float(field(item, "parent_end_sec", (int, float), place))
            if not 0 <= start < end:
                raise ValueError(f"{place}: expected 0 <= parent_start_sec < parent_end_sec, found {start} and {end}")
            label = int(field(item, "state_change", bool, place))
            clips.append(Clip(("video_540ss", "full_scale", "."), (f"{video}.mp4",), label, start, end))
        return clips

    return Annotations(["no state change", "state change"], read(train), read(val))


@dataclass(frozen=True)
class Dataset:
    title: str
    num_labels: int  # as published
    read: Callable[..., Annotations]  # of root, and of the split where there are several
    has_splits: bool = False


DATASETS = {
    "ucf101": Dataset("UCF101", 101, ucf101, has_splits=True),
    "hmdb51": Dataset("HMDB51", 51, hmdb51, has_splits=True),
    "k400": Dataset("Kinetics-400", 400, k400),
    "ssv2": Dataset("Something-Something V2", 174, ssv2),
    "oscc": Dataset("Ego4D OSCC", 2, oscc),
}


# --- reading what is published ---


def find_files(root: Path, folders: Sequence[str], *wanted: tuple[str, ...]) -> list[Path]:
    """One file for each of `wanted` (its possible names), all from the first of the folders below root that has them.

    Raises ValueError, with what was looked for and what each folder lacks, where none has all.
    """
    tried = []
    for folder in folders:
        found = [next((path for name in names if (path := root / folder / name).is_file()), None) for names in wanted]
        files = [path for path in found if path is not None]
        if len(files) == len(wanted):
            return files
        lacking = ", ".join(names[0] for names, path in zip(wanted, found, strict=True) if path is None)
        tried.append(f"{root / folder} ({f'lacks {lacking}' if (root / folder).is_dir() else 'no such folder'})")
    looked_for = ", ".join(" or ".join(names) for names in wanted)
    raise ValueError(f"looked for {looked_for} together in one of these folders: {'; '.join(tried)}")


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, found other bytes ({error.reason})") from error


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Of each line that isn't blank, where it stands (file:line) and its text without surrounding white space."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", line.strip()


def read_json(file: Path, kind: type) -> Any:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON, found something else ({error})") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file}: expected a JSON {kind.__name__}, found a {type(content).__name__}")
    return content


def field(item: Any, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """item[name], or a ValueError that says where it should have been and of which kind."""
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{place}: expected the field {name!r} with a {kinds}, found {value!r}")
    return value


def file_names(folder: Path) -> frozenset[str]:
    """The names of the files in a folder; none where there is no such folder."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())


def foreign_file(file: Path) -> bool:
    """Whether the file exists and was not made by this script."""
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(len(MARK)) != MARK.encode()
