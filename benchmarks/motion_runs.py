"""Which models motion_accuracy.py trains: one experiment for each question of the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from motion_clips import Task

import everest_tokens as et

ALL = "all tokens"
NONE = "none"  # trained as after pre-training, without one
SELECTORS: dict[str, Callable[[float], Any]] = {
    "rero": et.ReRoSelector,
    "ascending": partial(et.ReRoSelector, descending=False),
    "random": et.RandomSelector,
    "tube": et.TubeSelector,
    "running cell": et.RunningCellSelector,
    **{distance: partial(et.ReRoSelector, distance=distance) for distance in ("l1", "cosine", "cka")},
}
KEEP_RATIOS = (0.05, 0.1, 0.15, 0.3, 0.6)
ALPHAS = (1.3, 1.5, 1.8, 2.0)
LONGER = 4000  # steps, four times the default
HARDER = {"camera": (0.5, 1.5, 3.0), "flicker": (0.05, 0.1, 0.2), "noise": (16.0, 32.0, 64.0)}


@dataclass(frozen=True)
class Run:
    """One model: pre-trained or not, then trained with labels.

    Attributes:
        method, keep_ratio: the selector of the training with labels.
        pretraining, pretraining_keep_ratio: the selector of the pre-training; None to train with all labels from
            scratch, "none" to train from scratch as others do after pre-training.
        window: frames that the clip has, out of the task's; None for all. Where it starts is drawn for each clip.
        alpha: of the InfoFrameSampler, which then draws the model's 16 of the window's frames.
        every: takes every n-th frame of the window.
        uniform: draws the time steps without regard to their tokens, to tell what the longer window gives.
        steps: of the training with labels; None for the settings'.
    """

    experiment: str
    task: Task
    method: str
    keep_ratio: float | None = None
    pretraining: str | None = None
    pretraining_keep_ratio: float | None = None
    window: int | None = None
    alpha: float | None = None
    every: int = 1
    uniform: bool = False
    steps: int | None = None
    seed: int = 0

    @property
    def model_frames(self) -> int:
        """Frames that the encoder's clip has."""
        return 16 if self.window is not None else self.task.frames


def experiments() -> dict[str, list[Run]]:
    """The models of each experiment, for one seed."""

    def plain(method: str, keep_ratio: float | None = None, *pretraining: Any, **more: Any) -> Run:
        return Run("", Task(), method, keep_ratio, *pretraining, **more)

    def windowed(window: int, **more: Any) -> Run:
        return Run("", Task(frames=48, action=1 / 3), "rero", 0.15, window=window, **more)

    found = {
        "keep-ratio": [
            plain(ALL),
            *(plain(method, ratio) for method in ("rero", "random", "tube") for ratio in KEEP_RATIOS),
            *(plain(method, ratio) for ratio in (0.25, 0.5) for method in ("running cell", "rero")),
            plain("ascending", 0.15),
        ],
        "longer": [
            plain(ALL, steps=LONGER),
            *(plain(method, 0.3, steps=LONGER) for method in ("random", "tube")),
        ],
        "order": [
            *(plain(last, 0.3, first, 0.3) for first in ("ascending", "rero") for last in ("ascending", "rero")),
            plain("rero", 0.3, NONE),
        ],
        "frame-sampler": [
            windowed(16),
            windowed(32, every=2),
            *(
                windowed(2 * math.floor(8 * alpha + 1e-9), alpha=alpha, uniform=uniform)
                for alpha in ALPHAS
                for uniform in (False, True)
            ),
        ],
        "running-cell": [
            plain(method, ratio, *pretraining)
            for method, ratio in ((ALL, None), ("rero", 0.3))
            for pretraining in ((NONE,), ("running cell", 0.5), ("rero", 0.3))
        ],
        "distance": [
            run
            for distance in ("cosine", "cka", "l1", "rero")
            for run in (plain("rero", 0.3, distance, 0.3), plain(distance, 0.15))
        ],
        **{
            name: [
                Run("", replace(Task(), **{name: level}), method, ratio)
                for level in levels
                for method, ratio in (("rero", 0.15), (ALL, None))
            ]
            for name, levels in HARDER.items()
        },
        "frames": [Run("", Task(frames=frames), "rero", 0.3) for frames in (16, 24)],
    }
    return {name: [replace(run, experiment=name) for run in runs] for name, runs in found.items()}


EXPERIMENTS = experiments()


def key_of(record: dict[str, Any]) -> str:
    """What tells a run from the others, whichever experiment asked for it first."""
    return json.dumps({name: record[name] for name in sorted(Run.__dataclass_fields__) if name != "experiment"})


def chosen_runs(names: list[str], methods: list[str] | None, seeds: int) -> list[Run]:
    """Each model of these experiments once, seed by seed, so that a run that is stopped has whole seeds."""
    runs: dict[str, Run] = {}
    for seed in range(seeds):
        for name in names:
            for run in EXPERIMENTS[name]:
                one = replace(run, seed=seed)
                if methods is None or one.method in methods:
                    runs.setdefault(key_of(asdict(one)), one)
    return list(runs.values())
