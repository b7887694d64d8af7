"""Which tokens of a clip are kept: redundancy-robust selection (paper §4.1, Eq. 2) and its baselines.

A selector maps token embeddings (B, N, D) of a grid (t, h, w), N = t·h·w and t-major, to the kept indices (B, K),
int64 and ascending. It has neither parameters nor buffers, so that it changes no state dict, and it knows no model.
K depends on the grid alone: shapes stay static and every clip of a batch keeps equally many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from everest_tokens.distances import Distance
from everest_tokens.importance import MeasuresChange, check_grid
from everest_tokens.ranking import stable_order
from everest_tokens.tubelets import Grid

Selector = Callable[[Tensor, Grid], Tensor]


def floor_of(ratio: float, count: int) -> int:
    """⌊ratio·count⌋ for the decimal that `ratio` was meant to be: 0.29 of 100 is 29, although 0.29 * 100 < 29."""
    return math.floor(ratio * count + 1e-9)


def static_number(
    name: str, expected: str, valid: Callable[[Any], bool], kind: type = float, instead_of: str | None = None
) -> Any:
    """A number that shapes follow from, as a property over the owner's `settings`.

    Kept as text beside `settings`: torch.compile takes a float that changed once for a symbol, and the number of kept
    tokens with it; a text is a constant, so that each new value compiles once, into static shapes.

    Args:
        kind: float or int.
        instead_of: another such property, which is None from the moment this one is set.
    """
    text = f"_{name}_text"

    def get(self: Any) -> Any:
        held = getattr(self, text)
        return None if held is None else kind(held)

    def set_(self: Any, value: Any) -> None:
        number = Integral if kind is int else Real
        if isinstance(value, bool) or not isinstance(value, number) or not valid(kind(value)):
            raise ValueError(f"{name} must be {expected}, got {value!r}")
        setattr(self, text, repr(kind(value)))
        self.settings[name] = kind(value)
        if instead_of is not None:
            setattr(self, f"_{instead_of}_text", None)
            self.settings[instead_of] = None

    return property(get, set_)


def shuffled(batch: int, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Independent random permutations of 0…count−1. Returns (batch, count) int64 on `device`."""
    if generator is None:
        return torch.rand(batch, count, device=device).argsort(dim=1)
    return torch.rand(batch, count, device=generator.device, generator=generator).argsort(dim=1).to(device)


class TokenSelector(nn.Module):
    """What our selectors share: a keep ratio that is checked when it is set, and settings that JSON can hold.

    `settings` mirrors the attributes, which are what to set; `config.everest` holds this very dict, so that what
    `save_pretrained` writes is the live state.
    """

    random: ClassVar[bool] = False  # whether forward draws, and so takes `generator=`
    takes_frames: ClassVar[bool] = False  # whether it goes by pixels, and so takes `frames=`
    # ρ_pre of the paper
    keep_ratio = static_number("keep_ratio", "a number in (0, 1]", lambda ratio: 0 < ratio <= 1)

    def __init__(self, keep_ratio: float) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"name": type(self).__name__}
        self.keep_ratio = keep_ratio

    def num_kept(self, grid: Grid) -> int:
        """K for one clip of `grid`. Raises ValueError where nothing would be left."""
        kept = self._count(grid)
        if kept < 1:
            raise ValueError(f"keep_ratio {self.keep_ratio} leaves no token of grid {grid} ({math.prod(grid)} tokens)")
        return kept

    def _count(self, grid: Grid) -> int:
        return floor_of(self.keep_ratio, math.prod(grid))

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.settings.items() if key != "name")


