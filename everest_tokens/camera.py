"""A moving camera: each frame as the camera of a later one sees it, so that only what moves by itself has changed.

Beyond the paper, whose Eq. 2 compares a token with what stood at the same place before. EgoPrune (Li et al., 2025)
aligns the video tokens of a language model by a perspective; here pixels are aligned before anything is encoded.

The motion of a whole frame is estimated anew for each pair of frames: a search for the best translation over truncated
differences, then Gauss–Newton steps (Lucas and Kanade, 1981; inverse compositional: Baker and Matthews, 2004) in which
each pixel's vote is weighted by how far it is from moving along (Geman and McClure, 1987). Everything is float32, of
static shapes and on the clips' device, with a fixed number of steps and nothing to wait for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

WORKING_SIDE = 112  # pixels, about: frames are made so small, by a whole factor, before their motion is estimated
FARTHEST = 0.25  # of the frame: a longer shift in the time of one tubelet is a cut rather than a camera
NEEDED = 0.9  # a motion is believed where it leaves less than this of the difference that a simpler one leaves
_TRUNCATED = 0.5  # of a frame's standard deviation: what differs more, however much, is something else
_STEPS = {"translation": (4, 1), "affine": (6, 2)}  # Gauss–Newton steps at half the working size, and at all of it


def as_seen_later(clips: Tensor, step: int) -> Tensor:
    """Show each frame as the camera of the frame `step` later sees it.

    Args:
        clips: (B, T, C, H, W), floating point.
        step: frames in a time step, below T.

    Returns:
        The same shape and dtype. Frame f ≥ step is frame f − step, moved; what lay outside it is taken from frame f, as
        unchanged. Where no motion explains the difference, it is frame f − step to the bit. The first `step` frames
        are the clips' own.
    """
    clips = clips.detach()  # no `no_grad`: torch.export can't save one around another
    motion = camera_motion(clips, step)
    with _without_autocast(clips):
        later, earlier = clips[:, step:], clips[:, :-step]
        moved, inside = _sample(earlier.flatten(0, 1).float(), motion.flatten(0, 1))
        moved = moved.to(clips.dtype).unflatten(0, later.shape[:2])
        moved = torch.where(inside.unflatten(0, later.shape[:2]), moved, later)
        rests = (motion == _identity(clips)).flatten(2).all(dim=2)[..., None, None, None]
        return torch.cat([clips[:, :step], torch.where(rests, earlier, moved)], dim=1)


def camera_motion(clips: Tensor, step: int) -> Tensor:
    """Estimate where each frame's places were in the frame `step` earlier.

    Of rest, one translation, and an affine motion the simplest that the next doesn't beat by a tenth. Noise, black
    frames, cuts, and shifts beyond a quarter of the frame are rest.

    Args:
        clips: (B, T, C, H, W).
        step: frames in a time step, below T.

    Raises:
        ValueError: frames of fewer than 8 pixels a side.

    Returns:
        (B, T − step, 2, 3) float32: (x, y, 1) → (x, y) earlier, in −1…1 from edge to edge, as
        `torch.nn.functional.affine_grid` has it; exactly [[1, 0, 0], [0, 1, 0]] at rest.
    """
    if min(clips.shape[-2:]) < 8:
        raise ValueError(f"the camera's motion is estimated in frames of at least 8 × 8 pixels, got {clips.shape}")
    with _without_autocast(clips):
        motion = _estimated(*_pairs(clips.detach(), step))
    return motion.unflatten(0, (clips.shape[0], clips.shape[1] - step))


def _without_autocast(clips: Tensor) -> AbstractContextManager[object]:
    """Autocast would take the products in half precision; the meta device knows none."""
    return nullcontext() if clips.is_meta else torch.autocast(clips.device.type, enabled=False)


def _estimated(later: Tensor, earlier: Tensor) -> Tensor:
    """(P, 1, h, w) each → the motion (P, 2, 3) that is believed."""
    contrast = (later - later.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(2, 3), keepdim=True).sqrt()
    limit = _TRUNCATED * contrast
    halves = functional.avg_pool2d(later, 2), functional.avg_pool2d(earlier, 2)

    def refined(motion: Tensor, kind: str) -> Tensor:
        coarse, fine = _STEPS[kind]
        return _aligned(later, earlier, _aligned(*halves, motion, coarse, kind), fine, kind)

    def better(motion: Tensor, simpler: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The motion where it explains enough more than the simpler one, else that; what it makes of the earlier."""
        moved, inside = _sample(earlier, motion)
        left, most = (((shown - later).abs().minimum(limit) * inside).sum(dim=(1, 2, 3)) for shown in (moved, before))
        near = (motion[:, :, 2].abs() <= 2 * FARTHEST).all(dim=1) & (inside.float().mean(dim=(1, 2, 3)) > 0.5)
        chosen = ((left < NEEDED * most) & near).view(-1, 1, 1)
        return torch.where(chosen, motion, simpler), torch.where(chosen.unsqueeze(3), moved, before)

    rest = _identity(later).expand(later.shape[0], -1, -1)
    motion, moved = better(refined(_searched(*halves, limit), "translation"), rest, earlier)
    return better(refined(motion, "affine"), motion, moved)[0]


