"""From scored tokens to what a model runs: the visible tokens, the targets, and the time steps they come from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.selectors import (
    Grid,
    RandomSelector,
    ReRoSelector,
    RunningCellSelector,
    Selector,
    TokenSelector,
    TubeSelector,
    floor_of,
    shuffled,
    static_ratio,
)
from everest_tokens.tubelets import gather_tokens


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Which tokens of a batch of clips reach the encoder and which are predicted; the others are dropped.

    A pytree, and known to `torch.load(weights_only=True)` from when it is imported (`from everest_tokens import
    TokenSelection`), as it is wherever a model is patched.

    Attributes:
        visible: (B, V) int64, ascending: positions in the t-major grid that the encoder sees.
        target: (B, M) int64, ascending: positions whose pixels the decoder predicts (Eq. 3); None outside pre-training.
        grid: (t, h, w) of one clip.
        importance: (B, N) float32, I of Eq. 2, or None where the selector has none or nobody asked for it.
        steps: (B, t) int64, ascending: the candidate time step that each step of the grid was drawn from; None without
            a frame sampler.
    """

    visible: Tensor
    target: Tensor | None
    grid: Grid
    importance: Tensor | None = None
    steps: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(B, V + M) int64, ascending: visible and target together."""
        if self.target is None:
            return self.visible
        return torch.cat([self.visible, self.target], dim=1).sort(dim=1).values

    @property
    def frame_counts(self) -> Tensor:
        """(B, t) int64: how many tokens of each time step are kept."""
        return count_per_step(self.kept, self.grid)


_SELECTORS = (ReRoSelector, RandomSelector, TubeSelector, RunningCellSelector)
_TENSORS = ("visible", "target", "importance", "steps")


def _flatten(selection: TokenSelection) -> tuple[list[Any], Grid]:
    return [getattr(selection, name) for name in _TENSORS], selection.grid


def _flatten_with_keys(selection: TokenSelection) -> tuple[list[Any], Grid]:
    return [(pytree.GetAttrKey(name), getattr(selection, name)) for name in _TENSORS], selection.grid


def _unflatten(tensors: Iterable[Any], grid: Any) -> TokenSelection:
    return TokenSelection(grid=tuple(grid), **dict(zip(_TENSORS, tensors, strict=True)))


# A pytree, so that torch.export, torch.utils.checkpoint and FSDP reach the tensors inside; the grid is structure.
pytree.register_pytree_node(
    TokenSelection,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="everest_tokens.TokenSelection",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
# Tensors and a tuple of numbers: torch.export's files that hold a selection load without arbitrary pickles.
torch.serialization.add_safe_globals([TokenSelection])


def count_per_step(kept: Tensor, grid: Grid) -> Tensor:
    """c_i of §4.2: kept (B, K) → (B, t) int64."""
    t, h, w = grid
    counts = torch.zeros(kept.shape[0], t, dtype=torch.int64, device=kept.device)
    return counts.scatter_add(1, kept // (h * w), torch.ones_like(kept))


class LiveSettings(dict[str, Any]):
    """Settings that a patched model keeps in step, told apart from the plain dict that a saved folder gives."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}  # a copied config is as a saved one


