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
    for block, rate in zip(blocks, _rates(drop_path, len(blocks)), strict=True):
        block._everest_drop_paths = {name: getattr(block, name) for name in _NAMES if hasattr(block, name)}
        for name in block._everest_drop_paths:
            setattr(block, name, DropPath(rate).train(block.training))


def restore_stochastic_depth(blocks: Sequence[nn.Module]) -> None:
    """Undo `set_stochastic_depth`, where it was called."""
    for block in blocks:
        for name, module in block.__dict__.pop("_everest_drop_paths", {}).items():
            setattr(block, name, module.train(block.training))


def add_drop_path(branch_ends: Sequence[Sequence[Any]], drop_path: float) -> None:
    """The same rates for blocks without a place of their own, behind the dropout that ends their branches."""
    for rate, ends in zip(_rates(drop_path, len(branch_ends)), branch_ends, strict=True):
        for module in ends:
            module.dropout = nn.Sequential(module.dropout, DropPath(rate)).train(module.training)


def remove_drop_path(branch_ends: Sequence[Sequence[Any]]) -> None:
    """Undo `add_drop_path`, where it was called."""
    for module in (module for ends in branch_ends for module in ends):
        if isinstance(module.dropout, nn.Sequential) and isinstance(module.dropout[-1], DropPath):
            module.dropout = module.dropout[0]


def _rates(drop_path: float, blocks: int) -> list[float]:
    return torch.linspace(0, drop_path, blocks, device="cpu").tolist()
