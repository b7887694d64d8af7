"""Host: the model classes of the VideoMAE family's own repositories, known by their structure alone.

Fine-tuning models (VideoMAE, V2, MME, MVD, EVEREST) run their own forward: their tubelet embedding returns the visible
tokens only, and their position table shows those tokens' positions for the time of a forward. Pre-training models
(VideoMAE, V2, EVEREST) get another forward, without the boolean masks of their own. mmaction2's VideoMAE classifies as
the former do.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from everest_tokens.hosts.base import Host, PatchOptions
from everest_tokens.hosts.fused_attention import FusedAttention, check_attention
from everest_tokens.hosts.patched_class import Patched, patch_class
from everest_tokens.hosts.running import SelectingModel, forward_of, running
from everest_tokens.hosts.tubelet_embedding import Geometry, TubeletEmbedding
from everest_tokens.policy import SelectionPolicy
from everest_tokens.selection import TokenSelection, source_positions
from everest_tokens.tubelets import TubeletSize, is_unhooked


class Tubelets(TubeletEmbedding):
    """A `patch_embed` that hands on the visible tokens within a forward of its model, all of them elsewhere."""

    patched_attributes = ("_only_projects",)

    def geometry(self, clips: Any = None) -> Geometry:
        size, weight = TubeletSize(int(self.tubelet_size), *self.patch_size), self.proj.weight
        height, width = self.img_size
        steps = self.num_patches // ((height // size.height) * (width // size.width))
        grid = size.grid(size.frames * steps, height, width)
        return Geometry(size, grid, (height, width), weight.shape[1], weight.shape[0])

    def only_projects(self) -> bool:
        return self._only_projects

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, C, T, H, W) → tokens without positions, (B, V, D)."""
        return self.embed(x, **kwargs) if running(self.everest) is None else super().forward(x, **kwargs)


class FineTuning(SelectingModel):
    """A classifier of which only the informative tokens reach the blocks."""

    _table: Tensor | None  # the model's own `pos_embed` where that is a plain tensor

    @property
    def pos_embed(self) -> Tensor | None:
        """The table (1, N, D); from tubelet embedding to the end of a forward the visible tokens' rows, (B, V, D)."""
        table = {**self._buffers, **self._parameters}.get("pos_embed", self._table)
        current = running(self.everest)
        if table is None or current is None or current.selection is None:
            return table
        visible = current.selection.visible
        return table[0].to(visible.device)[visible]

    @pos_embed.setter
    def pos_embed(self, table: Tensor | None) -> None:
        self._table = table


class PreTrainingEncoder(Patched):
    """Encodes the visible tokens, without a boolean mask."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) → (B, V, D)."""
        with forward_of(self.everest) as current:
            tokens = self.patch_embed(x)
            tokens = tokens + _rows(self.pos_embed, current.selection.visible, tokens.dtype)
        for block in self.blocks:
            if getattr(self, "use_checkpoint", False) or getattr(self, "with_cp", False):
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.head(self.norm(tokens))


