"""What a model runs of a batch of clips: the visible tokens, the targets, and the time steps that they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from everest_tokens.selectors import Selector, TokenSelector
from everest_tokens.tubelets import Grid


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
        lengths: (B,) int64 on the CPU: how many tokens of each clip are kept, where that differs. Each row of `visible`
            is then filled up with N, which is no position. The clips run packed, (1, ΣK, D), a class token in front of
            each where the model has one. None where V is the same for all.
    """

    visible: Tensor
    target: Tensor | None
    grid: Grid
    importance: Tensor | None = None
    steps: Tensor | None = None
    lengths: Tensor | None = None

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


_TENSORS = ("visible", "target", "importance", "steps", "lengths")


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
    """c_i of §4.2: kept (B, K), which N may fill up, → (B, t) int64."""
    t, h, w = grid
    counts = torch.zeros(kept.shape[0], t + 1, dtype=torch.int64, device=kept.device)
    return counts.scatter_add(1, kept // (h * w), torch.ones_like(kept))[:, :t]


def source_positions(positions: Tensor, steps: Tensor | None, grid: Grid) -> Tensor:
    """Positions (B, M) in the drawn clip's grid → the same tubelets' positions in the candidate clip's grid."""
    if steps is None:
        return positions
    area = grid[1] * grid[2]
    return steps.gather(1, positions // area) * area + positions % area


def compensates(selector: Any) -> bool:
    """Whether a selector compares tokens with what the camera saw before, and so takes `previous=`."""
    return getattr(selector, "camera", "ignore") == "compensate"


def run_selector(
    selector: Selector,
    tokens: Tensor,
    grid: Grid,
    generator: torch.Generator | None,
    previous: Tensor | None = None,
    frames: Tensor | None = None,
) -> Tensor:
    """Run a selector, ours or a caller's: tokens (B, N, D) → kept (B, K), ascending.

    Args:
        previous: (B, N, D), for one that `compensates`.
        frames: (B, T, C, H, W), for one of ours that `takes_frames`.

    Raises:
        ValueError: a caller's selector returns something else, as far as `has_values` lets one see.
    """
    if isinstance(selector, TokenSelector) and selector.random:
        return selector(tokens, grid, generator=generator)
    more: dict[str, Any] = {"previous": previous} if compensates(selector) else {}
    if isinstance(selector, TokenSelector) and selector.takes_frames:
        more["frames"] = frames
    kept = selector(tokens, grid, **more)
    if not isinstance(selector, TokenSelector):
        if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.shape[:-1] != tokens.shape[:1]:
            got = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise ValueError(f"a selector must return int64 indices ({tokens.shape[0]}, K), got {got}")
        if kept.ndim != 2 or kept.shape[1] < 1:
            raise ValueError(f"a selector must keep at least one token, got indices {tuple(kept.shape)}")
        kept = kept.sort(dim=1).values
        _check_positions(kept, grid, "what a selector returns")
    return kept


def check_selection(selection: TokenSelection, grid: Grid, clips: int, task: str, candidates: int | None) -> None:
    """Raise ValueError where a selection that a caller gives can't be run.

    Positions out of range, repeated or out of order are noticed where `has_values` says that they can be.

    Args:
        grid: (τ, h, w) of the clips that the model runs.
        clips: how many.
        task: "pretraining", which needs targets, or "encoder".
        candidates: how many time steps the τ are drawn from; None without a frame sampler.
    """
    if tuple(selection.grid) != grid or selection.visible.shape[0] != clips:
        raise ValueError(
            f"token_selection is for {selection.visible.shape[0]} clips of grid {tuple(selection.grid)}, "
            f"the input has {clips} of grid {grid}"
        )
    if (selection.steps is None) != (candidates is None):
        raise ValueError("token_selection must have `steps` exactly where the model has a frame sampler")
    if selection.target is None and task == "pretraining":
        raise ValueError("token_selection has no targets, which pre-training needs: select with this model")
    for name in ("visible", "target", "steps"):
        index, steps = getattr(selection, name), name == "steps"
        if index is None:
            continue
        fits = index.ndim == 2 and index.shape[0] == clips and (not steps or index.shape[1] == grid[0])
        if not fits or index.dtype != torch.int64:
            expected = f"({clips}, {grid[0] if steps else '…'})"
            raise ValueError(f"token_selection.{name} must be int64 {expected}, got {index.dtype} {tuple(index.shape)}")
        if selection.lengths is None:
            _check_positions(index, grid, f"token_selection.{name}", candidates if steps else None)
    if selection.lengths is not None:
        _check_lengths(selection, selection.lengths, clips)
    if task == "pretraining" and has_values(selection.visible):
        _check_positions(selection.kept, grid, "token_selection.kept, visible and target together,")


def _check_lengths(selection: TokenSelection, lengths: Tensor, clips: int) -> None:
    """Raise ValueError where `lengths` don't say what the rows of `visible` hold."""
    visible, total = selection.visible, math.prod(selection.grid)
    if tuple(lengths.shape) != (clips,) or lengths.dtype != torch.int64 or selection.target is not None:
        raise ValueError(
            f"token_selection.lengths must be int64 ({clips},), without targets, got {lengths.dtype}"
            f" {tuple(lengths.shape)}{'' if selection.target is None else ' and targets'}"
        )
    for length, row in zip(lengths.tolist(), visible, strict=True):
        if not 1 <= length <= len(row) or (has_values(row) and not bool((row[length:] == total).all())):
            raise ValueError(
                f"token_selection.lengths must be in 1…{len(row)}, and {total} fill up rows of visible: got {length}"
            )
        _check_positions(row[None, :length], selection.grid, "token_selection.visible")


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be looked at here.

    Not while compiling or tracing, under a functional transform, or on an accelerator, for which looking would wait:
    there only within `torch.autograd.detect_anomaly()`, the switch that one turns to find a fault.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta:
        return False
    if tensor.device.type != "cpu" and not torch.is_anomaly_enabled():
        return False
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_positions(index: Tensor, grid: Grid, name: str, steps: int | None = None) -> None:
    """Raise ValueError where `has_values` shows what are no positions in the grid, or no places among `steps`."""
    if not has_values(index):
        return
    count, where = (math.prod(grid), f" of grid {grid}") if steps is None else (steps, "")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        got = f"{int(index.min())}…{int(index.max())}"
        raise ValueError(f"{name} must be positions in 0…{count - 1}{where}, got {got}")
    if not bool((index.diff(dim=1) > 0).all()):
        raise ValueError(f"{name} must be ascending without repeats in every clip")
