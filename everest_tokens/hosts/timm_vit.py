"""Host: timm's image VisionTransformer and Eva, made to attend over the kept tubelets of a clip.

The patch embedding is inflated over time, so that on a static clip every tubelet's token is the image's; prefix tokens
are always kept; blocks, pooling and head are timm's own.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.patched_class import Patched, patch_class, restore_class
from everest_tokens.hosts.selecting_model import SelectingModel, select_by
from everest_tokens.hosts.stochastic_depth import (
    check_stochastic_depth,
    restore_stochastic_depth,
    set_stochastic_depth,
)
from everest_tokens.hosts.visible_tokens import SelectionRequest, check_clips, num_candidates, visible_tokens
from everest_tokens.positions import ConstantTable, sincos_table
from everest_tokens.selection import SelectionPolicy, TokenSelection
from everest_tokens.selectors import Grid
from everest_tokens.tubelets import TubeletSize, is_unhooked

logger = logging.getLogger(__name__)

PATCHABLE = "timm's VisionTransformer (ViT, DeiT, FlexiViT, CLIP, SigLIP, DINOv2) and Eva (EVA-02, DINOv3) image models"
TEMPORAL_EMBEDDINGS = ("sincos", "none")
_CLASSES = {("timm.models.vision_transformer", "VisionTransformer"), ("timm.models.eva", "Eva")}
_POSITIONS = {"VisionTransformer._pos_embed", "VisionTransformerDistilled._pos_embed", "Eva._pos_embed"}
_NO_TABLE_MAGNITUDE = 0.02  # what timm initialises position embeddings with, for models that have none


class TubeletEmbedding(Patched):
    """timm's `PatchEmbed` over tubelets, which returns the visible tokens."""

    everest: SelectionPolicy
    request: SelectionRequest | None
    ready: Tensor | None  # tokens that this forward has embedded already
    num_frames: int

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) → visible tokens without positions, (B, V, D)."""
        if self.ready is not None:
            return self.ready
        assert self.request is not None
        clips = x
        if not isinstance(clips, Tensor):
            raise TypeError(f"expected clips as a tensor (B, C, T, H, W), got {type(clips).__name__}")
        if clips.ndim != 5:
            raise ValueError(
                f"expected clips (B, C, T, H, W) for a patched model, got {tuple(clips.shape)}: unpatch_videomae gives"
                " the image model back"
            )
        size, grid = self._geometry(clips)
        height, width = clips.shape[-2:] if self._takes_any_size() else self.img_size
        frames = size.frames * self.everest.num_candidates(grid[0])
        expected = {"channels": self.proj.weight.shape[1], "frames": frames, "height": height, "width": width}
        check_clips(clips, expected, self.everest, self.num_frames, "clips")
        if self.dynamic_img_pad:
            clips = nn.functional.pad(clips, (0, -width % size.width, 0, -height % size.height))
        return visible_tokens(
            self.everest,
            self.request,
            lambda: self.proj(clips).flatten(2).transpose(1, 2),
            clips.transpose(1, 2),
            self.proj,
            size,
            grid,
            training=self.training,
            only_projects=True,
            norm=self.norm,
        )

    def _takes_any_size(self) -> bool:
        return self.img_size is None or not self.strict_img_size

    def _geometry(self, clips: Tensor) -> tuple[TubeletSize, Grid]:
        """The tubelet size and the grid (τ, h, w) of these clips."""
        size = TubeletSize(self.proj.weight.shape[2], *self.patch_size)
        if not self._takes_any_size():
            return size, size.grid(self.num_frames, *self.img_size)
        height, width = clips.shape[-2:]
        if self.dynamic_img_pad:
            height, width = height + -height % size.height, width + -width % size.width
        elif height % size.height or width % size.width:
            raise ValueError(f"{height}×{width} pixels are not divisible by the patch size {tuple(self.patch_size)}")
        return size, size.grid(self.num_frames, height, width)


class VideoTransformer(SelectingModel):
    """A timm image model over the kept tokens of a clip."""

    patch_embed: TubeletEmbedding
    _steps: ConstantTable | None  # (τ, D) float32, the temporal embedding at root mean square 1

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's with `output_fmt="NLC"`: (B, V, D) from each block. Raises ValueError for "NCHW"."""
        output_fmt = args[4] if len(args) > 4 else kwargs.get("output_fmt", "NCHW")
        if output_fmt != "NLC":
            raise ValueError(f"the kept tokens fill no grid: expected output_fmt='NLC', got {output_fmt!r}")
        embedding = self.patch_embed
        embedding.request = SelectionRequest(self._given)
        try:
            embedding.ready = embedding(x)
            image = x[:, :, 0]  # timm reads its shape
            return super().forward_intermediates(image, *args, **kwargs)  # type: ignore[misc]
        finally:
            embedding.request = embedding.ready = None

    def _pos_embed(self, tokens: Tensor) -> Any:
        """Adds the places' and the steps' positions and the prefix tokens; Eva also wants the rotary positions."""
        assert self.patch_embed.request is not None
        selection = self.patch_embed.request.selection
        assert selection is not None
        visible, (_, height, width) = selection.visible, selection.grid
        place, step = visible % (height * width), visible // (height * width)

        prefix: list[Tensor] = []
        for name in ("cls_token", "dist_token", "reg_token"):
            if getattr(self, name, None) is not None:
                prefix.append(getattr(self, name))
        first = torch.cat(prefix, dim=1) if prefix else None  # (1, P, D)
        magnitude: Tensor | float = _NO_TABLE_MAGNITUDE
        if self.pos_embed is not None:
            table, count = self.pos_embed, _prefix_positions(self)
            magnitude = table[:, count:].detach().float().square().mean().sqrt()
            if self.dynamic_img_size:
                table = resample_abs_pos_embed(
                    table, new_size=[height, width], old_size=self.patch_embed.grid_size, num_prefix_tokens=count
                )
            if first is not None and count:
                first = first + table[:, :count]
            tokens = tokens + table[0, count:][place]
        if self._steps is not None:
            steps = self._steps.to(tokens.device) * magnitude
            tokens = tokens + steps.to(tokens.dtype)[step]
        if first is not None:
            tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        tokens = self.pos_drop(tokens)
        return (tokens, self._rotary(place, height, width)) if hasattr(self, "rope") else tokens

    def _rotary(self, place: Tensor, height: int, width: int) -> Tensor | None:
        """The places' rotary embeddings: (B, 1, V, d), or (depth, B, heads, V, d) where each block has its own."""
        if self.rope is None:
            return None
        own_grid = not self.dynamic_img_size and hasattr(self.rope, "feat_shape")
        rotary = self.rope.get_embed() if own_grid else self.rope.get_embed(shape=[height, width])
        if rotary.ndim == 2:
            return rotary[place].unsqueeze(1)
        return rotary[:, :, place].movedim(2, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self._steps is not None:
            self._steps.to(self.patch_embed.proj.weight.device)
        return self


def recognises(model: nn.Module) -> bool:
    return any((base.__module__, base.__name__) in _CLASSES for base in type(model).__mro__)


def check_patchable(model: Any) -> None:
    """Raise TypeError or ValueError for a timm model whose parts a patch would silently replace or contradict."""
    name = type(model).__qualname__
    own: Any = model._everest_bases[1] if isinstance(model, VideoTransformer) else type(model)
    embedding = model.patch_embed
    embeds = embedding._everest_bases[1] if isinstance(embedding, TubeletEmbedding) else type(embedding)
    if own._pos_embed.__qualname__ not in _POSITIONS or (embeds.__module__, embeds.__name__) != (
        "timm.layers.patch_embed",
        "PatchEmbed",
    ):
        raise TypeError(f"{name} embeds patches or positions in its own way; patchable are {PATCHABLE}")
    if not isinstance(model, VideoTransformer):
        proj = embedding.proj
        if isinstance(embedding, TubeletEmbedding):
            raise TypeError("a model that this one is part of is patched already: unpatch that first")
        plain = type(proj) is nn.Conv2d and is_unhooked(proj)
        if not plain or proj.kernel_size != proj.stride or any(proj.padding) or proj.groups != 1:
            raise TypeError(f"expected {name}.patch_embed.proj as a Conv2d over patches without hooks, got {proj}")
    if getattr(getattr(model, "attn_pool", None), "pos_embed", None) is not None:
        raise TypeError(f"{name} pools with positions of its own, which kept tokens don't have")
    if model.pos_embed is not None and _prefix_positions(model) not in (0, model.num_prefix_tokens):
        raise TypeError(f"{name} has {_prefix_positions(model)} positions for {model.num_prefix_tokens} prefix tokens")
    if getattr(model.patch_drop, "prob", 0):
        raise ValueError("patch dropout and token selection both drop tokens: build the model with patch_drop_rate=0")


def task_of(model: nn.Module) -> str:
    return "encoder"


def example(model: Any) -> tuple[tuple[int, ...], Grid, int]:
    """The shape of a clip (an image before patching) as `forward` takes it, its grid (τ, h, w), a token's channels."""
    embedding = model.patch_embed
    weight = embedding.proj.weight
    if not isinstance(model, VideoTransformer):
        return (1, weight.shape[1], *embedding.img_size), (1, *embedding.grid_size), weight.shape[0]
    size = TubeletSize(weight.shape[2], *embedding.patch_size)
    grid = size.grid(embedding.num_frames, *embedding.img_size)
    frames = size.frames * num_candidates(model, grid)
    return (1, weight.shape[1], frames, *embedding.img_size), grid, weight.shape[0]


def model_grid(model: Any, options: PatchOptions) -> Grid:
    """The grid of the clips that it will take. Raises ValueError for options that don't fit it."""
    options.refuse_others(
        "a timm model", "drop_path", "num_frames", "tubelet_size", "temporal_embedding"
    )  # its attention is fused already
    check_stochastic_depth(model.blocks, options.drop_path)
    for name in ("num_frames", "tubelet_size"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if options.temporal_embedding not in TEMPORAL_EMBEDDINGS:
        known = ", ".join(map(repr, TEMPORAL_EMBEDDINGS))
        raise ValueError(f"temporal_embedding must be one of {known}, got {options.temporal_embedding!r}")
    if options.temporal_embedding == "sincos" and model.embed_dim % 2:
        raise ValueError(f"temporal_embedding='sincos' needs an even width, got {model.embed_dim}")
    embedding = model.patch_embed
    return TubeletSize(options.tubelet_size, *embedding.patch_size).grid(options.num_frames, *embedding.img_size)


def attach(model: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
    """Make `model` take clips and select by `policy`. It must be unpatched."""
    embedding = model.patch_embed
    model._given = model._steps = None
    if options.temporal_embedding == "sincos":
        table = sincos_table(options.num_frames // options.tubelet_size, model.embed_dim)
        model._steps = ConstantTable(table * math.sqrt(2), embedding.proj.weight.device)
    if not hasattr(embedding, "_everest_image"):  # else patched again, with the kernel that it has
        _inflate(embedding, options.tubelet_size)
    patch_class(embedding, TubeletEmbedding)
    embedding.request = embedding.ready = None
    embedding.num_frames = options.num_frames
    embedding.everest = model.everest = policy
    patch_class(model, VideoTransformer)
    if options.drop_path:
        set_stochastic_depth(model.blocks, options.drop_path)


def keeps_projection(model: Any, options: PatchOptions) -> bool:
    """Whether a patch leaves the projection as it is: the model is patched already, with tubelets of the same size."""
    return isinstance(model, VideoTransformer) and model.patch_embed.proj.weight.shape[2] == options.tubelet_size


def _inflate(embedding: Any, frames: int) -> None:
    """Replace the image's projection by one over tubelets."""
    image = embedding.proj
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced below
        kernel = (frames, *image.kernel_size)
        video = nn.Conv3d(image.in_channels, image.out_channels, kernel, kernel, bias=image.bias is not None)
    video.weight = nn.Parameter(_inflated(image.weight, frames), image.weight.requires_grad)
    video.bias = image.bias
    embedding.proj = video.train(image.training)
    embedding._everest_image = (image,)  # in a tuple, so that it is no part of the model


def detach(model: Any, again: PatchOptions | None) -> None:
    """Give the image model back: as it was where the kernel is untouched, else with the kernel summed over time.

    Patched `again` with tubelets of the same size, it keeps its projection.
    """
    embedding = model.patch_embed
    if type(embedding.proj) is not nn.Conv3d:
        adapter = f"{type(embedding.proj).__module__}.{type(embedding.proj).__qualname__}"
        raise TypeError(f"patch_embed.proj is a {adapter} now: unload the adapter first")
    restore_stochastic_depth(model.blocks)
    video, (image,) = embedding.proj, embedding._everest_image
    restore_class(embedding)
    for name in ("request", "ready", "num_frames", "everest"):
        delattr(embedding, name)
    weight = video.weight.detach()
    if again is None or again.tubelet_size != weight.shape[2]:
        untouched = weight.is_meta or torch.equal(weight, _inflated(image.weight, weight.shape[2]).to(weight))
        image.to(weight.device, weight.dtype)
        image.weight.requires_grad_(video.weight.requires_grad)
        if not untouched:
            image.weight = nn.Parameter(weight.sum(dim=2), video.weight.requires_grad)
            logger.info("the patch embedding was trained on tubelets: the image model gets its kernel summed over time")
        image.bias = video.bias
        embedding.proj = image.train(video.training)
        del embedding._everest_image
    restore_class(model)
    del model._given, model._steps, model.everest


def select(model: Any, clips: Tensor, generator: torch.Generator | None) -> TokenSelection:
    """Select without running the encoder."""
    return select_by(model.patch_embed, clips, generator)


def _inflated(kernel: Tensor, frames: int) -> Tensor:
    """(D, C, p, q) → (D, C, frames, p, q), whose sum over time is the kernel."""
    return (kernel.detach() / frames).unsqueeze(2).repeat(1, 1, frames, 1, 1)


def _prefix_positions(model: Any) -> int:
    """How many rows of the position embedding belong to prefix tokens."""
    return model.pos_embed.shape[1] - model.patch_embed.num_patches