class ReRoSelector(MeasuresChange, TokenSelector):
    """Redundancy-robust selection: the ⌊ρ_pre·N⌋ most changed tokens of the clip (Eq. 2).

    They are taken over the whole clip: a frame may keep all of its tokens or none. Ties go to the lower index, so that
    a static clip too has one well-defined answer.

    Args:
        keep_ratio: ρ_pre, in (0, 1]; the paper uses 0.3 in pre-training, 0.6 in fine-tuning (Tables 7 and 8). 0.3 where
            neither this nor `keep_tokens` is given.
        distance: S of Eq. 2: "l2" (the paper's), "l1", "cosine", "cka" (Table 9), or a callable (a, b) → (...,) of
            two float32 tensors (..., D).
        descending: False keeps the least changed tokens instead (Table 16).
        anchor: beyond the paper: "first" or "middle" (step ⌊t/2⌋) keeps all tokens of that time step, what never moves
            too, and fills up K with the most changed tokens of the other steps.
        keep_tokens: K itself instead of a share of N, so that long and short clips cost the encoder the same. Setting
            it or `keep_ratio` later clears the other.
        camera: beyond the paper: "compensate" scores a token against what its place showed one step earlier as the
            camera saw it then (camera.py), which a patched model works out; "ignore", the paper's, against the token at
            the same place.

    Raises:
        ValueError: a setting out of range, or both `keep_ratio` and `keep_tokens`.
    """

    keep_ratio = static_number(
        "keep_ratio", "a number in (0, 1]", lambda ratio: 0 < ratio <= 1, instead_of="keep_tokens"
    )
    keep_tokens = static_number(
        "keep_tokens", "a whole number of at least 1", lambda count: count >= 1, int, instead_of="keep_ratio"
    )

    def __init__(
        self,
        keep_ratio: float | None = None,
        distance: str | Distance = "l2",
        descending: bool = True,
        anchor: str | None = None,
        keep_tokens: int | None = None,
        camera: str = "ignore",
    ) -> None:
        if keep_ratio is not None and keep_tokens is not None:
            raise ValueError(f"expected keep_ratio or keep_tokens, got both: {keep_ratio!r} and {keep_tokens!r}")
        super().__init__(0.3 if keep_ratio is None else keep_ratio)
        if keep_tokens is not None:
            self.keep_tokens = keep_tokens
        self.distance = distance
        self.descending = descending
        self.anchor = anchor
        self.camera = camera

    @property
    def descending(self) -> bool:
        """True keeps the most changed tokens, False the least changed."""
        return self.settings["descending"]

    @descending.setter
    def descending(self, value: bool) -> None:
        self.settings["descending"] = bool(value)

    @property
    def anchor(self) -> str | None:
        """The time step that is kept whole: "first", "middle", or None."""
        return self.settings["anchor"]

    @anchor.setter
    def anchor(self, value: str | None) -> None:
        if value not in (None, "first", "middle"):
            raise ValueError(f"anchor must be None, 'first' or 'middle', got {value!r}")
        self.settings["anchor"] = value

    def num_kept(self, grid: Grid) -> int:
        """K for one clip of `grid`. Raises ValueError where it is none, more than N, or no more than the anchor's."""
        count, area, total = self._count(grid), grid[1] * grid[2], math.prod(grid)
        if count > total:
            raise ValueError(f"keep_tokens {count} is more than the {total} tokens of grid {grid}")
        if self.anchor is not None and count <= area:
            least = math.ceil(1e4 * (area + 1) / total) / 1e4
            size = f"{count} tokens, keep_{'tokens' if self.keep_ratio is None else f'ratio {self.keep_ratio}'}"
            raise ValueError(
                f"anchor={self.anchor!r} keeps the {area} tokens of a whole time step of grid {grid}, and {size},"
                f" leaves none for the others: expected keep_ratio of at least {least:g}, or keep_tokens {area + 1}"
            )
        return super().num_kept(grid)

    def _count(self, grid: Grid) -> int:
        return super()._count(grid) if self.keep_tokens is None else self.keep_tokens

    def forward(self, tokens: Tensor, grid: Grid, previous: Tensor | None = None) -> Tensor:
        """(B, N, D) → kept indices (B, K), int64, ascending. Raises as `importance` and `num_kept` do."""
        kept = self.num_kept(grid)
        score = self.compared(tokens, grid, previous)
        if self.anchor is not None:
            score = self._with_anchor(score, grid)
        return self._top(score, kept)

    def most_changed(self, tokens: Tensor, candidates: Grid, grid: Grid, previous: Tensor | None = None) -> Tensor:
        """The tokens by which candidate steps are told apart (§4.2): as many a step as `forward` keeps, no anchor.

        Args:
            tokens: (B, N, D) of the candidate clip.
            candidates: (⌊α·τ⌋, h, w).
            grid: (τ, h, w).
            previous: as in `importance`.

        Returns:
            (B, K) int64, ascending.
        """
        fixed = self.keep_tokens
        kept = super().num_kept(candidates) if fixed is None else fixed * candidates[0] // grid[0]
        return self._top(self.compared(tokens, candidates, previous), kept)

    def _with_anchor(self, score: Tensor, grid: Grid) -> Tensor:
        """(B, N) → the same, the anchor's tokens ranked before anything that is finite or not."""
        step = 0 if self.anchor == "first" else grid[0] // 2
        finite, first = torch.finfo(score.dtype).max, math.inf if self.descending else -math.inf
        by_step = score.clamp(-finite, finite).unflatten(1, (grid[0], -1))
        here = torch.arange(grid[0], device=score.device).unsqueeze(1) == step
        return by_step.masked_fill(here, first).flatten(1)

    def _top(self, score: Tensor, kept: int) -> Tensor:
        return stable_order(score, self.descending)[:, :kept].sort(dim=1).values


