"""Stochastic depth in a model's blocks, set for as long as it is patched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_BEFORE = "_everest_drop_paths"  # {attribute: what was there}, out of the model's sight


def set_stochastic_depth(branch_ends: Sequence[Sequence[tuple[Any, str]]], drop_path: float) -> None:
    """Rates that rise linearly from 0 at the first block to `drop_path` at the last (Table 8).

    Args:
        branch_ends: of each block, as in `Host.branch_ends`.
    """
    from timm.layers import DropPath  # seconds that nobody waits for without stochastic depth

    rates = torch.linspace(0, drop_path, len(branch_ends), device="cpu").tolist()
    for rate, ends in zip(rates, branch_ends, strict=True):
        for module, name in ends:
            before = getattr(module, name)
            path = DropPath(rate) if name.startswith("drop_path") else nn.Sequential(before, DropPath(rate))
            vars(module).setdefault(_BEFORE, {})[name] = before
            setattr(module, name, path.train(module.training))


def restore_stochastic_depth(root: nn.Module) -> None:
    """Undo `set_stochastic_depth`, where it was called."""
    for module in list(root.modules()):
        for name, before in module.__dict__.pop(_BEFORE, {}).items():
            setattr(module, name, before.train(module.training))
