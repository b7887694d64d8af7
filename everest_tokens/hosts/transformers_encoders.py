"""Hosts: transformers' V-JEPA 2, ViViT and TimeSformer with joint attention, patched in place.

Models and blocks keep their class, which carries transformers' capturing of hidden states and attentions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.timesformer import modeling_timesformer
from transformers.models.vivit import modeling_vivit

from everest_tokens.hosts.base import Host
from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.patched_class import Patched, own_class
from everest_tokens.hosts.running import forward_of, running
from everest_tokens.hosts.stochastic_depth import (
    add_drop_path,
    remove_drop_path,
    restore_stochastic_depth,
    set_stochastic_depth,
)
from everest_tokens.hosts.tubelet_embedding import TubeletEmbedding
from everest_tokens.policy import SelectionPolicy
from everest_tokens.tubelets import Grid, TubeletSize, gather_tokens

try:
    from transformers.models.vjepa2 import modeling_vjepa2
except ImportError:  # before transformers 4.53
    modeling_vjepa2 = None

Geometry = tuple[TubeletSize, Grid, tuple[int, int]]


class Tubelets(TubeletEmbedding):
    """A patch embedding of transformers that hands on the visible tokens, t-major."""

    def geometry(self, clips: Any) -> Geometry:
        return self.everest.host.geometry(self.everest.root, clips)

    def runs_without_clips(self) -> bool:
        # Attentions leave a size of their views to be worked out; ViViT's names all of them in older releases.
        return any(hasattr(module, "transpose_for_scores") for module in self.everest.root.modules())  # type: ignore[union-attr]


class TransformersEncoder(Host):
    """A backbone with a patch embedding inside its embeddings, alone or in a model with a head.

    Attributes:
        modeling: transformers' module of the model; None where the installed version has none.
        backbone_class, backbone_name: the backbone's class, and where a model with a head keeps it.
        patches, embeddings: mixins of those two modules.
        refused: arguments of `forward` that choose among all tokens of a clip.
    """

    options = ("drop_path",)
    modeling: ClassVar[Any]
    backbone_class: ClassVar[str]
    backbone_name: ClassVar[str]
    patches: ClassVar[type[Tubelets]]
    embeddings: ClassVar[type[Patched]]
    refused: ClassVar[tuple[str, ...]] = ()

    def backbone(self, root: Any) -> Any:
        return getattr(root, self.backbone_name, root)

    def recognises(self, root: nn.Module) -> bool:
        return isinstance(self.backbone(root), getattr(self.modeling, self.backbone_class, ()))

    def check(self, root: Any) -> None:
        """Raise TypeError for parts whose own forward a patch would silently replace."""
        if not isinstance(root, PreTrainedModel):
            raise TypeError(
                f"{type(root).__qualname__} has a {self.backbone_class} inside: patch that,"
                f" patch_videomae(model.{self.backbone_name})"
            )
        for cls in (own_class(module) for module, _ in self.wraps(root)):
            if cls.__module__ != self.modeling.__name__:
                raise TypeError(f"{cls.__qualname__} is not transformers' own; patchable are {self.patchable}")

    def embeds(self, root: Any) -> nn.Module:
        return self.backbone(root).embeddings

    def geometry(self, root: Any, clips: Any = None) -> Geometry:
        """The tubelets' size, the grid (τ, h, w) that the model runs (of these clips), and their height and width."""
        size, image = _tubelet(root.config), _pair(root.config.image_size)
        return size, size.grid(root.config.num_frames, *image), image

    def grid(self, root: Any, options: PatchOptions) -> Grid:
        return self.geometry(root)[1]

    def example(self, root: Any) -> tuple[tuple[int, ...], Grid, int]:
        size, grid, image = self.geometry(root)
        steps = self.num_candidates(root, grid)
        weight = getattr(self.embeds(root).patch_embeddings, self.patches.projection_name).weight
        return (1, size.frames * steps, weight.shape[1], *image), grid, weight.shape[0]

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        embeddings: Any = self.embeds(root)
        return [(embeddings.patch_embeddings, self.patches), (embeddings, self.embeddings)]

    def entries(self, root: Any) -> list[nn.Module]:
        backbone = self.backbone(root)
        return [backbone] if backbone is root else [backbone, root]

    def check_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            kwargs = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        for name in self.refused:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} chooses among all tokens of a clip, a patched model runs its own selection")

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        if options.drop_path:
            set_stochastic_depth(self.backbone(root).encoder.layer, options.drop_path)

    def restore(self, root: Any, again: PatchOptions | None) -> None:
        restore_stochastic_depth(self.backbone(root).encoder.layer)


class VJEPA2Tubelets(Tubelets):
    projection_name = "proj"
    argument = "pixel_values_videos"

    def padded(self, clips: Tensor, size: TubeletSize) -> Tensor:
        return clips.to(self.proj.weight.dtype)

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        return super().embed(clips.transpose(1, 2), **kwargs)


class VJEPA2Embeddings(Patched):
    def forward(self, pixel_values_videos: Tensor) -> Tensor:
        """(B, T, C, H, W) → visible tokens, (B, V, D); their positions are the layers' rotations."""
        return self.patch_embeddings(pixel_values_videos)


class VJEPA2Encoder(Patched):
    """Hands each layer the visible tokens' positions as an argument: recomputed, it finds no running forward."""

    def forward(self, pixel_values_videos: Any = None, **kwargs: Any) -> Any:
        """transformers' own, over the visible tokens."""
        with forward_of(self.everest):
            return super().forward(pixel_values_videos, **kwargs)

    @property
    def layer(self) -> Any:
        """The blocks; from tubelet embedding to the end of a forward with their `position_mask`, (B, V)."""
        layers, current = self._modules["layer"], running(self.everest)
        if current is None or current.selection is None:
            return layers
        return [partial(_at_positions, layer, current.selection.visible) for layer in layers]  # type: ignore[union-attr]


