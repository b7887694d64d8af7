"""The `benchmark` command: what a model costs on this machine with all tokens and with fewer, measured in turn."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from everest_tokens.patching import host_of, patch_videomae, unpatch_videomae
from everest_tokens.video import integer

_TURN = 0.2  # seconds that a turn takes at least: a run of milliseconds by itself tells little


def compare(
    model: Any,
    keep_ratios: Sequence[float],
    *,
    batch_size: int = 1,
    repeats: int = 5,
    training: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> dict[float | None, tuple[list[float], int]]:
    """Run random clips through a model with all tokens and with each keep ratio, in turn.

    Args:
        model: patched, a classifier or encoder of transformers. Its weights are shared by all ways to run it.
        keep_ratios: of the model's selector, else as it is.
        repeats: timed turns of each, after two that warm up. Short runs are repeated in a turn, whose mean counts.
        training: steps (forward, backward, AdamW at rate 0) instead of forwards.
        progress: called 2 + repeats times for each way.

    Returns:
        keep ratio, None for the unpatched model → seconds of each run, the i-th of all ways following one another, and
        the bytes that a run allocates at its highest moment beside what was there before.

    Raises:
        ValueError: batch_size or repeats below 1, a keep ratio outside (0, 1], a pre-training model, or one with a
            budget for each clip.
    """
    integer("batch_size", batch_size, least=1)
    integer("repeats", repeats, least=1)
    if model.everest.task == "pretraining":
        raise ValueError("expected a classifier or an encoder: benchmarks/step_cost.py measures pre-training")
    if model.everest.packs:
        raise ValueError(f"random clips don't tell what {model.everest.selector} costs: benchmarks/packing.py does")
    ways: dict[float | None, Any] = {None: None}
    for kept in keep_ratios:
        ways[kept] = copy.deepcopy(model.everest.selector)
        ways[kept].keep_ratio = kept
    device, runs = next(model.parameters()).device, {}
    for ratio, selector in ways.items():
        other = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).train(training)
        other = unpatch_videomae(other) if selector is None else patch_videomae(other, selector)
        clips = torch.randn(batch_size, *host_of(other).example(other)[0][1:], device=device)
        forward = partial(other, clips, **host_of(other).arguments(other))
        runs[ratio] = _step(other, forward) if training else torch.inference_mode()(forward)
    peaks, times, seconds = {}, {}, {ratio: list[float]() for ratio in runs}
    for turn in range(2 + repeats):
        for ratio, run in runs.items():
            if turn == 0:
                seconds_of(run, device)
            elif turn == 1:
                peaks[ratio] = _peak(run, device)
                times[ratio] = math.ceil(_TURN / seconds_of(run, device))
            else:
                several = partial(_repeat, run, times[ratio])
                seconds[ratio].append(seconds_of(several, device) / times[ratio])
            progress()
    return {ratio: (seconds[ratio], peaks[ratio]) for ratio in runs}


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _step(model: Any, forward: Callable[[], Any]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        forward()[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one run, from an idle device to an idle device."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest moment of a run; on the CPU what torch's profiler sees of its allocator."""
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
