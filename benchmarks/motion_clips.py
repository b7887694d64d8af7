"""The task of motion_accuracy.py: clips of a moving object over a real photograph, made from a seed.

A disc, cut at random out of one of the photographs, moves over one of them in one of eight directions, which is the
label. Its place is uniform over the frame, whose edges are joined (what leaves on the left comes in on the right), and
so is independent of the label: a single frame says nothing about it, only change does. A second disc, which stays where
it is, shows that having the texture of an object isn't enough. Training clips and test clips are made of different
photographs, the ones that scikit-image ships.

With `colours` the resting disc has a tint, which is a second label: each frame shows it, and no change does.
"""

from __future__ import annotations

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

DIRECTIONS = 8
TINT = 0.6  # of a tinted disc: its share of the pure hue, the rest is texture
TRAINING_PHOTOS = ("astronaut", "coffee", "rocket", "brick", "grass", "motorcycle")
TEST_PHOTOS = ("chelsea", "gravel", "hubble_deep_field", "camera")
PHOTO_SIDE = 160  # pixels; a frame is a part of it, so that the detail in a frame is a photograph's
_CHUNK = 128  # clips made at a time


@dataclass(frozen=True)
class Task:
    """What the clips are like; lengths in pixels.

    Attributes:
        frames: of a clip.
        size: side of the square frames.
        radius: of the discs.
        speed: of the object, a frame.
        noise: standard deviation of the sensor's noise, drawn anew for every pixel and frame, of 255.
        camera: how far the photograph moves behind the discs, a frame, in a random direction.
        resting: share of the clips, drawn clip by clip, whose camera rests all the same.
        flicker: standard deviation of each frame's brightness, as a share of it.
        action: share of the frames during which the object moves, from a random frame on; before and after it rests.
        colours: how many tints the resting disc can have, its label; 0 for a disc without tint or label.
    """

    frames: int = 16
    size: int = 48
    radius: int = 8
    speed: float = 3.0
    noise: float = 4.0
    camera: float = 0.0
    resting: float = 0.0
    flicker: float = 0.0
    action: float = 1.0
    colours: int = 0


@lru_cache(maxsize=2)
def photographs(names: tuple[str, ...]) -> Tensor:
    """uint8 (P, PHOTO_SIDE, PHOTO_SIDE, 3): the middle of each photograph, grey ones with three equal channels."""
    from skimage import data

    photos = []
    for name in names:
        image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
        pixels = torch.from_numpy(image.copy())
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3) if pixels.ndim == 2 else pixels[..., :3]
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side].permute(2, 0, 1)[None].float()
        small = interpolate(square, (PHOTO_SIDE, PHOTO_SIDE), mode="bilinear", antialias=True)
        photos.append(small[0].permute(1, 2, 0).round().clamp(0, 255).byte())
    return torch.stack(photos)


def velocity(labels: Tensor, speed: float) -> Tensor:
    """labels (n,) → (n, 2) pixels a frame, down and to the right: label 0 moves right, 2 down, 4 left, 6 up."""
    angle = labels * (2 * math.pi / DIRECTIONS)
    return speed * torch.stack([angle.sin(), angle.cos()], dim=-1)


def tints(count: int) -> Tensor:
    """(count, 3) float32 of 255: red, green and blue of evenly spaced hues, from red on."""
    return torch.tensor([hsv_to_rgb(i / count, 1.0, 1.0) for i in range(count)]) * 255


