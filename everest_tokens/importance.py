"""How much each token changed: importance (paper §4.1, Eq. 2), for every selector that goes by it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.distances import DISTANCES, Distance
from everest_tokens.tubelets import Grid


def check_grid(tokens: Tensor, grid: Grid) -> None:
    """Raise ValueError unless tokens are (B, t·h·w, D)."""
    t, h, w = grid
    if tokens.ndim != 3 or tokens.shape[1] != t * h * w:
        raise ValueError(f"expected tokens (B, {t * h * w}, D) for grid {grid}, got {tuple(tokens.shape)}")


class MeasuresChange(nn.Module):
    """The part of a selector that scores tokens by Eq. 2: with which distance, and what is the camera's."""

    settings: dict[str, Any]

    @property
    def distance(self) -> str | Distance:
        """S of Eq. 2: a name of `distances.DISTANCES`, or a callable."""
        return self._callable or self.settings["distance"]

    @distance.setter
    def distance(self, value: str | Distance) -> None:
        if not callable(value) and not (isinstance(value, str) and value in DISTANCES):
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)} or a callable, got {value!r}")
        self._modules.pop("_callable", None)  # a module set earlier, which nothing but a module could replace
        self._callable = value if callable(value) else None
        self.settings["distance"] = "custom" if callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distance":  # nn.Module would take a module for a submodule before it looks for the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def camera(self) -> str:
        """Whether the camera's motion is taken out of the change: "ignore" or "compensate"."""
        return self.settings["camera"]

    @camera.setter
    def camera(self, value: str) -> None:
        if value not in ("ignore", "compensate"):
            raise ValueError(f"camera must be 'ignore' or 'compensate', got {value!r}")
        self.settings["camera"] = value

    @torch.no_grad()
    def importance(self, tokens: Tensor, grid: Grid, previous: Tensor | None = None) -> Tensor:
        """I of Eq. 2, in float32 under autocast too and without grad.

        Tokens of the first time step have no predecessor and take the importance of the same place at the second.

        Args:
            tokens: (B, N, D), embeddings before the position embedding.
            grid: (t, h, w) with t ≥ 2.
            previous: (B, N, D), what each token is compared with: the embedding of what its place showed one step
                earlier, the camera's motion undone. The first step's are not looked at. Without it the tokens
                of the step before, k_{i−1,j} of Eq. 2.

        Returns:
            (B, N) float32, larger where more changed.

        Raises:
            ValueError: the tokens don't fit the grid, or it has fewer than two time steps, or `previous` isn't of the
                tokens' shape.
        """
        check_grid(tokens, grid)
        if previous is not None and previous.shape != tokens.shape:
            raise ValueError(f"expected previous of the tokens' {tuple(tokens.shape)}, got {tuple(previous.shape)}")
        t, h, w = grid
        if t < 2:
            raise ValueError(f"importance compares time steps: expected at least 2, got grid {grid}")
        steps = tokens.detach().unflatten(1, (t, h * w))  # (B, t, h·w, D)
        later = steps[:, 1:]
        earlier = steps[:, :-1] if previous is None else previous.detach().unflatten(1, (t, h * w))[:, 1:]
        if self._callable is None:
            change = DISTANCES[self.settings["distance"]](later, earlier)  # (B, t - 1, h·w)
        else:  # may hold products that autocast would lower; the meta device knows no autocast
            with nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False):
                change = self._callable(later.float(), earlier.float()).float()
        if change.shape != later.shape[:-1]:
            raise ValueError(f"distance must return {tuple(later.shape[:-1])}, got {tuple(change.shape)}")
        return torch.cat([change[:, :1], change], dim=1).flatten(1)

    def compared(self, tokens: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        """`importance`, which a subclass may define of tokens and grid alone."""
        return self.importance(tokens, grid) if previous is None else self.importance(tokens, grid, previous)