class PreTraining(Patched):
    """Predicts the pixels of the kept tokens that are not visible (Eq. 3)."""

    def forward(
        self, x: Tensor, mask: Any = None, decode_mask: Any = None, *, token_selection: TokenSelection | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As EVEREST's own classes answer.

        Args:
            x: clips (B, C, T, H, W), normalised.
            mask, decode_mask: ignored.

        Returns:
            The prediction (B, M, frames·height·width·C) in the order of `TokenSelection.target`, and (visible_mask,
            target_mask), (B, N) bool over the tokens of `x`, True where a token is *not* in the set.
        """
        with forward_of(self.everest, token_selection) as current:
            seen = self.encoder_to_decoder(self.encoder(x))  # (B, V, decoder D)
            selection = current.selection
        asked = self.mask_token + _rows(self.pos_embed, selection.target, x.dtype)
        seen = seen + _rows(self.pos_embed, selection.visible, x.dtype)  # as these models: in the clip's dtype
        prediction = self.decoder(torch.cat([seen, asked], dim=1), selection.target.shape[1])
        outside = partial(_outside, selection=selection, tokens=self.everest.num_candidates(selection.grid[0]))
        return prediction, (outside(selection.visible), outside(selection.target))


class VideoMAEFamily(Host):
    patchable = (
        "fine-tuning models of VideoMAE, VideoMAE V2, MME, MVD and EVEREST and pre-training models of VideoMAE, V2 and"
        " EVEREST, of those repositories' own classes"
    )
    options: ClassVar[tuple[str, ...]] = ("fused_attention",)

    def recognises(self, root: nn.Module) -> bool:
        return _fine_tunes(root) or _pretrains(root) or _predicts_features(root)

    def check(self, root: Any) -> None:
        """Raise TypeError for a pre-training model whose targets are not pixels, and for what drops tokens itself."""
        name, mask_ratio = type(root).__qualname__, getattr(root, "mask_ratio", None)
        if _fine_tunes(root) and isinstance(mask_ratio, (int, float)) and mask_ratio > 0:
            raise ValueError(
                f"{name}.mask_ratio is {mask_ratio}: it drops tokens of its own, which selecting would drop a second"
                " time: set it to 0"
            )
        if unfit := _unfit(root):
            raise TypeError(f"{name}{unfit}; patchable are {self.patchable}")

    def check_options(self, root: Any, options: PatchOptions) -> None:
        super().check_options(root, options)
        for number, block in enumerate(_all_blocks(root) if options.fused_attention else ()):
            check_attention(number, block.attn)

    def task(self, root: Any) -> str:
        return "pretraining" if _pretrains(root) else "encoder"

    def embeds(self, root: Any) -> Any:
        return _encoder(root).patch_embed

    def geometry(self, root: Any, options: PatchOptions | None = None) -> Geometry:
        return Tubelets.geometry(self.embeds(root))

    def blocks(self, root: Any) -> Any:
        return _encoder(root).blocks

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        if _pretrains(root):
            return [(root.encoder.patch_embed, Tubelets), (root.encoder, PreTrainingEncoder), (root, PreTraining)]
        return [(root.patch_embed, Tubelets), (root, FineTuning)]

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        self.embeds(root)._only_projects = _only_projects(self.embeds(root))
        if not _pretrains(root):
            root._table = root.__dict__.pop("pos_embed", None)
            if getattr(root, "mcm", False):  # EVEREST's own selection
                root.mcm, root._everest_mcm = False, True
        for block in _all_blocks(root) if options.fused_attention else ():
            patch_class(block.attn, FusedAttention)

    def restore(self, root: Any, policy: SelectionPolicy, again: PatchOptions | None) -> None:
        if "_table" in root.__dict__:
            table = root.__dict__.pop("_table")
            if not hasattr(root, "pos_embed"):
                root.pos_embed = table
        if root.__dict__.pop("_everest_mcm", False):
            root.mcm = True


class PairedTubelets(TubeletEmbedding):
    """mmcv's `PatchEmbed`, which returns (tokens, their number along each axis)."""

    projection_name = "projection"
    patched_attributes = ("_geometry",)

    def geometry(self, clips: Any) -> Geometry:
        return self._geometry

    def only_projects(self) -> bool:
        return self.adap_padding is None and self.norm is None

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        return super().embed(clips, **kwargs)[0]

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """(B, C, T, H, W) → tokens without positions (B, V, D), of the grid."""
        return super().forward(x, **kwargs), self._geometry.grid


class MMActionViT(VideoMAEFamily):
    patchable = "mmaction2's VisionTransformer (vit_mae), where it returns no feature map"
    options = ()

    def recognises(self, root: nn.Module) -> bool:
        weight = getattr(getattr(getattr(root, "patch_embed", None), "projection", None), "weight", None)
        named = all(hasattr(root, name) for name in ("grid_size", "pos_embed", "blocks", "norm"))
        return named and isinstance(weight, Tensor) and weight.ndim == 5

    def geometry(self, root: Any, options: PatchOptions | None = None) -> Geometry:
        (width, channels, *kernel), (rows, columns) = root.patch_embed.projection.weight.shape, root.grid_size
        size, image = TubeletSize(*kernel), (rows * kernel[1], columns * kernel[2])
        grid = size.grid(size.frames * (root.pos_embed.shape[1] // (rows * columns)), *image)
        return Geometry(size, grid, image, channels, width)

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        return [(root.patch_embed, PairedTubelets), (root, FineTuning)]

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        root.patch_embed._geometry, root._table = self.geometry(root), None


def _unfit(root: Any) -> str:
    """Why a model that looks like one of the family is none, or ""."""
    embedding: Any = getattr(_encoder(root), "patch_embed", None)
    table = getattr(_encoder(root), "pos_embed", None)
    if isinstance(table, Tensor) and table.shape[1] != getattr(embedding, "num_patches", table.shape[1]):
        return f" has {table.shape[1]} positions for {embedding.num_patches} tubelets"
    if _predicts_features(root):
        return (
            " predicts other targets than pixels (MME: motion, MVD: teachers' features), so its kept tokens are not its"
            " loss's"
        )
    if not _pretrains(root) or isinstance(root, Patched):
        return ""
    asked = [each.name for each in _parameters(root.forward) if each.default is each.empty]
    if len(asked) > 3:
        return f".forward needs {', '.join(asked)}: its objective is more than pixels"
    if len(_parameters(root.encoder.forward)) < 2:
        return ".encoder.forward takes no mask, so it chooses its tokens, and its loss, by itself"
    return ""


def _encoder(root: Any) -> Any:
    return root.encoder if _pretrains(root) else root


def _all_blocks(root: Any) -> list[Any]:
    return [*_encoder(root).blocks, *(root.decoder.blocks if _pretrains(root) else ())]


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _embeds_tubelets(module: Any) -> bool:
    embedding = getattr(module, "patch_embed", None)
    weight = getattr(getattr(embedding, "proj", None), "weight", None)
    named = all(hasattr(embedding, name) for name in ("img_size", "patch_size", "tubelet_size", "num_patches"))
    return named and isinstance(weight, Tensor) and weight.ndim == 5 and isinstance(module.blocks, nn.ModuleList)


def _fine_tunes(model: Any) -> bool:
    own = all(hasattr(model, name) for name in ("pos_embed", "forward_features"))
    if not own or not (hasattr(model, "fc_norm") or hasattr(model, "norm")) or not _embeds_tubelets(model):
        return False
    # A mask is what a pre-training model's encoder takes.
    return "mask" not in {parameter.name for parameter in _parameters(model.forward_features)}


def _pretrains(model: Any) -> bool:
    """Whether its decoder predicts the pixels of a tubelet."""
    parts = ("encoder", "decoder", "encoder_to_decoder", "mask_token", "pos_embed")
    if not all(hasattr(model, name) for name in parts) or not _embeds_tubelets(model.encoder):
        return False
    head = getattr(model.decoder, "head", None)
    return getattr(head, "out_features", None) == math.prod(model.encoder.patch_embed.proj.weight.shape[1:])


def _predicts_features(model: Any) -> bool:
    """MME's pre-training model, with a decoder for each target, or MVD's, with one for each teacher."""
    with_decoders = hasattr(model, "encoder") and hasattr(model, "decoder") and _embeds_tubelets(model.encoder)
    teachers = any(hasattr(model, f"decoder_{name}") for name in ("img", "vid"))
    return (with_decoders and not _pretrains(model)) or (teachers and _embeds_tubelets(model))


def _rows(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """table (1, N, D), index (B, M) → (B, M, D), detached as in these models."""
    return table[0].detach().to(index.device)[index].to(dtype)


@torch.no_grad()
def _only_projects(embedding: Any) -> bool:
    """Whether an embedding is nothing but its convolution: tried, as its forward is not ours to read.

    Not tried where a hook listens to the convolution, which would hear of it.
    """
    weight = embedding.proj.weight
    if len(list(embedding.modules())) != 2 or len(list(embedding.parameters())) != len([*embedding.proj.parameters()]):
        return False
    if not is_unhooked(embedding.proj):
        return False
    if weight.is_meta:
        return True
    size = (1, weight.shape[1], 2 * weight.shape[2], *embedding.img_size)
    clip = torch.linspace(-1, 1, math.prod(size), device=weight.device).view(size).to(weight.dtype)
    projected = embedding.proj(clip).flatten(2).transpose(1, 2)
    embedded = type(embedding).forward(embedding, clip)  # not called, for the same reason
    return embedded.shape == projected.shape and torch.equal(embedded, projected)


def _outside(index: Tensor, selection: TokenSelection, tokens: int) -> Tensor:
    """Positions (B, M) in the drawn clip → (B, N) bool over the clip passed in, True where a token is not there."""
    _, height, width = selection.grid
    everything = torch.ones(index.shape[0], tokens * height * width, dtype=torch.bool, device=index.device)
    source = source_positions(index, selection.steps, selection.grid)
    return everything.scatter(1, source, torch.zeros_like(source, dtype=torch.bool))  # a trace takes no bare False
