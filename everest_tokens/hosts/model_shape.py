"""What a host tells `count_flops` of its model: multiply–accumulates by token, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from everest_tokens.selectors import Grid


@dataclass(frozen=True)
class Blocks:
    """A stack of transformer blocks.

    Attributes:
        linear: multiply–accumulates of its linear layers for one token.
        attention: channels of all heads, summed over the blocks: what each pair of tokens costs twice.
    """

    linear: int
    attention: int

    def macs(self, tokens: int) -> int:
        """The linear layers and the two attention products."""
        return self.linear * tokens + 2 * self.attention * tokens**2


def linear_macs(*modules: nn.Module) -> int:
    """Multiply–accumulates for one token of all linear layers in `modules`, adapters included."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def blocks_of(blocks: Iterable[nn.Module], attention_widths: Iterable[int]) -> Blocks:
    """A stack whose tokens all pass through every linear layer of every block."""
    return Blocks(linear_macs(*blocks), sum(attention_widths))


@dataclass(frozen=True)
class ModelShape:
    """A video transformer over clips of `grid`.

    Attributes:
        patch: values of one tubelet, C·frames·height·width.
        width: channels of a token.
        prefix: class and register tokens, which the encoder always sees.
        bridge: of encoder_to_decoder, for each visible token.
        decoder: None outside pre-training.
        head_per_token: of the pixel head for each target, or of an attention pooling for each token.
        head_per_clip: of the classifier and of what else sees the clip once.
        head_drops_prefix: whether the pooling leaves class and register tokens out.
    """

    grid: Grid
    patch: int
    width: int
    encoder: Blocks
    prefix: int = 0
    bridge: int = 0
    decoder: Blocks | None = None
    head_per_token: int = 0
    head_per_clip: int = 0
    head_drops_prefix: bool = False
