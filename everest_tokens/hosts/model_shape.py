"""What a host tells `count_flops` of its model: multiply–accumulates by token, no tensors."""

from __future__ import annotations

import math
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
    layers = (layer for module in modules for name, layer in module.named_modules() if _runs(name))
    return sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def projection_macs(projection: nn.Module) -> int:
    """Multiply–accumulates of a patch or tubelet embedding for one of its tokens, adapters included.

    A Sequential of convolutions is counted by the places that each of them has: more, the earlier it comes (Table 15).
    """
    if isinstance(projection, nn.Sequential):
        total, places = 0, 1
        for layer in reversed(projection):
            total += places * projection_macs(layer)
            places *= math.prod(getattr(layer, "stride", (1,)))
        return total
    layers = (layer for name, layer in projection.named_modules() if _runs(name))
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, (nn.Conv2d, nn.Conv3d)))


def _runs(name: str) -> bool:
    """PEFT's `modules_to_save` keeps a module that a trained copy stands in for."""
    return "original_module" not in name.split(".")


def blocks_of(blocks: Iterable[nn.Module], attention_widths: Iterable[int]) -> Blocks:
    """A stack whose tokens all pass through every linear layer of every block."""
    return Blocks(linear_macs(*blocks), sum(attention_widths))


@dataclass(frozen=True)
class ModelShape:
    """A video transformer over clips of `grid`.

    Attributes:
        projection: multiply–accumulates of the tubelet embedding for one tubelet.
        width: channels of a token.
        prefix: class and register tokens, which the encoder always sees.
        bridge: of encoder_to_decoder, for each visible token.
        decoder: None outside pre-training.
        head_per_token: of the pixel head for each target, or of an attention pooling for each token.
        head_per_clip: of the classifier and of what else sees the clip once.
        head_drops_prefix: whether the pooling leaves class and register tokens out.
    """

    grid: Grid
    projection: int
    width: int
    encoder: Blocks
    prefix: int = 0
    bridge: int = 0
    decoder: Blocks | None = None
    head_per_token: int = 0
    head_per_clip: int = 0
    head_drops_prefix: bool = False
