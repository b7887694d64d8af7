"""The processes that measure together under torchrun; one alone otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(name: str) -> torch.device:
    """The device of this process; under torchrun one for each, and they find each other."""
    device = torch.device(name)
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def over_ranks(values: Sequence[float], operation: str, device: torch.device) -> list[float]:
    """Each value's "MAX" or "SUM" over the processes, which wait for each other here; in one process the values."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor.tolist()
