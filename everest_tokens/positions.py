"""Fixed tables that models of the family add to their tokens: how they are computed, resampled and kept on a device."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from everest_tokens.tubelets import Grid


class ConstantTable:
    """Hold a constant tensor and its copies on the devices in use: each is copied there once, not at every step.

    Not a buffer: buffers follow the model's dtype, DDP broadcasts them at every step, and they add to what a model
    reports as its own. Copying from the host at every forward instead would stall an accelerator.
    """

    def __init__(self, value: Tensor, device: torch.device) -> None:
        self.value = value.detach()
        self._copies = {device: self.value.to(device)}

    def to(self, device: torch.device) -> Tensor:
        """Give the constant on `device`."""
        if device in self._copies:
            return self._copies[device]
        copy = self.value.to(device)
        if not torch.compiler.is_compiling():  # a graph must not keep what it computes
            self._copies[device] = copy
        return copy


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """Compute VideoMAE's over the flat index n of the token, (tokens, width) float32.

    Channels 2i and 2i + 1 are the sine and the cosine of n · 10000^(−2i/width).
    """
    angle = _angles(tokens, width)
    return torch.stack([angle.sin().float(), angle.cos().float()], dim=2).flatten(1)[:, :width]


def sincos_table(positions: int, width: int) -> Tensor:
    """Compute [sin(p·ω), cos(p·ω)] with ω_i = 10000^(−i/(width/2)), i < width/2, (positions, width) float32."""
    if width % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {width}")
    angle = _angles(positions, width)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def _angles(positions: int, width: int) -> Tensor:
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    return torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequency


def mvd_table(grid: Grid, width: int) -> Tensor:
    """Compute MVD's, a quarter of the channels for the time step, the others for column and row, (N, width) float32."""
    if width % 16:  # quarters and eighths of it are halved once more
        raise ValueError(f"MVD's position table needs a width divisible by 16, got {width}")
    t, h, w = grid
    time, place = width // 4, 3 * width // 8
    parts = [
        repeat(sincos_table(t, time), "t d -> (t h w) d", h=h, w=w),
        repeat(sincos_table(w, place), "w d -> (t h w) d", t=t, h=h),
        repeat(sincos_table(h, place), "h d -> (t h w) d", t=t, w=w),
    ]
    return torch.cat(parts, dim=1)


def resample_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample a table (old N, D) for another grid, (new N, D): places bicubic in each time step, then time linear."""
    if math.prod(old) != table.shape[0]:
        raise ValueError(f"a position table for grid {old} has {math.prod(old)} rows, got {table.shape[0]}")
    if old[1:] != new[1:]:
        places = rearrange(table, "(t h w) d -> t d h w", t=old[0], h=old[1])
        places = torch.nn.functional.interpolate(places, size=new[1:], mode="bicubic", align_corners=False)
        table = rearrange(places, "t d h w -> (t h w) d")
    if old[0] != new[0]:
        steps = rearrange(table, "(t p) d -> p d t", t=old[0])
        table = rearrange(torch.nn.functional.interpolate(steps, size=new[0], mode="linear"), "p d t -> (t p) d")
    return table
