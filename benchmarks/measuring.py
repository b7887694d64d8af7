"""What a step costs where it runs: bytes kept for backward, peaks, and seconds side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everest_tokens.comparing import seconds_of
from everest_tokens.selectors import TubeSelector
from everest_tokens.tubelets import Grid


def videomae_mask(batch: int, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """What an unpatched model trains with as `bool_masked_pos`: VideoMAE's 90 % tube mask, (B, N), True if hidden."""
    hidden = torch.ones(batch, math.prod(grid), dtype=torch.bool, device=device)
    return hidden.scatter(1, TubeSelector(0.1)(hidden.unsqueeze(-1), grid), False)


def training_step(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    optimized: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """One training step of a model whose output has a `loss`: forward, backward and, if `optimized`, AdamW.

    Args:
        inputs: keyword arguments of its forward, `pixel_values` among them.
        dtype: of autocast; float32 for none.
        optimizer: of the model's parameters, where there is one already: models that share their parameters share it.
    """
    device_type = inputs["pixel_values"].device.type
    autocast = partial(torch.autocast, device_type, dtype=dtype, enabled=dtype != torch.float32)
    if optimized and optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with autocast():
            loss = model(**inputs).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def inference_step(
    model: Any, inputs: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One forward of a model without what autograd would need; the arguments are those of `training_step`."""
    device_type = inputs["pixel_values"].device.type

    def step() -> None:
        with torch.inference_mode(), torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            model(**inputs)

    return step


def bytes_saved_for_backward(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps from `forward()` until backward, each storage once.

    Args:
        forward: runs the model; what it returns is kept until the count is taken.
        exclude: tensors that are there anyway (parameters, inputs): their storages don't count. Under autocast the
            copies of the weights in its dtype do count, although not the weights: they live until backward is over.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own output would hold the operation that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = forward()
    del held
    return sum(storages.values())


def paired_seconds(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time several steps in turn, so that a machine's slow moments fall on all of them alike.

    Args:
        steps: name → step.
        repeats: timed runs of each, after `warmup` untimed ones.
        progress: called after each run.

    Returns:
        name → seconds of each timed run, in order; the i-th ones ran one after the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(warmup + repeats):
        for name, step in steps.items():
            taken = seconds_of(step, device)
            if run >= warmup:
                seconds[name].append(taken)
            progress()
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over the pairs of runs of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def allocated_bytes(device: torch.device) -> int:
    """What the CUDA allocator has handed out, cuBLAS's workspaces aside: those stay for every later step."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # as torch's notes on CUDA say; the next product makes them anew
    return torch.cuda.memory_allocated(device)


def peak_bytes(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The CUDA allocator's peaks over one step, allocated and reserved; run one before, which makes what stays."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper quartile, each a value that was measured."""
    ordered = sorted(values)
    return [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]]