def _pairs(clips: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Later and earlier frames, (P, 1, h, w) each, P = B·(T − step): the channels' mean, small and smoothed.

    Unsmoothed noise is much weaker halfway between two pixels than on one, which would pass for motion.
    """
    grey = clips.float().mean(dim=2, keepdim=True).flatten(0, 1)
    grey = functional.avg_pool2d(grey, max(1, round(int(min(clips.shape[-2:])) / WORKING_SIDE)))
    for _ in range(2):
        grey = functional.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    frames = grey.unflatten(0, clips.shape[:2])
    return frames[:, step:].flatten(0, 1), frames[:, :-step].flatten(0, 1)


def _searched(later: Tensor, earlier: Tensor, limit: Tensor) -> Tensor:
    """The translation (P, 2, 3), in whole pixels of half their size, that leaves the least truncated difference."""
    later, earlier = functional.avg_pool2d(later, 2)[:, 0], functional.avg_pool2d(earlier, 2)[:, 0]
    height, width = later.shape[1:]
    rows, columns = int(FARTHEST * height), int(FARTHEST * width)
    around = (columns, columns, rows, rows)

    def windows(frames: Tensor) -> Tensor:  # (…, 2·rows + 1, 2·columns + 1, h, w), a view
        return functional.pad(frames, around).unfold(-2, height, 1).unfold(-2, width, 1)

    seen = windows(later.new_ones(height, width))
    left = ((windows(earlier) - later[:, None, None]).abs_().minimum(limit.unsqueeze(-1)) * seen).sum(dim=(-2, -1))
    best = (left / seen.sum(dim=(-2, -1))).flatten(1).argmin(dim=1)
    across = (best % (2 * columns + 1) - columns) * (2 / width)
    down = (best // (2 * columns + 1) - rows) * (2 / height)
    turn = _identity(later)[:, :2].expand(later.shape[0], -1, -1)
    return torch.cat([turn, torch.stack([across, down], dim=1).unsqueeze(2)], dim=2)


def _aligned(later: Tensor, earlier: Tensor, motion: Tensor, steps: int, kind: str) -> Tensor:
    """Move a motion (P, 2, 3) by Gauss–Newton steps towards what makes the earlier frames (P, 1, h, w) the later."""
    height, width = later.shape[-2:]
    around = functional.pad(later, (1, 1, 1, 1), mode="replicate")
    across = (around[:, :, 1:-1, 2:] - around[:, :, 1:-1, :-2]) * (width / 4)  # a pixel is 2 / width wide
    down = (around[:, :, 2:, 1:-1] - around[:, :, :-2, 1:-1]) * (height / 4)
    x, y = _centres(width, later), _centres(height, later).unsqueeze(1)
    one = later.new_ones(1, height, width)
    basis = torch.cat([x * one, y * one, one]) if kind == "affine" else one
    slopes = torch.cat([across * basis, down * basis], dim=1).flatten(2)  # (P, 6 or 2, h·w)
    steep = across.square() + down.square()
    flat = 1 / (steep + 0.2 * steep.mean(dim=(2, 3), keepdim=True) + 1e-12)
    for _ in range(steps):
        moved, inside = _sample(earlier, motion, (x, y))
        off = moved - later
        far = off.square() * flat  # squared distance that a pixel is from moving along
        usual = (far.sqrt() * inside).sum(dim=(2, 3), keepdim=True) / (inside.sum(dim=(2, 3), keepdim=True) + 1)
        usual = usual.square() + 1e-12
        votes = slopes * (inside * flat * (usual / (usual + far)).square()).flatten(2)
        normal = votes @ slopes.mT  # (P, 6, 6)
        normal.diagonal(dim1=1, dim2=2).mul_(1 + 1e-4).add_(1e-6)
        delta = torch.linalg.solve_ex(normal, votes @ off.flatten(2).mT)[0].unflatten(1, (2, -1)).flatten(2)
        delta = delta if kind == "affine" else functional.pad(delta, (2, 0))
        motion = torch.baddbmm(motion, motion[:, :, :2], delta, alpha=-1)  # after the inverse of a small motion
    return motion


def _sample(frames: Tensor, motion: Tensor, centres: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Frames (P, C, h, w) where a motion (P, 2, 3) leads each place, and whether that lies inside, (P, 1, h, w)."""
    height, width = frames.shape[-2:]
    x, y = centres or (_centres(width, motion), _centres(height, motion).unsqueeze(1))
    along_x, along_y, shift = motion[..., None, None].unbind(2)  # (P, 2, 1, 1) each
    places = along_x * x + (along_y * y + shift)  # (P, 2, h, w); `affine_grid` takes a slow product for it
    moved = functional.grid_sample(frames, places.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    beside, below = places.abs().unbind(1)
    inside = (beside <= 1 - 1 / width + 1e-4) & (below <= 1 - 1 / height + 1e-4)
    return moved, inside.unsqueeze(1)


def _centres(count: int, like: Tensor) -> Tensor:
    """The pixels' centres along one side of a frame, in −1…1 from edge to edge."""
    return (2 * torch.arange(count, device=like.device) + 1) / count - 1


def _identity(like: Tensor) -> Tensor:
    return torch.eye(2, 3, device=like.device)