def places(task: Task, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Where the object's centre is: (n, frames, 2) whole pixels, row and column, in a frame with joined edges."""
    count = len(labels)
    moving = max(round(task.action * task.frames), 1)
    start = torch.randint(task.frames - moving + 1, (count, 1), generator=generator)
    travelled = (torch.arange(task.frames) - start).clamp(0, moving)  # frames since it began to move
    begin = torch.rand(count, 1, 2, generator=generator) * task.size
    path = begin + velocity(labels, task.speed)[:, None] * travelled[..., None]
    return path.round().long() % task.size


def share_with_motion(task: Task, window: int) -> float:
    """The share of windows in which the object is seen to move, where the window and the action begin uniformly."""
    moving = max(round(task.action * task.frames), 1)
    starts = [(w, a) for w in range(task.frames - window + 1) for a in range(task.frames - moving + 1)]
    # The object moves between frames a and a + moving: one such pair of frames must lie in the window.
    seen = [max(w, a) < min(w + window - 1, a + moving) for w, a in starts]
    return sum(seen) / len(seen)


def make_clips(task: Task, photos: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` clips of `task`.

    Args:
        photos: uint8 (P, side, side, 3), to cut backgrounds and discs from.

    Returns:
        clips uint8 (count, frames, 3, size, size) and labels int64: the direction (count,), or with `colours` the
        direction and the tint (count, 2).
    """
    made = [make_chunk(task, photos, min(_CHUNK, count - done), generator) for done in range(0, count, _CHUNK)]
    clips, labels, _ = zip(*made, strict=True)
    return torch.cat(clips), torch.cat(labels)


def make_chunk(task: Task, photos: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips and labels as `make_clips` gives them, all made at once, and the moving disc's pixels.

    Returns:
        clips, labels, and bool (count, frames, size, size).
    """
    side, along = photos.shape[1], torch.arange(task.size)

    def drawn(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator)

    labels = drawn(DIRECTIONS, count)
    photo = drawn(len(photos), count)
    corner = drawn(side - task.size, count, 1, 2)
    pan = torch.rand(count, 1, generator=generator) * 2 * math.pi
    pan = task.camera * torch.cat([pan.sin(), pan.cos()], dim=1)[:, None]  # (n, 1, 2)
    if task.resting:  # nothing is drawn otherwise, or all that follows would differ
        pan = pan * (torch.rand(count, 1, 1, generator=generator) >= task.resting)
    corner = corner + (pan * torch.arange(task.frames)[:, None]).round().long()  # (n, T, 2)
    rows, columns = ((corner[..., i, None] + along) % side for i in (0, 1))  # (n, T, size)
    if task.camera == 0:  # one background for all frames
        rows, columns = rows[:, :1], columns[:, :1]
    background = photos[photo[:, None, None, None], rows[..., :, None], columns[..., None, :]]  # (n, T or 1, H, W, 3)
    clips = background.expand(-1, task.frames, -1, -1, -1).float().clone()

    around = torch.arange(-task.radius, task.radius + 1)
    disc = (around[:, None] ** 2 + around**2 <= task.radius**2).nonzero() - task.radius  # (M, 2)
    clip, frame = torch.arange(count)[:, None, None], torch.arange(task.frames)[:, None]
    resting = drawn(task.size, count, 1, 2).expand(-1, task.frames, -1)
    colours = drawn(task.colours, count) if task.colours else None
    for centre, colour in ((resting, colours), (places(task, labels, generator), None)):
        cut = drawn(side - 2 * task.radius, count, 1, 2) + task.radius + disc  # (n, M, 2)
        texture = photos[drawn(len(photos), count, 1), cut[..., 0], cut[..., 1]].float()  # (n, M, 3)
        if colour is not None:
            texture = texture.lerp(tints(task.colours)[colour][:, None], TINT)
        at = (centre[:, :, None] + disc) % task.size  # (n, T, M, 2)
        clips[clip, frame, at[..., 0], at[..., 1]] = texture[:, None]
    moving = torch.zeros(count, task.frames, task.size, task.size, dtype=torch.bool)
    moving[clip, frame, at[..., 0], at[..., 1]] = True  # of the last disc, which lies over the other
    if task.flicker:
        clips *= 1 + task.flicker * torch.randn(count, task.frames, 1, 1, 1, generator=generator)
    clips += task.noise * torch.randn(clips.shape, generator=generator)
    labels = labels if colours is None else torch.stack([labels, colours], dim=1)
    return clips.round().clamp(0, 255).byte().permute(0, 1, 4, 2, 3).contiguous(), labels, moving


def turned(clips: Tensor, labels: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """The same clips seen in one of the eight symmetries of a square, with the labels that they then have.

    Args:
        labels: (n,) or (n, 2) as `make_clips` gives them; a turned disc has the colour that it had.
        turn: 0 … 7; bit 0 mirrors left and right, bit 1 up and down, bit 2 exchanges rows and columns.
    """
    direction = labels if labels.ndim == 1 else labels[:, 0]
    if turn & 1:
        clips, direction = clips.flip(-1), (DIRECTIONS // 2 - direction) % DIRECTIONS
    if turn & 2:
        clips, direction = clips.flip(-2), -direction % DIRECTIONS
    if turn & 4:
        clips, direction = clips.transpose(-1, -2), (DIRECTIONS // 4 - direction) % DIRECTIONS
    return clips, direction if labels.ndim == 1 else torch.stack([direction, labels[:, 1]], dim=1)
