"""What every host does with a clip: check it, embed it once, select, and hand on the visible tokens' embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from everest_tokens.camera import as_seen_later
from everest_tokens.hosts.patched_class import Patched
from everest_tokens.hosts.running import Packing, forward_of
from everest_tokens.selection import TokenSelection, check_selection, source_positions
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


@dataclass(frozen=True)
class Geometry:
    """What clips a model runs.

    Attributes:
        size: of a tubelet.
        grid: (τ, h, w) of a clip, after frame sampling.
        image: height and width of its frames.
        channels: of its frames.
        width: D, the channels of a token.
    """

    size: TubeletSize
    grid: Grid
    image: tuple[int, int]
    channels: int
    width: int

    def clip(self, steps: int, channels_first: bool) -> dict[str, int]:
        """The axes of a clip of so many time steps and their sizes, in order."""
        frames, channels = {"frames": self.size.frames * steps}, {"channels": self.channels}
        first = {**channels, **frames} if channels_first else {**frames, **channels}
        return {**first, "height": self.image[0], "width": self.image[1]}


def _as_one(clips: Tensor) -> Tensor:
    """(B, N, D) → (1, B·N, D)."""
    return clips.flatten(0, 1).unsqueeze(0)


def _packed(selection: TokenSelection, prefix: int) -> tuple[Tensor, Tensor, Packing]:
    """Lay the visible tokens of all clips end to end.

    Args:
        prefix: how many tokens each clip has in front of them.

    Returns:
        Their positions among all clips' tokens and each in its own clip's grid, (1, ΣK) int64, and where clips end.
    """
    visible, lengths = selection.visible, selection.lengths.tolist()  # type: ignore[union-attr]
    most, none = visible.shape[1], torch.arange(0, device="cpu")
    rows = [torch.arange(clip * most, clip * most + length, device="cpu") for clip, length in enumerate(lengths)]
    place = torch.cat([none, *rows]).to(visible.device, non_blocking=True)
    positions = visible.flatten()[place].unsqueeze(0)
    lengths = [length + prefix for length in lengths]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    packing = Packing(lengths, ends.to(visible.device, non_blocking=True))
    return positions + place // max(most, 1) * math.prod(selection.grid), positions, packing


class TubeletEmbedding(Patched):
    """A model's tubelet embedding, which hands on the visible tokens without their positions.

    Attributes:
        projection_name: attribute with the convolution.
    """

    projection_name: ClassVar[str] = "proj"

    def geometry(self, clips: Any) -> Geometry:
        """What the model runs, of clips that may be wrong."""
        raise NotImplementedError

    def only_projects(self) -> bool:
        """Whether the embedding does nothing but call its projection."""
        return True

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        """(B, N, D) of the whole clip by the module's own forward, where the projection does more than tile it."""
        return super().forward(clips, **kwargs)

    def normalise(self, tokens: Tensor) -> Tensor:
        """What the model does to each embedding before it adds positions."""
        return tokens

    def padded(self, clips: Tensor, size: TubeletSize) -> Tensor:
        """The clips as they are embedded."""
        return clips

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, C, H, W) or (B, C, T, H, W) → visible tokens without positions, (B, V, D)."""
        policy, geometry = self.everest, self.geometry(x)
        self.check_clips(x, geometry)
        size, grid = geometry.size, geometry.grid
        with forward_of(policy) as current:
            selection, only_selects = current.given, current.only_selects
            if policy.packs if selection is None else selection.lengths is not None:
                packs = policy.selector if selection is None else "the selector of token_selection"
                if torch.compiler.is_compiling() or torch.jit.is_tracing():
                    raise ValueError(f"a graph can't hold numbers of tokens that differ by clip: {packs}")
                policy.host.check_packed(policy.root, packs)
            if not (torch.compiler.is_compiling() or x.shape[0] or only_selects or policy.runs_without_clips):
                raise ValueError(f"expected at least one clip, got {policy.host.argument} {tuple(x.shape)}")
            if selection is not None:
                candidates = None if policy.frame_sampler is None else policy.num_candidates(grid[0])
                check_selection(selection, grid, x.shape[0], policy.task, candidates)
            clips, projection = self.padded(x, size), getattr(self, self.projection_name)
            tiled = self.only_projects() and only_tiles(projection, size)
            if tiled:
                tubelets = unfold_tubelets(self.frames_first(clips), size)
                embedded = embed_tubelets(tubelets, projection)
                scored = self.normalise(embedded)
            else:
                scored = self.normalise(self.embed(clips, **kwargs))
            if selection is None:
                selection = policy.select(
                    scored,
                    grid,
                    training=self.training,
                    generator=current.generator,
                    with_importance=only_selects,
                    seen_before=partial(self.seen_before, clips, size, tiled, kwargs),
                    # without what a convolution leaves over
                    frames=self.frames_first(clips)[..., : grid[1] * size.height, : grid[2] * size.width],
                )
            current.selection, current.visible = selection, selection.visible
            if selection.lengths is None:
                source = source_positions(selection.visible, selection.steps, grid)
            else:
                source, current.visible, current.packing = _packed(selection, policy.host.prefix)
                scored = _as_one(scored)
                if tiled:
                    embedded, tubelets = _as_one(embedded), _as_one(tubelets)
        if tiled:
            return self.normalise(embed_chosen(embedded, tubelets, source, projection))
        return gather_tokens(scored, source)

    def frames_first(self, clips: Tensor) -> Tensor:
        """The model's own layout → (B, T, C, H, W), and back: the two differ by one exchange, if at all."""
        return clips.transpose(1, 2) if self.everest.host.channels_first else clips

    def seen_before(
        self, clips: Tensor, size: TubeletSize, tiled: bool, kwargs: dict[str, Any], steps: Tensor | None
    ) -> Tensor:
        """Embed what each token's place showed one step earlier, as the camera sees it in the token's own step.

        Args:
            clips: of the candidate steps, as they are embedded.
            tiled: whether the projection alone embeds them.
            kwargs: of `embed`.
            steps: (B, τ) int64, those that are drawn; None for all.

        Returns:
            (B, N, D) without grad.
        """
        frames = self.frames_first(clips)
        if steps is not None:
            drawn = steps.unsqueeze(2) * size.frames + torch.arange(size.frames, device=steps.device)
            frames = frames[torch.arange(frames.shape[0], device=steps.device).unsqueeze(1), drawn.flatten(1)]
        frames = as_seen_later(frames, size.frames)
        if tiled:
            embedded = embed_tubelets(unfold_tubelets(frames, size), getattr(self, self.projection_name))
        else:
            embedded = self.embed(self.frames_first(frames), **kwargs)
        return self.normalise(embedded).detach()

    def check_clips(self, clips: Any, geometry: Geometry) -> None:
        """Raise where a batch of clips isn't what the model takes."""
        host, steps, sampler = self.everest.host, geometry.grid[0], self.everest.frame_sampler
        expected = geometry.clip(self.everest.num_candidates(steps), host.channels_first)
        if not isinstance(clips, Tensor):
            axes = ", ".join(["B", *(_LETTERS[axis] for axis in expected)])
            raise TypeError(f"expected {host.argument} as a tensor ({axes}), got {type(clips).__name__}")
        if tuple(clips.shape[1:]) != tuple(expected.values()):
            frames, taken = geometry.size.frames * steps, expected["frames"]
            sampled = f" ({sampler} draws {frames} of them: pipeline(…, num_frames={taken}))" if sampler else ""
            raise ValueError(
                f"expected {host.argument} (batch, {', '.join(expected)}) = (B, "
                f"{', '.join(map(str, expected.values()))}){sampled}, got {tuple(clips.shape)}"
            )
        if not clips.is_floating_point():
            raise ValueError(f"expected normalised floating-point {host.argument}, got {clips.dtype}")
