"""Which models motion_accuracy.py trains: one experiment for each question of the paper, then those beyond it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from motion_clips import Task

import everest_tokens as et

ALL = "all tokens"
NONE = "none"  # trained as after pre-training, without one
SELECTORS: dict[str, Callable[[float], Any]] = {
    "rero": et.ReRoSelector,
    "rero first": partial(et.ReRoSelector, anchor="first"),
    "rero middle": partial(et.ReRoSelector, anchor="middle"),
    "rero compensated": partial(et.ReRoSelector, camera="compensate"),
    "ascending": partial(et.ReRoSelector, descending=False),
    "random": et.RandomSelector,
    "tube": et.TubeSelector,
    "running cell": et.RunningCellSelector,
    "energy": et.EnergyBudget,
    "run length": et.RunLengthSelector,
    **{distance: partial(et.ReRoSelector, distance=distance) for distance in ("l1", "cosine", "cka")},
}
KEEP_RATIOS = (0.05, 0.1, 0.15, 0.3, 0.6)
ALPHAS = (1.3, 1.5, 1.8, 2.0)
LONGER = 4000  # steps, four times the default
COLOURED = Task(colours=6)
STILL = ("rero", "rero first", "rero middle", "random", "tube")  # what is asked of what never moves
STILL_RATIOS = (0.2, 0.3, 0.6)
DRAWN = "drawn ratios"
DRAWN_RATIOS = (0.2, 0.3, 0.45, 0.6, 1.0)  # one of them each step
LARGE = Task(size=96, frames=8, radius=16, speed=6.0)  # twice the task: the camera's motion can be found in it
LARGE_STEPS = 600
PANS = (0.0, 1.5, 3.0)
MIXTURE = Task(camera=1.5, resting=0.5)  # clips with little change and clips in which everything changes
# Of a budget its one number; untrained embeddings then keep 7 to 57 % of the tokens on average.
BUDGETS = {"rero": KEEP_RATIOS, "energy": (0.3, 0.5, 0.7, 0.8, 0.95), "run length": (0.2, 0.6, 1.0)}
HARDER = {"camera": (0.5, 1.5, 3.0), "flicker": (0.05, 0.1, 0.2), "noise": (16.0, 32.0, 64.0)}


@dataclass(frozen=True)
class Run:
    """One model: pre-trained or not, then trained with labels.

    Attributes:
        method, keep_ratio: the selector of the training with labels; of an "energy" budget `keep_ratio` is the share
            that it covers, of "run length" the threshold.
        pretraining, pretraining_keep_ratio: the selector of the pre-training; None to train with all labels from
            scratch, "none" to train from scratch as others do after pre-training.
        window: frames that the clip has, out of the task's; None for all. Where it starts is drawn for each clip.
        alpha: of the InfoFrameSampler, which then draws the model's 16 of the window's frames.
        every: takes every n-th frame of the window.
        uniform: draws the time steps without regard to their tokens, to tell what the longer window gives.
        steps: of the training with labels; None for the settings'.
        trained: how, where `method` and `keep_ratio` are those of the test alone: "all tokens", or "drawn ratios" for
            the method with a keep ratio of its own in each step.
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
    trained: str | None = None

    @property
    def model_frames(self) -> int:
        """Frames that the encoder's clip has."""
        return 16 if self.window is not None else self.task.frames

    @property
    def training(self) -> Run:
        """What is trained for this run: the same for all that differ in the test alone."""
        if self.trained is None:
            return self
        if self.trained == ALL:
            return replace(self, method=ALL, keep_ratio=None, trained=None)
        return replace(self, keep_ratio=None)


def experiments() -> dict[str, list[Run]]:
    """The models of each experiment, for one seed."""

    def plain(method: str, keep_ratio: float | None = None, *pretraining: Any, **more: Any) -> Run:
        return Run("", Task(), method, keep_ratio, *pretraining, **more)

    def coloured(method: str, keep_ratio: float | None = None, **more: Any) -> Run:
        return Run("", COLOURED, method, keep_ratio, **more)

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
        "appearance": [coloured(ALL), *(coloured(method, ratio) for method in STILL for ratio in STILL_RATIOS)],
        "appearance-at-test": [
            coloured(ALL),
            *(coloured(method, ratio, trained=ALL) for method in STILL for ratio in STILL_RATIOS),
        ],
        "one-checkpoint": [
            coloured(ALL),
            *(
                coloured(method, ratio, trained=trained)
                for method in ("rero", "rero first")
                for trained in (DRAWN, None)
                for ratio in DRAWN_RATIOS
                if trained == DRAWN or ratio < 1  # trained at 1 it is all tokens
            ),
        ],
        "mixture": [Run("", MIXTURE, method, number) for method, numbers in BUDGETS.items() for number in numbers],
        "camera-96": [
            Run("", replace(LARGE, camera=pan), method, 0.15, steps=LARGE_STEPS)
            for pan in PANS
            for method in ("rero", "rero compensated")
        ],
    }
    return {name: [replace(run, experiment=name) for run in runs] for name, runs in found.items()}


EXPERIMENTS = experiments()


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the defaults of what runs and tasks had no field for when it was measured."""
    later = {field.name: field.default for field in fields(Run) if field.default is not MISSING}
    return later | record | {"task": asdict(Task()) | record["task"]}


def key_of(record: dict[str, Any]) -> str:
    """What tells a run from the others, whichever experiment asked for it first, and whenever it was measured."""
    whole = completed(record)
    return json.dumps({name: whole[name] for name in sorted(Run.__dataclass_fields__) if name != "experiment"})


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