class SelectionPolicy:
    """How one patched model selects: `model.everest`. What is set here takes effect at the next forward.

    Attributes:
        task: "pretraining" (visible and targets) or "encoder" (every kept token is visible).
        settings: the same as plain JSON, always in step; this dict is `config.everest`.

    Args:
        selector: (tokens, grid) → kept (B, K); ρ_pre is its keep_ratio.
        mask_ratio: in pre-training ⌊(1 − mask_ratio)·N⌋ tokens are visible: 1 − ρ_pre·ρ_post of the paper.
        visible: a selector that chooses the visible tokens instead of drawing them from the kept; the targets are
            the kept tokens that are not visible. A custom one must choose among the kept.
        frame_sampler: draws the clip's time steps out of more candidates (§4.2).
    """

    mask_ratio = static_ratio("mask_ratio", "a number in (0, 1)", lambda ratio: 0 < ratio < 1)

    def __init__(
        self,
        task: str,
        selector: Selector,
        mask_ratio: float,
        visible: Selector | None,
        frame_sampler: InfoFrameSampler | None,
    ) -> None:
        self.settings: dict[str, Any] = LiveSettings(task=task)
        self.selector = selector
        self.mask_ratio = mask_ratio
        self.visible = visible
        self.frame_sampler = frame_sampler

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    @property
    def task(self) -> str:
        return self.settings["task"]

    @property
    def selector(self) -> Selector:
        return self._selector

    @selector.setter
    def selector(self, value: Selector) -> None:
        self._selector = _checked_selector(value, "selector")
        self.settings["selector"] = _settings_of(value)

    @property
    def visible(self) -> Selector | None:
        return self._visible

    @visible.setter
    def visible(self, value: Selector | None) -> None:
        if value is not None and self.task != "pretraining":
            raise ValueError(f"visible= chooses among a pre-training model's tokens; got {value!r} for an encoder")
        self._visible = None if value is None else _checked_selector(value, "visible")
        self.settings["visible"] = None if value is None else _settings_of(value)

    @property
    def frame_sampler(self) -> InfoFrameSampler | None:
        return self._frame_sampler

    @frame_sampler.setter
    def frame_sampler(self, value: InfoFrameSampler | None) -> None:
        if value is not None and not isinstance(value, InfoFrameSampler):
            raise TypeError(f"frame_sampler must be an InfoFrameSampler or None, got {type(value).__name__}")
        self._frame_sampler = value
        self.settings["frame_sampler"] = None if value is None else _settings_of(value)

    def num_candidates(self, num_steps: int) -> int:
        """How many time steps the model takes for a clip of `num_steps`: ⌊α·τ⌋ with a frame sampler, τ without."""
        return num_steps if self.frame_sampler is None else self.frame_sampler.num_candidates(num_steps)

    def check(self, grid: Grid) -> None:
        """Raise ValueError where these settings can't work on clips of `grid`. Custom callables show only when run."""
        self.num_candidates(grid[0])
        if not isinstance(self.selector, TokenSelector):
            return
        kept = self.selector.num_kept(grid)
        if self.task != "pretraining":
            return
        if self.visible is None:
            self._num_targets(self._num_drawn(grid), kept, grid)
        elif isinstance(self.visible, TokenSelector):
            self._num_targets(self.visible.num_kept(grid), kept, grid)

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
    ) -> TokenSelection:
        """Select from the embeddings of one batch of clips.

        Args:
            tokens: (B, N, D), or (B, ⌊α·τ⌋·h·w, D) with a frame sampler; before the position embedding.
            grid: (τ, h, w), of the clip that the model runs.
            training: whether the frame sampler draws, or takes its most probable steps.
            generator: for every random choice made here; torch's default generator otherwise.
            with_importance: also report Eq. 2's importance.
        """
        tokens = tokens.detach()
        steps = None
        if self.frame_sampler is not None:
            candidates = (self.frame_sampler.num_candidates(grid[0]), *grid[1:])
            counts = count_per_step(_run(self.selector, tokens, candidates, generator), candidates)
            if training:
                steps = self.frame_sampler(counts, grid[0], generator)
            else:
                steps = self.frame_sampler.most_probable(counts, grid[0])
            everything = torch.arange(math.prod(grid), device=tokens.device).expand(tokens.shape[0], -1)
            tokens = gather_tokens(tokens, source_positions(everything, steps, grid))
        kept = _run(self.selector, tokens, grid, generator)
        importance = None
        if with_importance and isinstance(self.selector, ReRoSelector):
            importance = self.selector.importance(tokens, grid)
        visible, target = self._split(kept, tokens, grid, generator)
        return TokenSelection(visible, target, grid, importance, steps)

    def _split(
        self, kept: Tensor, tokens: Tensor, grid: Grid, generator: torch.Generator | None
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
        visible = _run(self.visible, tokens, grid, generator)
        targets = self._num_targets(visible.shape[1], kept.shape[1], grid)
        seen = torch.zeros(tokens.shape[:2], dtype=torch.int8, device=tokens.device).scatter(1, visible, 1)
        seen = seen.gather(1, kept)  # (B, K): 1 where a kept token is visible
        # On an accelerator this would wait for the device; a custom choice that is wrong shows on the CPU.
        checkable = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if checkable and not isinstance(self.visible, TokenSelector) and int(seen.sum()) != visible.numel():
            raise ValueError(f"visible={self.visible!r} must choose distinct tokens among the kept")
        unseen_first = seen.sort(dim=1, stable=True).indices
        return visible, kept.gather(1, unseen_first[:, :targets])


def source_positions(positions: Tensor, steps: Tensor | None, grid: Grid) -> Tensor:
    """Positions (B, M) in the drawn clip's grid → the same tubelets' positions in the candidate clip's grid."""
    if steps is None:
        return positions
    area = grid[1] * grid[2]
    return steps.gather(1, positions // area) * area + positions % area


def _run(selector: Selector, tokens: Tensor, grid: Grid, generator: torch.Generator | None) -> Tensor:
    if isinstance(selector, TokenSelector) and selector.random:
        return selector(tokens, grid, generator=generator)
    kept = selector(tokens, grid)
    if not isinstance(selector, TokenSelector):
        if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.shape[:-1] != tokens.shape[:1]:
            got = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise ValueError(f"a selector must return int64 indices ({tokens.shape[0]}, K), got {got}")
        if kept.ndim != 2 or kept.shape[1] < 1:
            raise ValueError(f"a selector must keep at least one token, got indices {tuple(kept.shape)}")
        kept = kept.sort(dim=1).values
    return kept


def _checked_selector(selector: Selector, name: str) -> Selector:
    if not callable(selector) or isinstance(selector, type):
        raise TypeError(f"{name} must be a callable (tokens, grid) -> (B, K) indices, got {selector!r}")
    if isinstance(selector, nn.Module):
        state = [key for key, _ in (*selector.named_parameters(), *selector.named_buffers())]
        if state:
            raise TypeError(
                f"{name} must have neither parameters nor buffers, so that the model's checkpoints stay as they are; "
                f"{type(selector).__name__} has {', '.join(state)}"
            )
    return selector


def _settings_of(part: Any) -> dict[str, Any]:
    """What JSON records of a selector or a frame sampler; a subclass may do anything, so it counts as custom."""
    return part.settings if type(part) in (*_SELECTORS, InfoFrameSampler) else {"name": "custom"}


def _ranks_alike(selector: Selector, visible: Selector) -> bool:
    """Whether the two keep the top of one ranking, so that the shorter selection lies within the longer."""
    if not (isinstance(selector, ReRoSelector) and isinstance(visible, ReRoSelector)):
        return False
    return selector.distance == visible.distance and selector.descending == visible.descending


def frame_sampler_from(settings: dict[str, Any]) -> InfoFrameSampler:
    """Rebuild a frame sampler from `config.everest`. Raises ValueError for one that JSON could not record."""
    if settings.get("name") != InfoFrameSampler.__name__ or "alpha" not in settings:
        raise ValueError(f"config.everest records a custom frame sampler ({settings}): pass frame_sampler=")
    return InfoFrameSampler(settings["alpha"])


def selector_from(settings: dict[str, Any], name: str) -> Selector:
    """Rebuild a selector from `config.everest`. Raises ValueError for one that JSON could not record."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"config.everest records a {name} that can't be read: {settings}")
    known = {cls.__name__: cls for cls in _SELECTORS}
    arguments = {key: value for key, value in settings.items() if key != "name"}
    if settings.get("name") not in known or settings.get("distance") == "custom":
        raise ValueError(
            f"config.everest records a custom {name}, which can't be rebuilt from {settings}: pass {name}="
        )
    try:
        return known[settings["name"]](**arguments)
    except TypeError as error:  # written by another version
        raise ValueError(f"config.everest records a {name} that this version can't build: {settings}") from error
