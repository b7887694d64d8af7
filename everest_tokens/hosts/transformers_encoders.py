"""Hosts: transformers' V-JEPA 2, ViViT and TimeSformer with joint attention, patched in place.

Models and blocks keep their class, which carries transformers' capturing of hidden states and attentions. Nothing here
imports transformers: where no model of it is, that takes seconds for nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from everest_tokens.hosts.base import Host, PatchOptions
from everest_tokens.hosts.patched_class import Patched, own_class
from everest_tokens.hosts.running import PACKED, forward_of, running
from everest_tokens.hosts.tubelet_embedding import Geometry, TubeletEmbedding
from everest_tokens.policy import SelectionPolicy
from everest_tokens.tubelets import TubeletSize, gather_tokens


class Tubelets(TubeletEmbedding):
    """A patch embedding of transformers that hands on the visible tokens, t-major."""

    projection_name = "projection"
    patched_attributes = ("_everest_config",)
    _everest_config: Any  # the model's, which some embeddings lack

    def geometry(self, clips: Any) -> Geometry:
        return self.everest.host.geometry_of(self._everest_config)

    def only_projects(self) -> bool:
        return own_class(self).__module__.startswith("transformers.models.")


class TransformersHost(Host):
    """A backbone with a patch embedding inside its embeddings, alone or in a model with a head.

    Attributes:
        kind: what the classes' names begin with.
        head_class: of a model with a head, which may be anybody's own.
        patches, embeddings: mixins of those two modules.
        names: of a clip's frames, side and channels in the config.
        refused: arguments of `forward` that choose among all tokens of a clip.
    """

    channels_first = False
    argument = "pixel_values"
    kind: ClassVar[str]
    head_class: ClassVar[str] = "PreTrainedModel"
    patches: ClassVar[type[Tubelets]] = Tubelets
    embeddings: ClassVar[type[Patched]]
    names: ClassVar[tuple[str, str, str]] = ("num_frames", "image_size", "num_channels")
    refused: ClassVar[tuple[str, ...]] = ()

    def modeling(self, name: str) -> Any:
        """A class of transformers' module of the model, or what nothing is an instance of while that isn't loaded."""
        path = f"transformers.models.{self.kind.lower()}.modeling_{self.kind.lower()}"
        return getattr(sys.modules.get(path), name, ())

    def backbone(self, root: Any) -> Any:
        return getattr(root, self.kind.lower(), root)

    def recognises(self, root: nn.Module) -> bool:
        wrapped = hasattr(root, self.kind.lower()) and isinstance(root, self.modeling(f"{self.kind}PreTrainedModel"))
        return wrapped or isinstance(self.backbone(root), self.modeling(f"{self.kind}Model"))

    def check(self, root: Any) -> None:
        """Raise TypeError for parts whose own forward a patch would silently replace."""
        name = f"{self.kind}Model"
        if not isinstance(root, self.modeling(self.head_class)):
            raise TypeError(
                f"{type(root).__qualname__} has a {name} inside: patch that, patch_videomae(model.{self.kind.lower()})"
            )
        for module, mixin in self.wraps(root):
            own = own_class(module)
            if mixin is not self.patches and own.__module__ != self.modeling(name).__module__:
                raise TypeError(f"{own.__qualname__} is not transformers' own; patchable are {self.patchable}")

    def embeds(self, root: Any) -> Any:
        return self.backbone(root).embeddings.patch_embeddings

    def geometry(self, root: Any, options: PatchOptions | None = None) -> Geometry:
        return self.geometry_of(root.config)

    def geometry_of(self, config: Any) -> Geometry:
        """As `geometry`, by the model's config."""
        frames, image, channels = [getattr(config, name) for name in self.names]
        tubelet, image = getattr(config, "tubelet_size", 1), _pair(image)
        size = TubeletSize(tubelet, *_pair(config.patch_size)) if isinstance(tubelet, int) else TubeletSize(*tubelet)
        return Geometry(size, size.grid(frames, *image), image, channels, config.hidden_size)

    def blocks(self, root: Any) -> Iterable[Any]:
        backbone = self.backbone(root)
        return backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer

    def branch_ends(self, block: Any) -> list[tuple[Any, str]]:
        outputs = (block.attention.output, block.output) if hasattr(block, "output") else (block,)
        return super().branch_ends(block) or [(module, "dropout") for module in outputs]

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        return [(self.embeds(root), self.patches), (self.backbone(root).embeddings, self.embeddings)]

    def entries(self, root: Any) -> list[nn.Module]:
        wrapped = [module for module, _ in self.wraps(root)]
        return [module for module in dict.fromkeys((self.backbone(root), root)) if module not in wrapped]

    def packs(self, root: Any, selector: Any) -> list[tuple[nn.Module, type[Patched]]]:
        backbone = self.backbone(root)
        classifies = own_class(root) is self.modeling(f"{self.kind}ForVideoClassification")
        if root is not backbone and not classifies:
            raise TypeError(f"how {type(root).__name__} pools clips packed by {selector} isn't known")
        if any(getattr(module, "drop_prob", 0) for module in root.modules()):
            raise ValueError(f"stochastic depth would drop whole batches, packed by {selector}: build it without")
        try:
            from everest_tokens.hosts.packing import PackedBlock, PackedBlocks, PackedPooler
        except ImportError as error:
            raise TypeError(f"{selector} needs transformers' AttentionInterface, of 4.48 and later") from error
        blocks, pooler = self.blocks(root), getattr(root, "pooler", None)
        inner = [getattr(block, "_checkpoint_wrapped_module", block) for block in blocks]
        pooled: list[tuple[nn.Module, type[Patched]]] = [] if pooler is None else [(pooler, PackedPooler)]
        return [(blocks, PackedBlocks), *((block, PackedBlock) for block in inner), *pooled]

    def is_ready(self, root: Any) -> bool:
        """Whether a patched model attends within each clip."""
        return root.config._attn_implementation == PACKED

    def check_packed(self, root: Any, selector: Any) -> None:
        if not self.is_ready(root):
            self.packs(root, selector)
            raise ValueError(
                f"{type(root).__qualname__} attends by {root.config._attn_implementation!r}, which would mix packed"
                f" clips: call patch_videomae with {selector} to make it ready for them"
            )

    def unpack(self, module: Any, output: Any, current: forward_of) -> Any:
        """In place of a backbone's tokens what its classifier pools them to: (B, 1, D), of each clip by itself."""
        root = module.everest.root
        inner = module is self.backbone(root) and current.opened_by is not module
        if not inner or current.packing is None or hasattr(root, "pooler"):
            return None
        clips = output[0].split(current.packing.lengths, dim=1)
        mean = getattr(root, "fc_norm", None) is not None
        pooled = torch.cat([clip.mean(dim=1, keepdim=True) if mean else clip[:, :1] for clip in clips])
        return _with_first(output, pooled)

    def prepare_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs if len(args) < 2 else _called_with(module, args, kwargs)
        root = module.everest.root
        if self.is_ready(root) and given.get("output_attentions", root.config.output_attentions):
            raise ValueError("output_attentions: clips that are packed attend by kernels that keep no weights")
        for name in self.refused:
            if given.get(name) is not None:
                raise ValueError(f"{name} chooses among all tokens of a clip, a patched model runs its own selection")

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        self.embeds(root)._everest_config = root.config
        if self.is_ready(root):  # only by the config, a copy of a packed model's: outside of it that attention is SDPA
            root.config._attn_implementation = "sdpa"
        if policy.packs:
            policy.attention, root.config._attn_implementation = root.config._attn_implementation, PACKED

    def restore(self, root: Any, policy: SelectionPolicy, again: PatchOptions | None) -> None:
        """Put the model's own attention back."""
        if self.is_ready(root):
            root.config._attn_implementation = policy.attention


