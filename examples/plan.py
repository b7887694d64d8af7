"""What a run will do, said before its first step, and how long it will take, said after the first few."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from keep_ratios import kept
from torch import Tensor
from transformers import TrainerCallback

from everest_tokens.dry_run import on_meta

logger = logging.getLogger(__name__)

_TIMED = 10  # steps, the first one not among them


def plan(
    model: Any,
    *,
    clips: int,
    held_out: int,
    labels: Sequence[str],
    skipped: Counter[str],
    batch: int,
    at_once: int,
    epochs: float,
    steps: int,
    keep_ratios: Sequence[float] = (),
) -> str:
    """The lines to print before a run.

    Args:
        model: patched.
        clips, held_out: videos to train and to evaluate on.
        labels: their names, empty in pre-training.
        skipped: what of the data is left out, by kind.
        batch: clips of a step, over all processes and accumulated steps.
        at_once: clips of a forward of one process.
        epochs: passes over the data.
        steps: in all.
        keep_ratios: that each step draws one of; the model's own if there are none.
    """
    shown = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
    left_out = ", ".join(f"{number} {kind}" for kind, number in sorted(skipped.items()))
    config = model.config
    steps_in_time = config.num_frames // config.tubelet_size
    side = config.image_size // config.patch_size
    tokens = steps_in_time * side**2
    numbers = []
    for ratio in sorted(keep_ratios):
        with kept(model, ratio):
            numbers.append(model.everest.selector.num_kept((steps_in_time, side, side)))
    with kept(model, max(keep_ratios)) if keep_ratios else nullcontext():
        numbers = numbers or [model.everest.selector.num_kept((steps_in_time, side, side))]
        weights, of_a_clip = memory(model)
    lines = {
        "clips": f"{clips} to train on, {held_out} held out" + (f"; left out: {left_out}" if left_out else ""),
        "labels": f"{len(labels)}: {shown}" if labels else "none: pre-training",
        "steps": f"{steps} of {batch} clips, {epochs:g} epochs",
        "model": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters,"
        f" {config.num_frames} frames of {config.image_size}²: {either(numbers)} of {tokens} tokens kept",
        "memory": f"about {(weights + at_once * of_a_clip) / 1e9:.2f} GB a process: weights, gradients and AdamW"
        f" {weights / 1e9:.2f}, {at_once} clips at {of_a_clip / 1e6:.1f} MB (float32)",
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def memory(model: Any) -> tuple[int, int]:
    """Estimate the bytes that training needs: (weights, gradients and AdamW's state; what one clip saves for backward).

    The latter is counted on a copy without values, in float32, without gradient checkpointing; the temporaries of a
    kernel come on top.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) + 3 * 4 * trained
    copied = on_meta(model)
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    config, tubelet = model.config, model.config.tubelet_size
    frames = tubelet * model.everest.num_candidates(config.num_frames // tubelet)
    clip = torch.zeros(1, frames, config.num_channels, config.image_size, config.image_size, device="meta")
    known = {id(parameter) for parameter in copied.parameters()}
    held: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in known:
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = copied.train()(pixel_values=clip)
        _held = (result.loss if result.get("loss") is not None else result.logits).sum()
    return weights, sum(storage.nbytes() for storage in held.values())


class Timing(TrainerCallback):
    """Says after the first few steps how long an epoch and the run will take."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.first = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.since is None:  # the first step also starts workers and fills caches
            self.since, self.first = time.perf_counter(), state.global_step
            return
        done = state.global_step - self.first
        if done == min(_TIMED, (state.max_steps - self.first) // 2) and state.is_local_process_zero:
            seconds = (time.perf_counter() - self.since) / done
            in_epoch = state.max_steps / max(state.num_train_epochs, 1)
            logger.info(
                "%s a step: an epoch takes about %s, what is left of the run %s",
                spoken(seconds), spoken(seconds * in_epoch), spoken(seconds * (state.max_steps - state.global_step)),
            )  # fmt: skip


def either(values: Sequence[float]) -> str:
    """Alternatives as one says them: 0.2, 0.3 or 1."""
    *others, last = (f"{value:g}" for value in values)
    return f"{', '.join(others)} or {last}" if others else last


def spoken(seconds: float) -> str:
    """A time as one says it: 0.25 s, 40 s, 12 min, 3.5 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.{2 if seconds < 2 else 0}f} s"
