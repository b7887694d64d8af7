"""How often a function asks the device for something: operators as torch dispatches them, and kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Operators(TorchDispatchMode):
    """Counts aten operators below autograd and autocast that write memory: no views, no empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        mutates = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        makes = not _storages(result) <= known and "empty" not in func.__name__
        self.count += mutates or makes
        return result


def _storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def operators(run: Callable[[], object]) -> int:
    """Operators of one eager run that compute, the same on every device: on a GPU each is a kernel or more."""
    with _Operators() as counting:
        run()
    return counting.count


def kernels(run: Callable[[], object], device: torch.device) -> int:
    """What a CUDA device executes in one run: kernels, copies and fills, as torch.profiler sees them."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in events)
