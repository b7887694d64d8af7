"""What every host does with a clip: check it, embed it once, select, and hand on the visible tokens' embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from everest_tokens.hosts.patched_class import Patched
from everest_tokens.hosts.running import forward_of
from everest_tokens.policy import SelectionPolicy
from everest_tokens.selection import check_selection, source_positions
from everest_tokens.tubelets import (
    Grid,
    TubeletSize,
    embed_chosen,
    embed_tubelets,
    gather_tokens,
    only_tiles,
    unfold_tubelets,
)

_LETTERS = {"frames": "T", "channels": "C", "height": "H", "width": "W"}


class TubeletEmbedding(Patched):
    """A model's tubelet embedding, which hands on the visible tokens without their positions.

    Attributes:
        projection_name: attribute with the convolution.
        channels_first: whether clips come as (B, C, T, H, W), else (B, T, C, H, W).
        argument: what the model calls its clips, for messages.
    """

    projection_name: ClassVar[str] = "projection"
    channels_first: ClassVar[bool] = False
    argument: ClassVar[str] = "pixel_values"

    def geometry(self, clips: Any) -> tuple[TubeletSize, Grid, tuple[int, int]]:
        """The tubelets' size, the grid (τ, h, w) that the model runs, and the clips' height and width."""
        raise NotImplementedError

    def only_projects(self) -> bool:
        """Whether the embedding does nothing but call its projection."""
        return True

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        """(B, N, D) of the whole clip by the module's own forward, where the projection does more than tile it."""
        return super().forward(clips, **kwargs)

    def channels(self) -> int:
        """How many channels a clip has."""
        return getattr(self, self.projection_name).weight.shape[1]

    def runs_without_clips(self) -> bool:
        """Whether the model's blocks take a batch of 0 clips."""
        return True

    def normalise(self, tokens: Tensor) -> Tensor:
        """What the model does to each embedding before it adds positions."""
        return tokens

    def padded(self, clips: Tensor, size: TubeletSize) -> Tensor:
        """The clips as they are embedded."""
        return clips

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, C, H, W) or (B, C, T, H, W) → visible tokens without positions, (B, V, D)."""
        policy = self.everest
        size, grid, (height, width) = self.geometry(x)
        projection = getattr(self, self.projection_name)
        frames = size.frames * policy.num_candidates(grid[0])
        expected = {"frames": frames, "channels": self.channels(), "height": height, "width": width}
        if self.channels_first:
            expected = {"channels": self.channels(), **expected}
        check_clips(x, expected, policy, size.frames * grid[0], self.argument)
        clips = self.padded(x, size)

        tiled = self.only_projects() and only_tiles(projection, size)
        if tiled:
            tubelets = unfold_tubelets(clips.transpose(1, 2) if self.channels_first else clips, size)
            embedded = embed_tubelets(tubelets, projection)
            scored = self.normalise(embedded)
        else:
            scored = self.normalise(self.embed(clips, **kwargs))
        with forward_of(policy) as current:
            none = not torch.compiler.is_compiling() and x.shape[0] == 0
            if none and not current.only_selects and not self.runs_without_clips():
                raise ValueError(f"expected at least one clip, got {self.argument} {tuple(x.shape)}")
            selection = current.given
            if selection is None:
                selection = policy.select(
                    scored,
                    grid,
                    training=self.training,
                    generator=current.generator,
                    with_importance=current.only_selects,
                )
            else:
                check_selection(selection, grid, clips.shape[0], policy.task, policy.frame_sampler is not None)
            current.selection = selection
        source = source_positions(selection.visible, selection.steps, grid)
        if tiled:
            return self.normalise(embed_chosen(embedded, tubelets, source, projection))
        return gather_tokens(scored, source)


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
