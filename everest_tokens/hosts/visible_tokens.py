"""What every host does with a clip: check it, embed it once, select, and hand on the visible tokens' embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.selection import SelectionPolicy, TokenSelection, source_positions
from everest_tokens.selectors import Grid
from everest_tokens.tubelets import (
    TubeletSize,
    embed_chosen,
    embed_tubelets,
    gather_tokens,
    only_tiles,
    unfold_tubelets,
)

_LETTERS = {"frames": "T", "channels": "C", "height": "H", "width": "W"}


class SelectionRequest:
    """Travels with one forward to the embedding, which fills in what was selected.

    Not a pytree: wrappers that rebuild their inputs (FSDP, checkpointing) must hand on this very object.
    """

    def __init__(
        self,
        selection: TokenSelection | None = None,
        generator: torch.Generator | None = None,
        with_importance: bool = False,
    ) -> None:
        self.selection = selection
        self.generator = generator
        self.with_importance = with_importance


def visible_tokens(
    policy: SelectionPolicy,
    request: SelectionRequest,
    embed: Callable[[], Tensor],
    pixels: Tensor,
    projection: nn.Module,
    size: TubeletSize,
    grid: Grid,
    *,
    training: bool,
    only_projects: bool,
    norm: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Tensor:
    """Embed a clip, select unless the request brings a selection, and return the visible tokens (B, V, D).

    Args:
        embed: gives the embeddings of the whole clip, (B, N, D), all candidates with a frame sampler; called where the
            projection does more than tile the clip.
        pixels: (B, T, C, H, W), what `embed` embeds.
        projection: the tubelet embedding, by which gradients reach the visible tubelets alone where that is possible.
        grid: (τ, h, w), of the clip that the model runs.
        only_projects: whether `embed` does nothing but call `projection`.
        norm: what the model does to each embedding before it adds positions.
    """
    reuse = only_projects and only_tiles(projection, size)
    if reuse:
        assert isinstance(projection, nn.Conv3d)
        tubelets = unfold_tubelets(pixels, size)
        embedded = embed_tubelets(tubelets, projection)
        scored = norm(embedded)
    else:
        scored = norm(embed())
    if request.selection is None:
        request.selection = policy.select(
            scored, grid, training=training, generator=request.generator, with_importance=request.with_importance
        )
    else:
        _check_selection(request.selection, policy, pixels.shape[0], grid)
    source = source_positions(request.selection.visible, request.selection.steps, grid)
    if reuse:
        assert isinstance(projection, nn.Conv3d)
        return norm(embed_chosen(embedded, tubelets, source, projection))
    return gather_tokens(scored, source)


def num_candidates(model: Any, grid: Grid) -> int:
    """How many time steps `model` takes for a clip of `grid`, patched or not."""
    return model.everest.num_candidates(grid[0]) if hasattr(model, "everest") else grid[0]


def checked_selection(selection: Any) -> TokenSelection | None:
    """`token_selection` as a caller gave it. Raises TypeError for anything but a TokenSelection or None."""
    if selection is not None and not isinstance(selection, TokenSelection):
        raise TypeError(f"token_selection must be a TokenSelection, got {type(selection).__name__}")
    return selection


def check_clips(clips: Any, expected: dict[str, int], policy: SelectionPolicy, num_frames: int, name: str) -> None:
    """Raise where a batch of clips isn't what the model takes.

    Args:
        expected: axis → size of every axis after the batch, in order.
        num_frames: of the clip that the model runs; more are expected with a frame sampler.
        name: of the argument, for the message.
    """
    if not isinstance(clips, Tensor):
        axes = ", ".join(["B", *(_LETTERS[axis] for axis in expected)])
        raise TypeError(f"expected {name} as a tensor ({axes}), got {type(clips).__name__}")
    if tuple(clips.shape[1:]) != tuple(expected.values()):
        sampler = policy.frame_sampler
        sampled = "" if sampler is None else f" ({sampler} of {num_frames})"
        raise ValueError(
            f"expected {name} (batch, {', '.join(expected)}) = (B, {', '.join(map(str, expected.values()))})"
            f"{sampled}, got {tuple(clips.shape)}"
        )
    if not clips.is_floating_point():
        raise ValueError(f"expected normalised floating-point {name}, got {clips.dtype}")


def _check_selection(selection: TokenSelection, policy: SelectionPolicy, clips: int, grid: Grid) -> None:
    if tuple(selection.grid) != grid or selection.visible.shape[0] != clips:
        raise ValueError(
            f"token_selection is for {selection.visible.shape[0]} clips of grid {tuple(selection.grid)}, "
            f"the input has {clips} of grid {grid}"
        )
    if (selection.steps is None) != (policy.frame_sampler is None):
        raise ValueError("token_selection must have `steps` exactly where the model has a frame sampler")
    for name in ("visible", "target", "steps"):
        index = getattr(selection, name)
        if index is not None and (index.ndim != 2 or index.shape[0] != clips or index.dtype != torch.int64):
            got = f"{index.dtype} {tuple(index.shape)}"
            raise ValueError(f"token_selection.{name} must be int64 ({clips}, …), got {got}")
    if selection.target is None and policy.task == "pretraining":
        raise ValueError("token_selection has no targets, which pre-training needs: select with this model")
