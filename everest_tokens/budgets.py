"""Selectors that keep as many tokens of a clip as it needs, so that K differs by clip and a batch runs packed."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from everest_tokens.distances import Distance
from everest_tokens.importance import MeasuresChange, check_grid
from everest_tokens.ranking import stable_order
from everest_tokens.selectors import TokenSelector, static_number
from everest_tokens.tubelets import Grid


class Budget(TokenSelector):
    """A selector whose K differs by clip: forward gives (B, M), each row filled up with N, which is no position.

    Encoders alone take one, and in eager mode: the numbers of tokens have to be known before their shapes are.
    """

    def __init__(self) -> None:
        super(TokenSelector, self).__init__()
        self.settings: dict[str, Any] = {"name": type(self).__name__}

    @property
    def keep_ratio(self) -> Any:
        """None: the share is the clip's own. Setting one is a ValueError."""
        return None

    @keep_ratio.setter
    def keep_ratio(self, value: Any) -> None:
        raise ValueError(f"{self!r} keeps of each clip what it needs, no share of {value!r}: set another selector")

    def num_kept(self, grid: Grid) -> int:
        """M, the most that is kept of one clip of `grid`."""
        return math.prod(grid)


class EnergyBudget(MeasuresChange, Budget):
    """The fewest tokens whose squared importance (Eq. 2) makes up `cover` of the clip's; beyond the paper.

    Importance counts from the least that its distance can give, which is −1 for "cosine" and "cka", so that what stays
    the same has no energy. A static clip has none at all and keeps `min_tokens`. Ties go to the lower index.

    Args:
        cover: share of the clip's sum of squares, in (0, 1].
        min_tokens: the least that is kept of a clip.
        max_tokens: the most; None for all.
        distance, camera: as `ReRoSelector` has them; a callable distance is to be 0 at least.

    Raises:
        ValueError: a setting out of range, or `min_tokens` above `max_tokens`; where it runs, either above N.
    """

    cover = static_number("cover", "a number in (0, 1]", lambda share: 0 < share <= 1)
    min_tokens = static_number("min_tokens", "a whole number of at least 1", lambda count: count >= 1, int)

    def __init__(
        self,
        cover: float = 0.9,
        min_tokens: int = 1,
        max_tokens: int | None = None,
        distance: str | Distance = "l2",
        camera: str = "ignore",
    ) -> None:
        super().__init__()
        self.cover = cover
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.distance = distance
        self.camera = camera

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that are kept of a clip; None for all."""
        return self.settings["max_tokens"]

    @max_tokens.setter
    def max_tokens(self, value: int | None) -> None:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and value >= self.min_tokens):
            raise ValueError(f"max_tokens must be None or at least min_tokens {self.min_tokens}, got {value!r}")
        self.settings["max_tokens"] = None if value is None else int(value)

    def num_kept(self, grid: Grid) -> int:
        """M for one clip of `grid`. Raises ValueError where it is more than N, or less than `min_tokens`."""
        total = math.prod(grid)
        most = total if self.max_tokens is None else self.max_tokens
        if not self.min_tokens <= most <= total:
            raise ValueError(
                f"expected 1 ≤ min_tokens ≤ max_tokens ≤ {total}, the tokens of grid {grid}, got {self.min_tokens} and"
                f" {self.max_tokens}"
            )
        return most

    @torch.no_grad()
    def forward(self, tokens: Tensor, grid: Grid, previous: Tensor | None = None) -> Tensor:
        """(B, N, D) → kept indices, ascending, then N: (B, M) int64. Raises as `importance` and `num_kept` do."""
        most, total = self.num_kept(grid), math.prod(grid)
        least = -1.0 if self.distance in ("cosine", "cka") else 0.0
        energy = (self.compared(tokens, grid, previous).double() - least).clamp(min=0).square()  # (B, N)
        order = stable_order(energy, descending=True)
        covered = energy.gather(1, order).cumsum(dim=1)
        enough = self.cover * (1 - 1e-12) * covered[:, -1:]  # for the decimal that cover was meant to be
        kept = (covered < enough).sum(dim=1, keepdim=True) + 1  # (B, 1)
        rank = torch.arange(most, device=tokens.device)
        return order[:, :most].masked_fill(rank >= kept.clamp(self.min_tokens, most), total).sort(dim=1).values


class RunLengthSelector(Budget):
    """Run-length tokenisation (RLT; Choudhury et al., "Don't Look Twice", 2024): what stays the same is kept once.

    A token is dropped where its pixels are those of its place one time step earlier: the last frame of its tubelet and
    the first of the tubelet before differ by no more than `threshold`, the mean of |a − b| over the patch and its
    channels. The first step's tokens are all kept. How long each run is, which RLT can add to the embedding of the
    token that stands for it, isn't encoded here.

    Args:
        threshold: in pixels' units as the model takes them, normalised by ImageNet's mean and deviation in RLT.

    Raises:
        ValueError: a threshold that is negative or infinite, which JSON doesn't know.
    """

    threshold = static_number("threshold", "a finite number of at least 0", lambda value: 0 <= value < math.inf)
    takes_frames = True

    def __init__(self, threshold: float = 0.1) -> None:
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, tokens: Tensor, grid: Grid, frames: Tensor) -> Tensor:
        """Kept indices, ascending, then N.

        Args:
            tokens: (B, N, D), of which nothing but the number is looked at.
            frames: (B, T, C, H, W), the clips' pixels; T, H and W multiples of the grid's.

        Returns:
            (B, N) int64.
        """
        check_grid(tokens, grid)
        t, h, w = grid
        if frames.ndim != 5 or frames.shape[1] % t or frames.shape[3] % h or frames.shape[4] % w:
            raise ValueError(f"expected frames (B, T, C, H, W) of grid {grid}, got {tuple(frames.shape)}")
        tubelet = frames.shape[1] // t
        later, earlier = frames[:, 2 * tubelet - 1 :: tubelet], frames[:, :-tubelet:tubelet]  # (B, t − 1, C, H, W)
        change = (later.float() - earlier.float()).abs().mean(dim=2)
        change = change.unflatten(3, (w, -1)).unflatten(2, (h, -1)).mean(dim=(3, 5)).flatten(1)  # (B, (t − 1)·h·w)
        position = torch.arange(t * h * w, device=tokens.device).expand(tokens.shape[0], -1)
        stays = torch.nn.functional.pad(change > self.threshold, (h * w, 0), value=True)
        return position.masked_fill(~stays, t * h * w).sort(dim=1).values
