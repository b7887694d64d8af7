"""Lists of videos for pretrain.py, finetune.py and evaluate.py from the layouts in which five data sets are published.

python examples/prepare.py ucf101|hmdb51|k400|ssv2|oscc ROOT OUT_DIR [--split 1] [--allow-missing]

writes OUT_DIR/train.csv, val.csv and test.csv in the format that video_list.py reads, with paths relative to ROOT. Each
data set has one held-out part with public labels that papers report on, so val.csv and test.csv list the same videos.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm
from video_list import Entry

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
SHOWN = 5  # missing videos that a message names


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
    annotated = [folder for folder in ("annotations", ".") if _foreign_file(root / folder / "train.csv")]
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


# --- finding the videos ---


def file_names(folder: Path) -> frozenset[str]:
    """The names of the files in a folder; none where there is no such folder."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())


def locate(root: Path, clips: list[Clip], part: str) -> tuple[list[Entry], list[Clip]]:
    """The clips whose file exists, with paths relative to root, and those without; raises ValueError where all are.

    Folders are listed once: asking for each of Kinetics' 240,000 files takes long on a network drive.
    """
    if not clips:
        raise ValueError(f"the annotations name no video for {part}, expected at least one")
    listed = cache(lambda folder: file_names(root / folder))
    found: list[Entry] = []
    missing: list[Clip] = []
    for clip in tqdm(clips, desc=f"{part}: looking for videos", unit="video", disable=None):
        places = product(clip.folders, clip.names)
        path = next((Path(folder, name) for folder, name in places if name in listed(folder)), None)
        if path is None:
            missing.append(clip)
        elif len(str(path).splitlines()) != 1 or any("\ud800" <= character <= "\udfff" for character in str(path)):
            raise ValueError(f"{str(root / path)!r}: a list takes no names with line breaks or other bytes than UTF-8")
        else:
            found.append(Entry(path, clip.label, clip.start, clip.end))
    if not found:
        raise ValueError(f"found none of the {len(clips)} videos of {part}: {describe_missing(root, missing)}")
    return found, missing


def describe_missing(root: Path, missing: list[Clip]) -> str:
    names = list(dict.fromkeys(clip.names[0] for clip in missing))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    first = missing[0]
    places = ", ".join(str(root / folder) for folder in first.folders)
    return f"{', '.join(names[:SHOWN])}{more} (looked for {' or '.join(first.names)} in {places})"


# --- the lists ---


def list_text(entries: list[Entry], labels: list[str], title: str) -> str:
    """A list as video_list.read_list takes it, label names in a comment. Paths are quoted: HMDB51's have # & ; !."""
    text = io.StringIO()
    print(f"{MARK}: {title}; paths are relative to the data set's folder (--data_root)", file=text)
    print(f"# labels: {json.dumps(labels, ensure_ascii=False)}", file=text)
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for entry in entries:
        segment = () if entry.start is None else (entry.start, entry.end)
        writer.writerow((entry.path.as_posix(), entry.label, *segment))
    return text.getvalue()


def _foreign_file(file: Path) -> bool:
    """Whether the file exists and was not made by this script."""
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(len(MARK)) != MARK.encode()


def prepare(name: str, root: Path, out_dir: Path, *, split: int | None = None, allow_missing: bool = False) -> str:
    """Write the three lists of a data set to out_dir and return a summary.

    name is a key of DATASETS, split 1, 2 or 3 (None: 1) for UCF101 and HMDB51, None for the others. Raises ValueError,
    and writes nothing, where the layout is not the published one, where videos are missing (with allow_missing: all of
    a list) and where a file that is no list of this script would be overwritten.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}, got {name!r}")
    dataset = DATASETS[name]
    if split is not None and not dataset.has_splits:
        raise ValueError(f"--split {split}: {dataset.title} has no splits, only UCF101 and HMDB51 have")
    if split not in (None, 1, 2, 3):
        raise ValueError(f"--split must be 1, 2 or 3, got {split}")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder, expected the one that holds {dataset.title}")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir}: not a folder, expected one for the lists")
    for file in (out_dir / "train.csv", out_dir / "val.csv", out_dir / "test.csv"):
        if file.is_dir() or _foreign_file(file):
            raise ValueError(f"{file} exists and is no list of this script: choose another OUT_DIR")

    title = f"{dataset.title}, split {split or 1}" if dataset.has_splits else dataset.title
    try:
        annotations = dataset.read(root, split or 1) if dataset.has_splits else dataset.read(root)
        train, train_missing = locate(root, annotations.train, "train")
        held_out, held_out_missing = locate(root, annotations.held_out, "val and test")
        if (train_missing or held_out_missing) and not allow_missing:
            raise ValueError(
                f"{len(train_missing) + len(held_out_missing)} of "
                f"{len(annotations.train) + len(annotations.held_out)} clips have no video: "
                f"{describe_missing(root, train_missing + held_out_missing)}; --allow-missing leaves them out"
            )
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error

    parts = {"train": train, "val": held_out, "test": held_out}
    texts = {part: list_text(entries, annotations.labels, f"{title}, {part}") for part, entries in parts.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".unfinished-") as work:  # a full disk leaves no half list
        for part, text in texts.items():
            Path(work, f"{part}.csv").write_text(text, encoding="utf-8", newline="\n")
        for part in texts:
            os.replace(Path(work, f"{part}.csv"), out_dir / f"{part}.csv")

    summary = [
        f"{title}: {len(annotations.labels)} labels",
        f"{out_dir / 'train.csv'}: {len(train)} clips",
        f"{out_dir / 'val.csv'} and test.csv: the same {len(held_out)} clips, on which papers report. To choose "
        "settings without looking at them, move some of train.csv to val.csv",
    ]
    if len(annotations.labels) != dataset.num_labels:
        summary.append(f"note: {dataset.title} is published with {dataset.num_labels} labels; numbers may be shifted")
    for part, missing in (("train", train_missing), ("val and test", held_out_missing)):
        if missing:
            summary.append(f"{part}: left out {len(missing)} clips without a video: {describe_missing(root, missing)}")
    return "\n".join([*summary, f"the paths in them are relative to --data_root {root}"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input ends in one line on standard error and status 2."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Write OUT_DIR/train.csv, val.csv and test.csv (val and test are the same) for a data set in ROOT.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=DATASETS, help="what is in ROOT; its layout is described below")
    parser.add_argument("root", metavar="ROOT", type=Path, help="the data set's folder, later --data_root")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder for the lists, made if need be")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), help="of UCF101 and HMDB51 (default: 1)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave annotated videos out whose file is missing (else an error)"
    )
    options = parser.parse_args(arguments)
    try:
        summary = prepare(
            options.dataset, options.root, options.out_dir, split=options.split, allow_missing=options.allow_missing
        )
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
