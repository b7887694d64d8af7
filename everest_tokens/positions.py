"""Fixed position tables of the VideoMAE family, and how its repositories resample a stored one."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from everest_tokens.selectors import Grid


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """VideoMAE's, over the flat index of the token: even channels sin, odd channels cos. (tokens, width) float32."""
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def sincos_table(positions: int, width: int) -> Tensor:
    """[sin(p·ω), cos(p·ω)] with ω_i = 10000^(−i/(width/2)), i < width/2. (positions, width) float32."""
    if width % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {width}")
    frequency = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def mvd_table(grid: Grid, width: int) -> Tensor:
    """MVD's: a quarter of the channels for the time step, the others for column and row. (N, width) float32."""
    if width % 16:  # quarters and eighths of it are halved once more
        raise ValueError(f"MVD's position table needs a width divisible by 16, got {width}")
    t, h, w = grid
    time, across, down = width // 4, 3 * width // 8, 3 * width // 8
    parts = [
        repeat(sincos_table(t, time), "t d -> (t h w) d", h=h, w=w),
        repeat(sincos_table(w, across), "w d -> (t h w) d", t=t, h=h),
        repeat(sincos_table(h, down), "h d -> (t h w) d", t=t, w=w),
    ]
    return torch.cat(parts, dim=1)


def resample_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """A stored table (old N, D) for another grid, (new N, D): places bicubic in each time step, then time linear."""
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
