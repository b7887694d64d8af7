"""Stochastic depth in blocks that have a place for it, set for as long as a model is patched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

_NAMES = ("drop_path", "drop_path1", "drop_path2")


def check_stochastic_depth(blocks: Sequence[nn.Module], drop_path: float) -> None:
    """Raise ValueError where `drop_path` is asked for and a block has no place for it."""
    for block in blocks if drop_path else ():
        if not any(hasattr(block, name) for name in _NAMES):
            raise ValueError(f"drop_path={drop_path}: {type(block).__qualname__} has no stochastic depth of its own")


def set_stochastic_depth(blocks: Sequence[Any], drop_path: float) -> None:
    """Rates that rise linearly from 0 at the first block to `drop_path` at the last (Table 8)."""
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist(), strict=True):
        block._everest_drop_paths = {name: getattr(block, name) for name in _NAMES if hasattr(block, name)}
        for name in block._everest_drop_paths:
            setattr(block, name, DropPath(rate).train(block.training))


def restore_stochastic_depth(blocks: Sequence[nn.Module]) -> None:
    """Undo `set_stochastic_depth`, where it was called."""
    for block in blocks:
        for name, module in block.__dict__.pop("_everest_drop_paths", {}).items():
            setattr(block, name, module.train(block.training))