class RandomSelector(TokenSelector):
    """⌊keep_ratio·N⌋ tokens drawn at random, as in ST-MAE (Feichtenhofer et al., 2022)."""

    random = True

    def forward(self, tokens: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """(B, N, D) → kept indices (B, K), int64, ascending."""
        check_grid(tokens, grid)
        order = shuffled(tokens.shape[0], math.prod(grid), tokens.device, generator)
        return order[:, : self.num_kept(grid)].sort(dim=1).values


class TubeSelector(TokenSelector):
    """The same random places in every time step, as in VideoMAE (Tong et al., 2022).

    VideoMAE hides ⌊(1 − keep_ratio)·h·w⌋ places; the others are kept: 20 of 196, so 160 of 1568 tokens at 0.1.
    """

    random = True

    def _count(self, grid: Grid) -> int:
        t, h, w = grid
        return t * (h * w - floor_of(1 - self.keep_ratio, h * w))

    def forward(self, tokens: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """(B, N, D) → kept indices (B, K), int64, ascending."""
        check_grid(tokens, grid)
        t, h, w = grid
        order = shuffled(tokens.shape[0], h * w, tokens.device, generator)
        places = order[:, : self.num_kept(grid) // t].sort(dim=1).values  # (B, K / t)
        steps = torch.arange(t, device=tokens.device) * (h * w)
        return (steps[None, :, None] + places[:, None, :]).flatten(1)


class RunningCellSelector(TokenSelector):
    """2×2 cells whose kept places run on by one a time step, as in MAR (Qing et al., 2023) and VideoMAE V2.

    Place p (row-major) of every cell is kept at step i where (p + i + phase) mod 4 < 4·keep_ratio; the phase is drawn
    for each clip.

    Args:
        keep_ratio: ¼, ½ or ¾, else a ValueError.
    """

    random = True

    keep_ratio = static_number(
        "keep_ratio", "0.25, 0.5 or 0.75, whole places of a cell", (0.25, 0.5, 0.75).__contains__
    )

    def _count(self, grid: Grid) -> int:
        t, h, w = grid
        if h % 2 or w % 2:
            raise ValueError(f"2×2 running cells need an even height and width, got grid {grid}")
        return round(self.keep_ratio * t * h * w)

    def forward(self, tokens: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """(B, N, D) → kept indices (B, K), int64, ascending. Raises ValueError for an odd height or width."""
        check_grid(tokens, grid)
        kept = self.num_kept(grid)
        t, h, w = grid
        device = tokens.device
        phase = shuffled(tokens.shape[0], 4, device, generator)[:, :1]  # (B, 1), uniform over 0…3
        step = torch.arange(t, device=device)[:, None, None]
        row = torch.arange(h, device=device)[:, None] % 2
        column = torch.arange(w, device=device) % 2
        position = (step + 2 * row + column).flatten()  # (N,)
        dropped = (position + phase) % 4 >= round(4 * self.keep_ratio)  # (B, N), K of them False in every row
        return stable_order(dropped.byte())[:, :kept]
