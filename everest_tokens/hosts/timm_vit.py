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

from everest_tokens.hosts.base import Host, PatchOptions
from everest_tokens.hosts.patched_class import Patched, own_class
from everest_tokens.hosts.running import SelectingModel, forward_of, running
from everest_tokens.hosts.tubelet_embedding import Geometry, TubeletEmbedding
from everest_tokens.policy import SelectionPolicy
from everest_tokens.positions import ConstantTable, sincos_table
from everest_tokens.tubelets import Grid, TubeletSize, is_unhooked

logger = logging.getLogger(__name__)

TEMPORAL_EMBEDDINGS = ("sincos", "none")
_CLASSES = {("timm.models.vision_transformer", "VisionTransformer"), ("timm.models.eva", "Eva")}
_POSITIONS = {"VisionTransformer._pos_embed", "VisionTransformerDistilled._pos_embed", "Eva._pos_embed"}
_NO_TABLE_MAGNITUDE = 0.02  # what timm initialises position embeddings with, for models that have none


class Tubelets(TubeletEmbedding):
    """timm's `PatchEmbed` over tubelets, which hands on the visible tokens."""

    patched_attributes = ("num_frames",)
    num_frames: int

    def geometry(self, clips: Any) -> Geometry:
        """Also for any height and width that the image model takes."""
        if not isinstance(clips, Tensor):
            raise TypeError(f"expected clips as a tensor (B, C, T, H, W), got {type(clips).__name__}")
        if clips.ndim != 5:
            raise ValueError(
                f"expected clips (B, C, T, H, W) for a patched model, got {tuple(clips.shape)}: unpatch_videomae gives"
                " the image model back"
            )
        weight, strict = self.proj.weight, self.img_size is not None and self.strict_img_size
        size = TubeletSize(weight.shape[2], *self.patch_size)
        height, width = image = tuple(self.img_size if strict else clips.shape[-2:])
        if self.dynamic_img_pad:
            height, width = height + -height % size.height, width + -width % size.width
        elif not strict and (height % size.height or width % size.width):
            raise ValueError(f"{height}×{width} pixels are not divisible by the patch size {tuple(self.patch_size)}")
        return Geometry(size, size.grid(self.num_frames, height, width), image, weight.shape[1], weight.shape[0])

    def padded(self, clips: Tensor, size: TubeletSize) -> Tensor:
        height, width = clips.shape[-2:]
        if not self.dynamic_img_pad:
            return clips
        return nn.functional.pad(clips, (0, -width % size.width, 0, -height % size.height))

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        return self.proj(clips).flatten(2).transpose(1, 2)

    def normalise(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, C, T, H, W) → visible tokens without positions, (B, V, D)."""
        current = _current(self)
        if current.ready is not None:
            return current.ready
        return super().forward(x)


class VideoTransformer(SelectingModel):
    """A timm image model over the kept tokens of a clip."""

    patched_attributes = ("_steps",)
    _steps: ConstantTable | None  # (τ, D) float32, the temporal embedding at root mean square 1

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's with `output_fmt="NLC"`: (B, V, D) from each block. Raises ValueError for "NCHW"."""
        output_fmt = args[4] if len(args) > 4 else kwargs.get("output_fmt", "NCHW")
        if output_fmt != "NLC":
            raise ValueError(f"the kept tokens fill no grid: expected output_fmt='NLC', got {output_fmt!r}")
        with forward_of(self.everest) as current:
            current.ready = self.patch_embed(x)
            image = x[:, :, 0]  # timm reads its shape
            try:
                return super().forward_intermediates(image, *args, **kwargs)  # type: ignore[misc]
            finally:
                current.ready = None

    def _pos_embed(self, tokens: Tensor) -> Any:
        """Adds the places' and the steps' positions and the prefix tokens; Eva also wants the rotary positions."""
        selection = _current(self).selection
        visible, (_, height, width) = selection.visible, selection.grid
        place, step = visible % (height * width), visible // (height * width)

        named = (getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        prefix = [token for token in named if token is not None]
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


def _current(module: Patched) -> Any:
    """The forward that `module` runs in. Raises RuntimeError outside of one."""
    current = running(module.everest)
    if current is None:
        raise RuntimeError(
            f"{type(module).__qualname__} of a patched model was called outside its model's forward: call the model,"
            " forward_features or forward_intermediates, or unpatch_videomae(model) for the image model"
        )
    return current


class TimmViT(Host):
    patchable = (
        "timm's VisionTransformer (ViT, DeiT, FlexiViT, CLIP, SigLIP, DINOv2) and Eva (EVA-02, DINOv3) image models"
    )
    options = ("num_frames", "tubelet_size", "temporal_embedding")  # its attention is fused already

    def recognises(self, root: nn.Module) -> bool:
        return any((base.__module__, base.__name__) in _CLASSES for base in type(root).__mro__)

    def check(self, root: Any) -> None:
        """Raise TypeError or ValueError for a timm model whose parts a patch would silently replace or contradict."""
        name, embedding = type(root).__qualname__, root.patch_embed
        own: Any = own_class(root)
        embeds = own_class(embedding)
        usual = own._pos_embed.__qualname__ in _POSITIONS
        if not usual or (embeds.__module__, embeds.__name__) != ("timm.layers.patch_embed", "PatchEmbed"):
            raise TypeError(f"{name} embeds patches or positions in its own way; patchable are {self.patchable}")
        if not isinstance(root, VideoTransformer):
            proj = embedding.proj
            plain = type(proj) is nn.Conv2d and is_unhooked(proj)
            if not plain or proj.kernel_size != proj.stride or any(proj.padding) or proj.groups != 1:
                raise TypeError(f"expected {name}.patch_embed.proj as a Conv2d over patches without hooks, got {proj}")
        if getattr(getattr(root, "attn_pool", None), "pos_embed", None) is not None:
            raise TypeError(f"{name} pools with positions of its own, which kept tokens don't have")
        if root.pos_embed is not None and _prefix_positions(root) not in (0, root.num_prefix_tokens):
            raise TypeError(
                f"{name} has {_prefix_positions(root)} positions for {root.num_prefix_tokens} prefix tokens"
            )
        if getattr(root.patch_drop, "prob", 0):
            raise ValueError(
                "patch dropout and token selection both drop tokens: build the model with patch_drop_rate=0"
            )

    def check_options(self, root: Any, options: PatchOptions) -> None:
        super().check_options(root, options)
        for name in ("num_frames", "tubelet_size"):
            value = getattr(options, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if options.temporal_embedding not in TEMPORAL_EMBEDDINGS:
            known = ", ".join(map(repr, TEMPORAL_EMBEDDINGS))
            raise ValueError(f"temporal_embedding must be one of {known}, got {options.temporal_embedding!r}")
        if options.temporal_embedding == "sincos" and root.embed_dim % 2:
            raise ValueError(f"temporal_embedding='sincos' needs an even width, got {root.embed_dim}")

    def embeds(self, root: Any) -> Any:
        return root.patch_embed

    def blocks(self, root: Any) -> Any:
        return root.blocks

    def geometry(self, root: Any, options: PatchOptions | None = None) -> Geometry:
        embedding: Any = root.patch_embed
        weight, image = embedding.proj.weight, embedding.img_size
        if options is None:
            tubelet, frames = weight.shape[2], embedding.num_frames
        else:
            tubelet, frames = options.tubelet_size, options.num_frames
        size = TubeletSize(tubelet, *embedding.patch_size)
        return Geometry(size, size.grid(frames, *image), image, weight.shape[1], weight.shape[0])

    def example(self, root: Any) -> tuple[tuple[int, ...], Grid, int]:
        """An image before patching."""
        if isinstance(root, VideoTransformer):
            return super().example(root)
        embedding, (width, channels, *_) = root.patch_embed, root.patch_embed.proj.weight.shape
        return (1, channels, *embedding.img_size), (1, *embedding.grid_size), width

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        return [(root.patch_embed, Tubelets), (root, VideoTransformer)]

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        embedding = root.patch_embed
        root._steps = None
        if options.temporal_embedding == "sincos":
            table = sincos_table(options.num_frames // options.tubelet_size, root.embed_dim)
            root._steps = ConstantTable(table * math.sqrt(2), embedding.proj.weight.device)
        if not hasattr(embedding, "_everest_image"):  # else patched again, with the kernel that it has
            _inflate(embedding, options.tubelet_size)
        embedding.num_frames = options.num_frames

    def replaces_parameters(self, root: Any, options: PatchOptions | None) -> bool:
        """All but another patch with tubelets of the same size gives it another projection."""
        again = isinstance(root, VideoTransformer) and options is not None
        return not (again and root.patch_embed.proj.weight.shape[2] == options.tubelet_size)  # type: ignore[union-attr]

    def restore(self, root: Any, policy: SelectionPolicy, again: PatchOptions | None) -> None:
        """Give the image's kernel back: as it was where the tubelets' is untouched, else that one summed over time.

        Patched `again` with tubelets of the same size, the model keeps its projection.
        """
        embedding, proj = root.patch_embed, root.patch_embed.proj
        if type(proj) is not nn.Conv3d:
            adapter = f"{type(proj).__module__}.{type(proj).__qualname__}"
            raise TypeError(f"patch_embed.proj is a {adapter} now: unload the adapter first")
        video, (image,) = embedding.proj, embedding._everest_image
        weight = video.weight.detach()
        if again is not None and again.tubelet_size == weight.shape[2]:
            return
        untouched = weight.is_meta or torch.equal(weight, _inflated(image.weight, weight.shape[2]).to(weight))
        image.to(weight.device, weight.dtype)
        image.weight.requires_grad_(video.weight.requires_grad)
        if not untouched:
            image.weight = nn.Parameter(weight.sum(dim=2), video.weight.requires_grad)
            logger.info("the patch embedding was trained on tubelets: the image model gets its kernel summed over time")
        image.bias = video.bias
        embedding.proj = image.train(video.training)
        del embedding._everest_image


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


def _inflated(kernel: Tensor, frames: int) -> Tensor:
    """(D, C, p, q) → (D, C, frames, p, q), whose sum over time is the kernel."""
    return (kernel.detach() / frames).unsqueeze(2).repeat(1, 1, frames, 1, 1)


def _prefix_positions(root: Any) -> int:
    """How many rows of the position embedding belong to prefix tokens."""
    return root.pos_embed.shape[1] - root.patch_embed.num_patches
