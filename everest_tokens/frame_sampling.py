"""Information-intensive frame selection: which time steps of a longer clip to train on (paper §4.2, Figure 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everest_tokens.ranking import stable_order
from everest_tokens.selectors import floor_of, static_number


class InfoFrameSampler:
    """Draws τ of ⌊α·τ⌋ candidate time steps, a step with more redundancy-robust tokens being likelier.

    A time step is what one tubelet spans: `tubelet_size` frames, the pair 2i, 2i + 1 of the paper.

    Args:
        alpha: α > 1, how many times more candidates than steps; the paper's best is 1.5 (Table 13).
    """

    alpha = static_number("alpha", "a number above 1", lambda alpha: 1 < alpha < float("inf"))

    def __init__(self, alpha: float = 1.5) -> None:
        self.settings: dict[str, Any] = {"name": type(self).__name__}
        self.alpha = alpha

    def num_candidates(self, num_steps: int) -> int:
        """⌊α·τ⌋ for τ = num_steps. Raises ValueError where that leaves nothing to choose from."""
        candidates = floor_of(self.alpha, num_steps)
        if candidates <= num_steps:
            raise ValueError(
                f"alpha {self.alpha} gives {candidates} candidates for {num_steps} time steps: "
                f"expected alpha of at least {(num_steps + 1) / num_steps:.4g}"
            )
        return candidates

    def __call__(self, counts: Tensor, num_steps: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw without replacement, step i with probability c_i / Σc among the steps that are left.

        Steps with c_i = 0 come only once every other step is drawn, and then uniformly.

        Args:
            counts: (B, ⌊α·τ⌋), c_i, kept tokens of each candidate step.
            num_steps: τ.

        Returns:
            (B, τ) int64 candidate steps, ascending (temporal order).

        Raises:
            ValueError: counts is not 2-D or has fewer than τ columns.
        """
        self._check(counts, num_steps)
        # Taking the largest log c_i + Gumbel noise is sequential drawing without replacement (Gumbel-top-k trick,
        # Kool et al., 2019). Empty steps start 200 lower, below anything that noise in [-4.6, 17] can reach.
        device = counts.device if generator is None else generator.device
        uniform = torch.rand(counts.shape, device=device, generator=generator).to(counts.device)
        gumbel = -(-uniform.clamp_min(torch.finfo(torch.float32).tiny).log()).log()
        score = torch.where(counts > 0, counts.float().log(), -200.0) + gumbel
        return score.argsort(dim=1, descending=True)[:, :num_steps].sort(dim=1).values

    def most_probable(self, counts: Tensor, num_steps: int) -> Tensor:
        """The τ steps with the largest counts, ties to the earlier: what evaluation uses. As `__call__` otherwise."""
        self._check(counts, num_steps)
        return stable_order(counts, descending=True)[:, :num_steps].sort(dim=1).values

    @staticmethod
    def _check(counts: Tensor, num_steps: int) -> None:
        if counts.ndim != 2 or not 1 <= num_steps <= counts.shape[1]:
            raise ValueError(f"expected counts (B, at least {num_steps}), got {tuple(counts.shape)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha})"
