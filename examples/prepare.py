"""Lists of videos for pretrain.py, finetune.py and evaluate.py from the layouts in which five data sets are published.

python examples/prepare.py ucf101|hmdb51|k400|ssv2|oscc ROOT OUT_DIR [--split 1] [--allow-missing]

writes OUT_DIR/train.csv, val.csv and test.csv in the format that video_list.py reads, with paths relative to ROOT. Each
data set has one held-out part with public labels that papers report on, so val.csv and test.csv list the same videos.
With --count_tokens MODEL, a model that was saved with a budget for each clip (`EnergyBudget`), also train.tokens: how
many tokens it keeps of the middle of each video, a line each, which token_budget.py makes batches by.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

from layouts import DATASETS, LAYOUTS, MARK, Clip, file_names, foreign_file
from tqdm import tqdm
from video_list import Entry, read_list

SHOWN = 5  # missing videos that a message names


# --- finding the videos ---


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
        if file.is_dir() or foreign_file(file):
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


def count_tokens_of(list_file: Path, root: Path, model: str, stride: int) -> str:
    """Write how many tokens a saved model's budget keeps of each video of a list beside it, and return a summary.

    Raises ValueError where the model can't be loaded or keeps equally many of every clip.
    """
    from clips import Sampling, TestViews
    from token_budget import count_tokens, write_counts

    from everest_tokens.commands import patched_model

    loaded = patched_model(model)
    if not loaded.everest.packs:
        raise ValueError(f"{model}: {loaded.everest.selector!r} keeps equally many tokens of every clip")
    views = TestViews(
        read_list(list_file, root, labelled=False),
        Sampling(loaded.config.num_frames, stride),
        1,
        1,
        loaded.config.image_size,
    )
    counts, file = count_tokens(loaded, views), list_file.with_suffix(".tokens")
    write_counts(counts, file)
    return f"{file}: {min(counts)} to {max(counts)} tokens a clip, {sum(counts) / len(counts):.0f} on average"


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
    parser.add_argument(
        "--count_tokens", "--count-tokens", metavar="MODEL", help="a saved model whose budget's tokens are counted"
    )
    parser.add_argument("--stride", type=int, default=4, help="of the frames that are counted (default: 4)")
    options = parser.parse_args(arguments)
    try:
        summary = prepare(
            options.dataset, options.root, options.out_dir, split=options.split, allow_missing=options.allow_missing
        )
        if options.count_tokens is not None:
            counted = count_tokens_of(options.out_dir / "train.csv", options.root, options.count_tokens, options.stride)
            summary = f"{summary}\n{counted}"
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
