"""One checkpoint for every budget: each optimiser step keeps another share of the tokens, drawn from a few.

In transformers' Trainer, of a model that is patched:

    trainer = Trainer(model, …, callbacks=[KeepRatios([0.2, 0.3, 0.45, 0.6, 1.0])])

In a loop of your own, before the forwards of a step, and before a test or a checkpoint:

    model.everest.selector.keep_ratio = ratio_of([0.2, 0.3, 0.45, 0.6, 1.0], seed, step)
    model.everest.selector.keep_ratio = 0.6

Which one a step takes follows from seed and step alone: processes needn't tell each other, and a run that was killed
goes on with those that it would have drawn. Shapes stay static, so that `torch.compile` makes one graph for each ratio.
This file needs nothing of the others here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from everest_tokens.patching import unwrap


def ratio_of(ratios: Sequence[float], seed: int, step: int) -> float:
    """The ratio of an optimiser step, counted from 0 over the whole run: each is equally likely."""
    drawn = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)  # the same in every version of numpy
    return ratios[int(drawn[0]) % len(ratios)]


class KeepRatios(TrainerCallback):
    """Draws the keep ratio of each step; all micro-batches of a step have the same.

    Once a step's last gradient is there the selector has its own ratio again, so that evaluations take that one and
    `config.everest` of every checkpoint records it.

    Args:
        ratios: to draw from.

    Raises:
        ValueError: ratios that can't be (`check_ratios`); as soon as the Trainer is built, or at the latest before its
            first step, a model that can't run at one of them (`check_model`).
    """

    def __init__(self, ratios: Sequence[float]) -> None:
        check_ratios(ratios)
        self.ratios = tuple(ratios)
        self.own: float | None = None  # the selector's, while a step runs at a drawn one

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        check_model(model, self.ratios)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.put_back(args, state, control, model=model)  # an earlier training may have ended within a step
        check_model(model, self.ratios)
        if args.torch_compile:  # with more graphs than its limit, 8, torch would run the model uncompiled
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, len(self.ratios) + 8)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        selector = unwrap(model).everest.selector
        self.own = selector.keep_ratio if self.own is None else self.own
        selector.keep_ratio = ratio_of(self.ratios, args.seed, state.global_step)

    def put_back(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if self.own is not None:
            unwrap(model).everest.selector.keep_ratio, self.own = self.own, None

    # After the last backward, before whatever looks at the model between steps; the others for a step that was cut off.
    on_pre_optimizer_step = on_epoch_end = on_train_end = put_back


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError for none, for one outside (0, 1], and for one that comes twice."""
    if not ratios:
        raise ValueError("keep_ratios must be numbers in (0, 1], got none")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
            raise ValueError(f"keep_ratios must be numbers in (0, 1], got {ratio!r}")
    if len(set(ratios)) < len(ratios):
        raise ValueError(f"keep_ratios are equally likely: expected each once, got {list(ratios)}")


def check_model(model: Any, ratios: Sequence[float]) -> None:
    """Raise ValueError for a model that isn't patched, or whose selector can't keep one of these shares of a clip."""
    policy = getattr(unwrap(model), "everest", None)
    if policy is None:
        raise ValueError(f"keep_ratios: {type(model).__name__} is not patched, see everest_tokens.patch_videomae")
    if getattr(policy.selector, "keep_ratio", None) is None:
        raise ValueError(f"keep_ratios: expected a selector with a keep_ratio, got {policy.selector!r}")
    _, grid, _ = policy.host.example(policy.root)
    for ratio in ratios:
        with kept(model, ratio):
            policy.check(grid)


@contextmanager
def kept(model: Any, ratio: float) -> Iterator[None]:
    """Within it, a patched model keeps this share of the tokens."""
    selector = unwrap(model).everest.selector
    own = selector.keep_ratio
    try:
        selector.keep_ratio = ratio
        yield
    finally:
        selector.keep_ratio = own
