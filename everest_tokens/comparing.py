"""The `benchmark` command: what a model costs on this machine with all tokens and with fewer, measured in turn."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from everest_tokens.patching import host_of, patch_videomae, unpatch_videomae
from everest_tokens.selectors import ReRoSelector


@dataclass(frozen=True)
class Cost:
    """One way to run a model.

    Attributes:
        keep_ratio: None for the unpatched model.
        clips_per_second: of forwards, or of training steps (forward, backward, AdamW); the median.
        peak: bytes that a run allocates at its highest moment, beside what was there before (weights, clips).
        time_ratio: of its time to the unpatched model's, the median over runs that followed one another.
    """

    keep_ratio: float | None
    clips_per_second: float
    peak: int
    time_ratio: float


def compare(
    model: Any,
    keep_ratios: Sequence[float],
    *,
    batch_size: int = 1,
    repeats: int = 5,
    training: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> list[Cost]:
    """Run random clips through a model with all tokens and with each keep ratio, in turn.

    Args:
        model: patched, a classifier or encoder of transformers. Its weights are shared by all ways to run it.
        keep_ratios: of `ReRoSelector`.
        repeats: timed runs of each, after two that warm up.
        progress: called 2 + repeats times for each way.

    Returns:
        The unpatched model's cost, then one for each keep ratio.

    Raises:
        ValueError: batch_size or repeats below 1, a keep ratio outside (0, 1], or a pre-training model.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model.everest.task == "pretraining":
        raise ValueError("expected a classifier or an encoder: benchmarks/step_cost.py measures pre-training")
    selectors = {ratio: ReRoSelector(ratio) for ratio in keep_ratios}
    device = next(model.parameters()).device
    runs: dict[float | None, Callable[[], None]] = {}
    for ratio in (None, *selectors):
        other = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).train(training)
        if ratio is None:
            unpatch_videomae(other)
        else:
            patch_videomae(other, selectors[ratio])
        clips = torch.randn(batch_size, *host_of(other).example(other)[0][1:], device=device)
        runs[ratio] = _run(other, clips, training)
    peaks: dict[float | None, int] = {}
    seconds: dict[float | None, list[float]] = {ratio: [] for ratio in runs}
    for turn in range(2 + repeats):
        for ratio, run in runs.items():
            if turn == 1:
                peaks[ratio] = _peak(run, device)
            else:
                seconds[ratio].append(_seconds(run, device))
            progress()
    return [
        Cost(
            ratio,
            batch_size / statistics.median(taken[1:]),
            peaks[ratio],
            statistics.median(one / all_ for one, all_ in zip(taken[1:], seconds[None][1:], strict=True)),
        )
        for ratio, taken in seconds.items()
    ]


def _run(model: Any, clips: torch.Tensor, training: bool) -> Callable[[], None]:
    if not training:
        return torch.inference_mode()(lambda: model(clips) and None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        model(clips)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that one run allocates at its highest moment; on the CPU what torch's profiler sees of its allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what torch's profiler writes to standard error about itself, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
