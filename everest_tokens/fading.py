"""How dropped tokens are drawn: grey, faded until luminance alone tells them from kept ones, edged where they meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

CONTRAST = 3.0  # WCAG 2's least for graphics, (L1 + 0.05) / (L2 + 0.05) of relative luminances
VERMILION = torch.tensor((0.835, 0.369, 0.0))  # of Okabe and Ito: all readers tell it from grey, in grey too
_LUMA = torch.tensor((0.2126, 0.7152, 0.0722))
_SHARES, _EDGES = [number / 100 for number in range(30, -1, -1)], (0.1, 0.05)


class Fade(NamedTuple):
    """Draws a dropped token's grey g in [0, 1] as end + share · (g − end), with edges of that share of its sides."""

    end: float  # 0 for black, 1 for white
    share: float
    edge: float = _EDGES[0]

    def __call__(self, grey: Tensor) -> Tensor:
        return self.end + self.share * (grey - self.end)


def luminance(pixels: Tensor) -> Tensor:
    """Relative luminance of sRGB, (…, 3, H, W) in [0, 1] → (…, H, W)."""
    return torch.einsum("...chw,c->...hw", _linear(pixels), _LUMA)


def contrast(frames: Tensor, kept: Sequence[Tensor], fade: Fade) -> float:
    """Least contrast of mean luminances: kept tokens to dropped ones, and all pixels as they are to all faded."""
    return _least(_cases(frames, kept, fade.edge), fade)


def choose_fade(frames: Tensor, kept: Sequence[Tensor]) -> Fade:
    """Fade towards white on dark clips and towards black on light ones, no further than a contrast of 3:1 asks for.

    Dark is what stands out more from white than from black, for most of its pixels. Where 3:1 can't be had in that
    direction it is the other one, if that has more, and where edges take too much of it they are thinner. It can't be
    had at all where the kept tokens are on average darker than 0.1 and the clip lighter than 0.3, or the other way
    round, nor at a luminance near 0.25 where more than a fifth of what is dropped are edges all the same.

    Args:
        frames: (T, 3, H, W) in [0, 1].
        kept: (t, h, w) bool, of each of the selections that are drawn alike; T is a multiple of t.
    """
    dark = (luminance(frames) + 0.05).log().mean() < math.log(1.05 * 0.05) / 2  # the middle of white's and black's
    found = []
    for edge in _EDGES:
        cases = _cases(frames, kept, edge)
        for end in (1.0, 0.0) if dark else (0.0, 1.0):
            for share in _SHARES:
                found.append((_least(cases, fade := Fade(end, share, edge)), fade))
                if found[-1][0] >= 1.05 * CONTRAST:  # codecs and palettes take a little
                    return fade
    return max(found, key=itemgetter(0))[1]


def overlay(frames: Tensor, kept: Tensor, fade: Fade) -> Tensor:
    """Leave the kept tokens of frames as they are, fade the others, and edge these in vermilion where they meet.

    Args:
        frames: (T, 3, H, W) in [0, 1], T a multiple of t.
        kept: (t, h, w) bool.
    """
    mask, edge = _masks(frames, kept, fade.edge)
    faded = torch.where(edge, VERMILION[:, None, None], fade(_grey(frames)))
    return torch.where(mask, frames, faded)


def _masks(frames: Tensor, kept: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(T, 1, H, W) bool: kept pixels, and dropped ones beside them."""
    size = frames.shape[-2:]
    mask = interpolate(kept[:, None].float(), size, mode="nearest-exact")
    width = min(max(round(share * min(size[0] / kept.shape[1], size[1] / kept.shape[2])), 1), 4)
    edge = max_pool2d(mask, 2 * width + 1, stride=1, padding=width) - mask
    times = len(frames) // len(kept)
    return mask.bool().repeat_interleave(times, 0), edge.bool().repeat_interleave(times, 0)


def _grey(frames: Tensor) -> Tensor:
    return torch.einsum("tchw,c->thw", frames, _LUMA)[:, None]


def _linear(values: Tensor) -> Tensor:
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _cases(frames: Tensor, kept: Sequence[Tensor], edge: float) -> list[tuple[float, Tensor, float]]:
    """(Mean luminance of what is kept, 256 shares of greys of what is dropped, share of it that edges take).

    For each selection its own kept and dropped tokens, then all pixels against themselves, with the most edges.
    """
    light, grey = luminance(frames), _grey(frames)[:, 0]

    def greys(pixels: Tensor) -> Tensor:
        return torch.histc(pixels, 256, 0, 1) / max(pixels.numel(), 1)

    cases, most = [], 0.0
    for each in kept:
        mask, border = (part[:, 0] for part in _masks(frames, each, edge))
        if mask.any() and not mask.all():
            edges = (border.sum() / (~mask).sum()).item()
            cases.append((light[mask].mean().item(), greys(grey[~(mask | border)]), edges))
            most = max(most, edges)
    return [*cases, (light.mean().item(), greys(grey), most)]


def _least(cases: list[tuple[float, Tensor, float]], fade: Fade) -> float:
    drawn, edge = _linear(fade((torch.arange(256) + 0.5) / 256)), luminance(VERMILION[:, None, None]).item()
    found = []
    for kept, greys, edges in cases:
        dropped = (1 - edges) * (greys @ drawn).item() + edges * edge
        ratio = (dropped + 0.05) / (kept + 0.05)
        found.append(ratio if fade.end else 1 / ratio)
    return min(found)