class VJEPA2Tubelets(Tubelets):
    projection_name = "proj"

    def geometry(self, clips: Any) -> Geometry:
        """Also of more or fewer time steps than configured, which rotary positions take, without a frame sampler."""
        geometry = super().geometry(clips)
        if isinstance(clips, Tensor) and clips.ndim == 5 and self.everest.frame_sampler is None:
            frames, size = clips.shape[1], geometry.size
            if frames % size.frames == 0 and frames >= 2 * size.frames:
                grid = size.grid(frames, *geometry.image)
                return Geometry(size, grid, geometry.image, geometry.channels, geometry.width)
        return geometry

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
        layers: Any = self._modules["layer"]
        current = running(self.everest)
        if current is None or current.selection is None:
            return layers
        return [partial(_at_positions, layer, current.visible) for layer in layers]


def _at_positions(layer: Any, positions: Tensor, tokens: Tensor, _: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(tokens, positions, *args, **kwargs)


class VJEPA2(TransformersHost):
    patchable = "transformers' VJEPA2Model (its encoder) and VJEPA2ForVideoClassification"
    kind, argument = "VJEPA2", "pixel_values_videos"
    patches, embeddings = VJEPA2Tubelets, VJEPA2Embeddings
    names = ("frames_per_clip", "crop_size", "in_chans")
    refused = ("context_mask", "target_mask")

    def embeds(self, root: Any) -> Any:
        return self.backbone(root).encoder.embeddings.patch_embeddings

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        encoder = self.backbone(root).encoder
        return [(self.embeds(root), self.patches), (encoder.embeddings, self.embeddings), (encoder, VJEPA2Encoder)]

    def entries(self, root: Any) -> list[nn.Module]:
        return [*super().entries(root), self.backbone(root).predictor]

    def unpack(self, module: Any, output: Any, current: forward_of) -> Any:
        """`masked_hidden_state` is all that the encoder gives, as it is for whole clips."""
        root = module.everest.root
        own = module is self.backbone(root) and self.is_ready(root)
        return _with_first(output, output[0], output[0]) if own else None

    def prepare_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError for the predictor too, before its encoder runs: it predicts by places in the whole clip."""
        predicts = isinstance(module, self.modeling("VJEPA2Predictor"))
        if predicts or not _called_with(module, args, kwargs).get("skip_predictor", True):
            raise ValueError(
                "the patched V-JEPA 2 runs its encoder alone, no predictor: call it with skip_predictor=True"
            )
        super().prepare_call(module, args, kwargs)
        root = module.everest.root
        if module is self.backbone(root) and self.is_ready(root):  # its own masks are of B rows
            kwargs["context_mask"] = kwargs["target_mask"] = [torch.zeros(1, 1, dtype=torch.int64, device="cpu")]

    def arguments(self, root: Any) -> dict[str, Any]:
        return {"skip_predictor": True} if self.backbone(root) is root else {}


class VivitEmbeddings(Patched):
    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, T, C, H, W) → the class token and the visible tokens, with their positions, (B, 1 + V, D).

        Packed, (1, Σ(1 + K), D): each clip has a class token of its own.
        """
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding=True: a patched ViViT takes clips of its own size alone")
        with forward_of(self.everest) as current:
            tokens = self.patch_embeddings(pixel_values)
            visible, packing = current.visible, current.packing
        table = self.position_embeddings[0]
        first = (self.cls_token[0] + table[:1]).expand(tokens.shape[0], -1, -1)
        tokens = tokens + table[1 + visible]
        clips = [tokens] if packing is None else tokens.split([length - 1 for length in packing.lengths], dim=1)
        return self.dropout(torch.cat([part for clip in clips for part in (first, clip)], dim=1))


class Vivit(TransformersHost):
    patchable = "transformers' VivitModel and VivitForVideoClassification"
    kind, embeddings, prefix = "Vivit", VivitEmbeddings, 1
    refused = ("attention_mask",)


class TimesformerPatches(Tubelets):
    """Tubelets of one frame."""

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


class Timesformer(TransformersHost):
    patchable = "transformers' TimesformerModel and TimesformerForVideoClassification with joint attention"
    kind, patches, embeddings = "Timesformer", TimesformerPatches, TimesformerEmbeddings

    def check(self, root: Any) -> None:
        """Raise TypeError for attention that isn't over all tokens of a clip at once, too."""
        super().check(root)
        kind = self.backbone(root).embeddings.attention_type
        if kind != "joint_space_time":
            raise TypeError(
                f"{type(root).__qualname__}'s attention_type is {kind!r}: divided attention reshapes to frames × places"
                " that the kept tokens don't fill; patchable is 'joint_space_time'"
            )

    def packs(self, root: Any, selector: Any) -> list[tuple[nn.Module, type[Patched]]]:
        """Its attention is its own code, which asks nobody."""
        return Host.packs(self, root, selector)


_signature = cache(inspect.signature)


def _called_with(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults; under compile those given by name where all are."""
    if len(args) < 2 and torch.compiler.is_compiling():
        return kwargs
    bound = _signature(type(module).forward).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    return {**kwargs, **bound.arguments}


def _with_first(output: Any, *first: Tensor) -> Any:
    """A model's output with other tensors in front."""
    if isinstance(output, tuple):
        return (*first, *output[len(first) :])
    for name, tensor in zip(list(output), first, strict=False):
        output[name] = tensor
    return output


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
