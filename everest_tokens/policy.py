"""The live settings of a patched model, `model.everest`, and their record, `config.everest`."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.budgets import Budget, EnergyBudget, RunLengthSelector
from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.importance import MeasuresChange
from everest_tokens.ranking import stable_order
from everest_tokens.selection import (
    TokenSelection,
    compensates,
    count_per_step,
    has_values,
    run_selector,
    source_positions,
)
from everest_tokens.selectors import (
    RandomSelector,
    ReRoSelector,
    RunningCellSelector,
    Selector,
    TokenSelector,
    TubeSelector,
    floor_of,
    shuffled,
    static_number,
)
from everest_tokens.tubelets import Grid, gather_tokens

_RECORDED = (
    *(ReRoSelector, RandomSelector, TubeSelector, RunningCellSelector, EnergyBudget, RunLengthSelector),
    InfoFrameSampler,
)


def _part(name: str) -> Any:
    """A selector or the frame sampler as a property of the policy, checked when it is set and in step with `settings`.

    A subclass of ours may do anything, so it is recorded as custom.
    """

    def set_(policy: Any, value: Any) -> None:
        if value is not None or name == "selector":
            _check_part(policy, value, name)
        setattr(policy, f"_{name}", value)
        recorded = value.settings if type(value) in _RECORDED else {"name": "custom"}
        policy.settings[name] = None if value is None else recorded

    def get(policy: Any) -> Any:
        return getattr(policy, f"_{name}")

    return property(get, set_)


def _check_part(policy: SelectionPolicy, value: Any, name: str) -> None:
    """Raise TypeError or ValueError for what can't be the policy's selector, visible or frame_sampler."""
    if isinstance(value, Budget) and (name == "visible" or policy.task == "pretraining"):
        raise ValueError(f"a decoder's batch needs equally many tokens of every clip, not {name}={value!r}")
    if name == "frame_sampler":
        if not isinstance(value, InfoFrameSampler):
            raise TypeError(f"frame_sampler must be an InfoFrameSampler or None, got {type(value).__name__}")
        if policy.packs:
            raise ValueError(f"{value!r} draws by how many tokens a fixed share keeps, not by {policy.selector!r}")
        return
    if isinstance(value, Budget) and policy.frame_sampler is not None:
        raise ValueError(f"{policy.frame_sampler!r} draws by how many tokens a fixed share keeps, not by {value!r}")
    if name == "visible" and policy.task != "pretraining":
        raise ValueError(f"visible= chooses among a pre-training model's tokens; got {value!r} for an encoder")
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a callable (tokens, grid) -> (B, K) indices, got {value!r}")
    state = [*value.named_parameters(), *value.named_buffers()] if isinstance(value, nn.Module) else []
    if state:
        raise TypeError(
            f"{name} must have neither parameters nor buffers, so that the model's checkpoints stay as they are; "
            f"{type(value).__name__} has {', '.join(key for key, _ in state)}"
        )


class LiveSettings(dict[str, Any]):
    """The settings of a patched model as its config shows them, told apart from the plain dict of a saved folder."""

    policy: SelectionPolicy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Give the copied model's settings where the model is copied; a config copied alone is as a saved one."""
        policy = copy.deepcopy(self.policy, memo)
        if policy is not self.policy:
            return policy.settings
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}


