"""What a benchmark's models, optimizer and inputs hold on a device, against what its allocator has handed out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.positions import ConstantTable

TOLERANCE = 0.05  # of what is explained
TOLERANCE_BYTES = 64e6


def held_bytes(holders: Iterable[Any], device: torch.device) -> int:
    """Bytes of the storages on a device that these hold, each once.

    Args:
        holders: modules (weights, gradients, buffers, constant tables), optimizers (their state) and tensors.
    """
    storages = {}
    for holder in holders:
        for tensor in _tensors_of(holder, device):
            if tensor.device.type == device.type:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors_of(holder: Any, device: torch.device) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
        if holder.is_leaf and holder.grad is not None:
            yield holder.grad
    elif isinstance(holder, torch.optim.Optimizer):
        for state in holder.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    elif isinstance(holder, ConstantTable):
        yield holder.to(device)
    elif isinstance(holder, nn.Module):
        for tensor in (*holder.parameters(), *holder.buffers()):
            yield from _tensors_of(tensor, device)
        for module in holder.modules():  # a position table is neither parameter nor buffer
            for value in vars(module).values():
                if isinstance(value, (Tensor, ConstantTable)):
                    yield from _tensors_of(value, device)
    else:
        raise TypeError(f"expected a module, an optimizer or a tensor, got {type(holder).__name__}")


def check_allocated(allocated: int, explained: int) -> None:
    """Raise RuntimeError unless what is allocated is what is explained, within 5 % or 64 MB, whichever is more."""
    off = allocated - explained
    if abs(off) > max(TOLERANCE * explained, TOLERANCE_BYTES):
        raise RuntimeError(
            f"{allocated / 1e9:.3f} GB are allocated before a step, but weights, gradients, optimizer, inputs and "
            f"constant tables hold {explained / 1e9:.3f} GB: off by {off / 1e9:+.3f} GB, and so would its peak be"
        )
