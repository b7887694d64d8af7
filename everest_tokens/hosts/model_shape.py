"""What a host tells `count_flops` of its model: widths and depths, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from everest_tokens.selectors import Grid


@dataclass(frozen=True)
class Blocks:
    """A stack of transformer blocks: `depth` blocks of `width` channels with an MLP of `hidden`."""

    depth: int
    width: int
    hidden: int

    def macs(self, tokens: int) -> int:
        """Query, key, value and output projections, the two attention products, and the MLP."""
        attention = 4 * tokens * self.width**2 + 2 * tokens**2 * self.width
        return self.depth * (attention + 2 * tokens * self.width * self.hidden)


@dataclass(frozen=True)
class ModelShape:
    """A video transformer over clips of `grid`.

    Attributes:
        patch: values of one tubelet, C·frames·height·width.
        decoder: None outside pre-training.
        outputs: what the head puts out, for each target token (decoder) or for the clip; 0 without a head.
    """

    grid: Grid
    patch: int
    encoder: Blocks
    decoder: Blocks | None
    outputs: int