def _at_positions(layer: Any, positions: Tensor, tokens: Tensor, _: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(tokens, positions, *args, **kwargs)


class VJEPA2Predictor(Patched):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: it predicts tokens from others by their places in the whole clip."""
        raise ValueError("the patched V-JEPA 2 runs its encoder alone, no predictor: call it with skip_predictor=True")


class VJEPA2(TransformersEncoder):
    patchable = "transformers' VJEPA2Model (its encoder) and VJEPA2ForVideoClassification"
    modeling, backbone_class, backbone_name = modeling_vjepa2, "VJEPA2Model", "vjepa2"
    patches, embeddings = VJEPA2Tubelets, VJEPA2Embeddings
    refused = ("context_mask", "target_mask")

    def embeds(self, root: Any) -> nn.Module:
        return self.backbone(root).encoder.embeddings

    def geometry(self, root: Any, clips: Any = None) -> Geometry:
        """Also of more or fewer time steps than configured, which rotary positions take, without a frame sampler."""
        size, frames, image = _tubelet(root.config), root.config.frames_per_clip, _pair(root.config.crop_size)
        if isinstance(clips, Tensor) and clips.ndim == 5 and root.everest.frame_sampler is None:
            fits = clips.shape[1] % size.frames == 0 and clips.shape[1] >= 2 * size.frames
            frames = clips.shape[1] if fits else frames
        return size, size.grid(frames, *image), image

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        backbone = self.backbone(root)
        return [*super().wraps(root), (backbone.encoder, VJEPA2Encoder), (backbone.predictor, VJEPA2Predictor)]

    def arguments(self, root: Any) -> dict[str, Any]:
        return {"skip_predictor": True} if self.backbone(root) is root else {}


class VivitEmbeddings(Patched):
    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, T, C, H, W) → the class token and the visible tokens, with their positions, (B, 1 + V, D)."""
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding=True: a patched ViViT takes clips of its own size alone")
        with forward_of(self.everest) as current:
            tokens = self.patch_embeddings(pixel_values)
            visible = current.selection.visible
        table = self.position_embeddings[0]
        first = (self.cls_token[0] + table[:1]).expand(tokens.shape[0], -1, -1)
        return self.dropout(torch.cat([first, tokens + table[1 + visible]], dim=1))


class Vivit(TransformersEncoder):
    patchable = "transformers' VivitModel and VivitForVideoClassification"
    modeling, backbone_class, backbone_name = modeling_vivit, "VivitModel", "vivit"
    patches, embeddings = Tubelets, VivitEmbeddings
    refused = ("attention_mask",)

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        if options.drop_path:
            add_drop_path(self._branch_ends(root), options.drop_path)

    def restore(self, root: Any, again: PatchOptions | None) -> None:
        remove_drop_path(self._branch_ends(root))

    def _branch_ends(self, root: Any) -> list[tuple[Any, ...]]:
        """The modules whose dropout ends the residual branches of each block."""
        backbone = self.backbone(root)
        if hasattr(backbone, "layers"):
            return [(layer,) for layer in backbone.layers]
        return [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]  # before transformers 5


class TimesformerPatches(Tubelets):
    """Tubelets of one frame."""

    def runs_without_clips(self) -> bool:
        return True

    def embed(self, clips: Tensor, **kwargs: Any) -> Tensor:
        tokens = super().embed(clips, **kwargs)[0]  # (B·T, h·w, D)
        return tokens.reshape(clips.shape[0], clips.shape[1] * tokens.shape[1], tokens.shape[2])


class TimesformerEmbeddings(Patched):
    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, T, C, H, W) → class token and visible tokens, place by place as the model has them, (B, 1 + V, D)."""
        with forward_of(self.everest) as current:
            tokens = self.patch_embeddings(pixel_values)
            visible, (steps, height, width) = current.selection.visible, current.selection.grid
        step, place = visible // (height * width), visible % (height * width)
        table, times = self.position_embeddings[0], self.time_embeddings[0]
        first = self.pos_drop((self.cls_token[0] + table[:1]).expand(tokens.shape[0], -1, -1))
        tokens = self.time_drop(self.pos_drop(tokens + table[1 + place]) + times[step])
        return torch.cat([first, gather_tokens(tokens, (place * steps + step).argsort(dim=1))], dim=1)


class Timesformer(TransformersEncoder):
    patchable = "transformers' TimesformerModel and TimesformerForVideoClassification with joint attention"
    modeling, backbone_class, backbone_name = modeling_timesformer, "TimesformerModel", "timesformer"
    patches, embeddings = TimesformerPatches, TimesformerEmbeddings

    def check(self, root: Any) -> None:
        """Raise TypeError for attention that isn't over all tokens of a clip at once, too."""
        super().check(root)
        kind = self.embeds(root).attention_type
        if kind != "joint_space_time":
            raise TypeError(
                f"{type(root).__qualname__}'s attention_type is {kind!r}: divided attention reshapes to frames × places"
                " that the kept tokens don't fill; patchable is 'joint_space_time'"
            )


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _tubelet(config: Any) -> TubeletSize:
    frames = getattr(config, "tubelet_size", 1)
    return TubeletSize(frames, *_pair(config.patch_size)) if isinstance(frames, int) else TubeletSize(*frames)