class SelectionPolicy:
    """How one patched model selects: `model.everest`. What is set here takes effect at the next forward.

    Attributes:
        task: "pretraining" (visible and targets) or "encoder" (every kept token is visible).
        settings: the same as plain JSON, always in step; this dict is `config.everest`.
        root, host: the patched model, and what knows its kind; None until it is patched.
        runs_without_clips: whether a forward over 0 clips runs, as patching found.
        attention: the model's own attention implementation, where another stands in for it; else None.

    Args:
        selector: (tokens, grid) → kept (B, K); ρ_pre is its keep_ratio.
        mask_ratio: in pre-training ⌊(1 − mask_ratio)·N⌋ tokens are visible: 1 − ρ_pre·ρ_post of the paper.
        visible: a selector that chooses the visible tokens instead of drawing them from the kept; the targets are
            the kept tokens that are not visible. A custom one must choose among the kept, which is checked on the
            CPU, and on an accelerator within `torch.autograd.detect_anomaly()`.
        frame_sampler: draws the clip's time steps out of more candidates (§4.2).
    """

    selector = _part("selector")
    visible = _part("visible")
    frame_sampler = _part("frame_sampler")
    mask_ratio = static_number("mask_ratio", "a number in (0, 1)", lambda ratio: 0 < ratio < 1)

    def __init__(
        self,
        task: str,
        selector: Selector,
        mask_ratio: float,
        visible: Selector | None,
        frame_sampler: InfoFrameSampler | None,
    ) -> None:
        self.settings = LiveSettings(task=task)
        self.settings.policy = self
        self._root: weakref.ref[nn.Module] | None = None
        self.host: Any = None
        self.runs_without_clips = False
        self.attention: Any = None
        self._frame_sampler: InfoFrameSampler | None = None
        self.selector = selector
        self.mask_ratio = mask_ratio
        self.visible = visible
        self.frame_sampler = frame_sampler

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectionPolicy:
        """Copy the settings of a model that is copied; a part copied alone goes on selecting as the model does."""
        if self.root is not None and id(self.root) not in memo:
            return self
        if id(self) not in memo:
            memo[id(self)] = twin = SelectionPolicy.__new__(SelectionPolicy)
            parts = {
                name: copy.deepcopy(getattr(self, name), memo) for name in ("selector", "visible", "frame_sampler")
            }
            twin.__init__(self.task, mask_ratio=self.mask_ratio, **parts)  # type: ignore[misc]
            twin.root, twin.host = memo.get(id(self.root)), self.host
            twin.runs_without_clips, twin.attention = self.runs_without_clips, self.attention
            twin.settings.update({key: value for key, value in self.settings.items() if key not in twin.settings})
        return memo[id(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.root = state["_root"]

    @property
    def root(self) -> nn.Module | None:
        return None if self._root is None else self._root()

    @root.setter
    def root(self, value: nn.Module | None) -> None:
        # Weak, so that a model that nobody holds any more is freed at once, not when garbage is collected.
        self._root = None if value is None else weakref.ref(value)

    @property
    def task(self) -> str:
        return self.settings["task"]

    @property
    def packs(self) -> bool:
        """Whether each clip keeps its own number of tokens, so that a batch runs packed."""
        return isinstance(self.selector, Budget)

    def num_candidates(self, num_steps: int) -> int:
        """How many time steps the model takes for a clip of `num_steps`: ⌊α·τ⌋ with a frame sampler, τ without."""
        return num_steps if self.frame_sampler is None else self.frame_sampler.num_candidates(num_steps)

    def share_kept(self) -> float:
        """K / N of the clips that the model runs, by one of our selectors, at most; its keep ratio where it has one."""
        grid = self.host.geometry(self.root).grid
        return self.selector.keep_ratio or self.selector.num_kept(grid) / math.prod(grid)

    def check(self, grid: Grid) -> None:
        """Raise ValueError where these settings can't work on clips of `grid`. Custom callables show only when run."""
        self.num_candidates(grid[0])
        kept, visible = (
            part.num_kept(grid) if isinstance(part, TokenSelector) else None for part in (self.selector, self.visible)
        )
        if self.task == "pretraining" and self.visible is None:
            visible = self._num_drawn(grid)
        if kept is not None and visible is not None:
            self._num_targets(visible, kept, grid)

    def _num_drawn(self, grid: Grid) -> int:
        """V where the visible tokens are drawn from the kept."""
        return floor_of(1 - self.mask_ratio, math.prod(grid))

    def _num_targets(self, visible: int, kept: int, grid: Grid) -> int:
        """M: how many of the K kept tokens are not visible, the same in every clip, or else a ValueError."""
        shared = visible
        if isinstance(self.visible, TokenSelector) and kept < math.prod(grid):
            selector, tubes = self.selector, isinstance(self.visible, TubeSelector)
            if isinstance(selector, RunningCellSelector) and tubes and grid[0] % 4 == 0:
                shared = visible * kept // math.prod(grid)  # a place is kept in 4·keep_ratio of every 4 steps
            elif not _ranks_alike(selector, self.visible):
                raise ValueError(
                    f"how many tokens {selector!r} and visible={self.visible!r} share differs from clip to clip on grid"
                    f" {grid}, so their targets make no batch: use visible= with a selector that keeps all tokens, with"
                    " RunningCellSelector and TubeSelector over a multiple of 4 time steps, or with two ReRoSelectors"
                    " of the same distance"
                )
        if visible < 1 or kept - shared < 1:
            what = f"mask_ratio {self.mask_ratio}" if self.visible is None else f"visible={self.visible!r}"
            raise ValueError(
                f"{what} gives {visible} visible of {kept} kept tokens: expected at least 1 visible and 1 target"
            )
        return kept - shared

    def select(
        self,
        tokens: Tensor,
        grid: Grid,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        with_importance: bool = False,
        seen_before: Callable[[Tensor | None], Tensor] | None = None,
        frames: Tensor | None = None,
    ) -> TokenSelection:
        """Select from the embeddings of one batch of clips.

        Args:
            tokens: (B, N, D), or (B, ⌊α·τ⌋·h·w, D) with a frame sampler; before the position embedding.
            grid: (τ, h, w), of the clip that the model runs.
            training: whether the frame sampler draws, or takes its most probable steps.
            generator: for every random choice made here; torch's default generator otherwise.
            with_importance: also report Eq. 2's importance.
            seen_before: gives `previous` of `ReRoSelector.importance`, (B, N, D), for the steps (B, τ) that are drawn,
                or for all (None); asked where a selector compensates the camera's motion.
            frames: (B, T, C, H, W), the clips' pixels, for a selector that goes by them.
        """
        tokens = tokens.detach()
        if not (compensates(self.selector) or compensates(self.visible)):
            seen_before = None
        steps, previous = None, None if seen_before is None else seen_before(None)
        if self.frame_sampler is not None:
            candidates = (self.frame_sampler.num_candidates(grid[0]), *grid[1:])
            counts = count_per_step(self._telling(tokens, candidates, grid, generator, previous), candidates)
            if training:
                steps = self.frame_sampler(counts, grid[0], generator)
            else:
                steps = self.frame_sampler.most_probable(counts, grid[0])
            everything = torch.arange(math.prod(grid), device=tokens.device).expand(tokens.shape[0], -1)
            tokens = gather_tokens(tokens, source_positions(everything, steps, grid))
            previous = None if seen_before is None else seen_before(steps)
        kept, lengths = run_selector(self.selector, tokens, grid, generator, previous, frames), None
        if self.packs:
            lengths = torch.full(kept.shape[:1], kept.shape[1], device="cpu")  # without values: at most
            if not kept.is_meta:  # waits for the device: shapes follow from these
                lengths = (kept < math.prod(grid)).sum(dim=1).cpu()
            kept = kept[:, : max(lengths.tolist(), default=0)]
        importance = None
        if with_importance and isinstance(self.selector, MeasuresChange):
            importance = self.selector.compared(tokens, grid, previous if compensates(self.selector) else None)
        visible, target = self._split(kept, tokens, grid, generator, previous)
        return TokenSelection(visible, target, grid, importance, steps, lengths)

    def _telling(
        self,
        tokens: Tensor,
        candidates: Grid,
        grid: Grid,
        generator: torch.Generator | None,
        previous: Tensor | None,
    ) -> Tensor:
        """The tokens (B, K) that tell informative time steps of the candidate clip from others."""
        if type(self.selector) is ReRoSelector:
            return self.selector.most_changed(tokens, candidates, grid, previous)
        return run_selector(self.selector, tokens, candidates, generator, previous)

    def _split(
        self, kept: Tensor, tokens: Tensor, grid: Grid, generator: torch.Generator | None, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """kept (B, K) → visible (B, V), target (B, M) or None."""
        if self.task != "pretraining":
            return kept, None
        if self.visible is None:  # ρ_post of the kept, at random (§4.1)
            drawn = self._num_drawn(grid)
            self._num_targets(drawn, kept.shape[1], grid)
            order = shuffled(kept.shape[0], kept.shape[1], kept.device, generator)
            chosen, others = order[:, :drawn].sort(dim=1).values, order[:, drawn:].sort(dim=1).values
            return kept.gather(1, chosen), kept.gather(1, others)
        visible = run_selector(self.visible, tokens, grid, generator, previous)
        targets = self._num_targets(visible.shape[1], kept.shape[1], grid)
        seen = torch.zeros(tokens.shape[:2], dtype=torch.int8, device=tokens.device).scatter(1, visible, 1)
        seen = seen.gather(1, kept)  # (B, K): 1 where a kept token is visible
        custom = not isinstance(self.visible, TokenSelector)
        if custom and has_values(seen) and int(seen.sum()) != visible.numel():
            raise ValueError(f"visible={self.visible!r} must choose distinct tokens among the kept")
        unseen_first = stable_order(seen)
        return visible, kept.gather(1, unseen_first[:, :targets])


def _ranks_alike(selector: Selector, visible: Selector) -> bool:
    """Whether the two keep the top of one ranking, so that the shorter selection lies within the longer."""
    if not (isinstance(selector, ReRoSelector) and isinstance(visible, ReRoSelector)):
        return False
    return all(
        getattr(selector, name) == getattr(visible, name) for name in ("distance", "descending", "anchor", "camera")
    )


def selector_from(settings: Any, name: str) -> Any:
    """Rebuild a selector, or frame sampler, from `config.everest`. Raises ValueError for one that JSON can't record."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"config.everest records a {name} that can't be read: {settings}")
    known = {cls.__name__: cls for cls in _RECORDED if (cls is InfoFrameSampler) == (name == "frame_sampler")}
    arguments = {key: value for key, value in settings.items() if key != "name"}
    if settings["name"] not in known or settings.get("distance") == "custom":
        raise ValueError(
            f"config.everest records a custom {name}, which can't be rebuilt from {settings}: pass {name}="
        )
    try:
        return known[settings["name"]](**arguments)
    except TypeError as error:  # written by another version
        raise ValueError(f"config.everest records a {name} that this version can't build: {settings}") from error
