"""Host: transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel, patched in place.

Only the embeddings and the pre-training root get another class. `VideoMAEModel` and its blocks keep theirs, which carry
transformers' capturing of hidden states and attentions; the selection passes through them in the place of
`bool_masked_pos`.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as original
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from everest_tokens import numerics
from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.visible_tokens import (
    SelectionRequest,
    check_clips,
    checked_selection,
    num_candidates,
    visible_tokens,
)
from everest_tokens.positions import ConstantTable
from everest_tokens.selection import LiveSettings, SelectionPolicy, TokenSelection, source_positions
from everest_tokens.selectors import Grid
from everest_tokens.tubelets import TubeletSize, gather_tubelets, is_unhooked

PATCHABLE = "transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel"


class VideoMAEEmbeddings(original.VideoMAEEmbeddings):
    """Embeds the whole clip once, selects, and passes on the visible tokens only."""

    everest: SelectionPolicy
    _positions: ConstantTable  # (N, D) float32
    _warned_of_mask = False

    def forward(self, pixel_values: Tensor, bool_masked_pos: SelectionRequest | None = None) -> Tensor:
        """(B, T, C, H, W) → visible tokens with their positions, (B, V, D); fills in the request."""
        size, grid = geometry(self)
        patches = self.patch_embeddings
        frames = size.frames * self.everest.num_candidates(grid[0])
        height, width = patches.image_size
        expected = {"frames": frames, "channels": patches.num_channels, "height": height, "width": width}
        check_clips(pixel_values, expected, self.everest, self.config.num_frames, "pixel_values")
        request = bool_masked_pos or SelectionRequest()
        tokens = visible_tokens(
            self.everest,
            request,
            partial(patches, pixel_values),
            pixel_values,
            patches.projection,
            size,
            grid,
            training=self.training,
            only_projects=type(patches) is original.VideoMAEPatchEmbeddings and is_unhooked(patches),
        )
        assert request.selection is not None  # filled in with the tokens
        return tokens + self._positions.to(tokens.device).to(tokens.dtype)[request.selection.visible]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._positions.to(next(self.patch_embeddings.parameters()).device)
        return self


class VideoMAEForPreTraining(original.VideoMAEForPreTraining):
    """Predicts the pixels of the kept tokens that are not visible (Eq. 3)."""

    everest: SelectionPolicy
    _positions: ConstantTable  # (N, decoder D) float32
    _pixel_statistics: ConstantTable  # (2, 3) float32: mean and standard deviation of the processor's normalisation

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Any = None, **kwargs: Any
    ) -> original.VideoMAEForPreTrainingOutput:
        """As transformers' forward, `bool_masked_pos` not needed any more.

        Args:
            pixel_values: (B, T, C, H, W), normalised; ⌊α·τ⌋ tubelets of frames with a frame sampler.
            bool_masked_pos: ignored, with a warning.
            token_selection: a `TokenSelection` to run instead of selecting.

        Returns:
            loss: mean squared error over the targets; logits (B, M, tubelet_size·patch_size²·C) in the order of
            `TokenSelection.target`.
        """
        config = self.config
        if config.num_channels != 3 and not config.norm_pix_loss:
            raise ValueError(f"norm_pix_loss=False needs RGB pixels to unnormalise, got {config.num_channels} channels")
        if bool_masked_pos is not None:
            _ignore_mask(self.videomae.embeddings)
        request = SelectionRequest(checked_selection(kwargs.pop("token_selection", None)))
        outputs = self.videomae(pixel_values, bool_masked_pos=request, **kwargs)
        selection = request.selection
        assert selection is not None  # filled in by the embeddings
        assert selection.target is not None

        seen = self.encoder_to_decoder(outputs.last_hidden_state)  # (B, V, decoder D)
        positions = self._positions.to(seen.device).to(pixel_values.dtype)
        # Positions are added, not orders restored, so the decoder takes its tokens in any order: targets last.
        tokens = torch.cat([seen + positions[selection.visible], self.mask_token + positions[selection.target]], dim=1)
        logits = self.decoder(tokens, selection.target.shape[1]).logits
        loss = nn.functional.mse_loss(logits, self._targets(pixel_values, selection))
        return original.VideoMAEForPreTrainingOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @torch.no_grad()
    def _targets(self, pixel_values: Tensor, selection: TokenSelection) -> Tensor:
        """What transformers computes for every token, for the targets only: (B, M, frames·height·width·C)."""
        assert selection.target is not None
        size, grid = geometry(self.videomae.embeddings)
        source = source_positions(selection.target, selection.steps, grid)
        patches = gather_tubelets(pixel_values, source, size)
        patches = rearrange(patches, "b m c f p q -> b m (f p q) c")
        if self.config.num_channels == 3:
            mean, std = self._pixel_statistics.to(patches.device).to(patches.dtype).unbind(0)
            patches = patches * std + mean  # back to [0, 1]
        if self.config.norm_pix_loss:
            centred = patches - patches.mean(dim=2, keepdim=True)
            patches = centred / (patches.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        return patches.flatten(2)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._positions.to(self.mask_token.device)
        self._pixel_statistics.to(self.mask_token.device)
        return self


def geometry(embeddings: original.VideoMAEEmbeddings) -> tuple[TubeletSize, Grid]:
    """The tubelet size and the grid (τ, h, w) that the model runs. Raises ValueError for fewer than two time steps."""
    patches = embeddings.patch_embeddings
    size = TubeletSize(patches.tubelet_size, *patches.patch_size)
    return size, size.grid(embeddings.config.num_frames, *patches.image_size)


def _ignore_mask(embeddings: VideoMAEEmbeddings) -> None:
    """Say once that a mask which existing code still passes has no effect."""
    if not torch.compiler.is_compiling() and not embeddings._warned_of_mask:
        embeddings._warned_of_mask = True
        warnings.warn("bool_masked_pos is ignored: the patched model selects its own tokens", stacklevel=2)


def _request_selection(
    module: original.VideoMAEModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of VideoMAEModel: puts a `SelectionRequest` in the place of `bool_masked_pos`.

    Its forward drops `token_selection`, but hands `bool_masked_pos` on to the embeddings.
    """
    selection = checked_selection(kwargs.pop("token_selection", None))
    mask = args[1] if len(args) > 1 else kwargs.get("bool_masked_pos")
    if isinstance(mask, SelectionRequest):  # the pre-training root's
        return args, kwargs
    if mask is not None:
        _ignore_mask(module.embeddings)
    return args[:1], {**kwargs, "bool_masked_pos": SelectionRequest(selection)}


def task_of(model: original.VideoMAEPreTrainedModel) -> str:
    """ "pretraining" for a model with a pixel decoder, else "encoder"."""
    return "pretraining" if isinstance(model, original.VideoMAEForPreTraining) else "encoder"


def recognises(model: nn.Module) -> bool:
    return isinstance(getattr(model, "videomae", model), original.VideoMAEModel)


def check_patchable(model: nn.Module) -> None:
    """Raise TypeError for a subclass whose own forward a patch would silently replace."""
    swapped = [(_backbone(model).embeddings, original.VideoMAEEmbeddings, VideoMAEEmbeddings)]
    if task_of(model) == "pretraining":
        swapped.append((model, original.VideoMAEForPreTraining, VideoMAEForPreTraining))
    for module, plain, patched in swapped:
        if type(module) is not plain and not isinstance(module, patched):  # sharding subclasses what is patched
            raise TypeError(f"{type(module).__qualname__} is not {plain.__name__} itself; patchable are {PATCHABLE}")
    if hasattr(_backbone(model), "_everest_hook") != hasattr(model, "everest"):
        raise TypeError("a part of this model, or a model that it is part of, is patched already: unpatch that first")


def example(model: original.VideoMAEPreTrainedModel) -> tuple[tuple[int, ...], Grid, int]:
    """The shape of one clip as `forward` takes it, its grid (τ, h, w), and the channels of a token."""
    embeddings = _backbone(model).embeddings
    patches = embeddings.patch_embeddings
    size, grid = geometry(embeddings)
    frames = size.frames * num_candidates(model, grid)
    return (1, frames, patches.num_channels, *patches.image_size), grid, model.config.hidden_size


def model_grid(model: original.VideoMAEPreTrainedModel, options: PatchOptions) -> Grid:
    options.refuse_others("a transformers VideoMAE", "drop_path")  # its attention is chosen by attn_implementation
    return geometry(_backbone(model).embeddings)[1]


def attach(model: original.VideoMAEPreTrainedModel, policy: SelectionPolicy, options: PatchOptions) -> None:
    """Make `model` select by `policy`, and compute the numbers that its settings record. It must be unpatched."""
    backbone = _backbone(model)
    embeddings = backbone.embeddings
    class_token = hasattr(embeddings, "cls_token") or policy.settings.get("class_token")
    if hasattr(model, "classifier") and not model.config.use_mean_pooling and not class_token:
        warnings.warn(
            "use_mean_pooling=False: the classifier reads the first kept token alone. EVEREST averages them: "
            "load the checkpoint with use_mean_pooling=True",
            stacklevel=3,
        )
    numbers = numerics.numbers_in(policy.settings)
    if numbers and not numerics.is_equipped(model):
        numerics.equip(model, numbers)
    policy.settings.update(numerics.numbers_of(model))
    embeddings.__class__ = VideoMAEEmbeddings
    embeddings.everest = model.everest = policy
    device = next(model.parameters()).device
    embeddings._positions = ConstantTable(embeddings.position_embeddings[0], device)
    if task_of(model) == "pretraining":
        model.__class__ = VideoMAEForPreTraining
        model._positions = ConstantTable(model.position_embeddings[0], device)
        model._pixel_statistics = ConstantTable(torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]), device)
    backbone._everest_hook = backbone.register_forward_pre_hook(_request_selection, with_kwargs=True)
    if options.drop_path:
        rates = torch.linspace(0, options.drop_path, len(backbone.encoder.layer)).tolist()  # rising with depth
        for rate, end in zip(rates, _branch_ends(backbone), strict=True):
            for module in end:
                module.dropout = nn.Sequential(module.dropout, DropPath(rate)).train(module.training)
    if isinstance(getattr(model.config, "everest", None), LiveSettings):
        _give_own_config(model)
    model.config.everest = policy.settings


def _give_own_config(model: original.VideoMAEPreTrainedModel) -> None:
    """Two patched models that were built from one config object need one each: it holds their settings."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def detach(model: original.VideoMAEPreTrainedModel, again: PatchOptions | None) -> None:
    """Undo `attach`; a checkpoint's own numbers stay with the model."""
    backbone = _backbone(model)
    backbone._everest_hook.remove()
    del backbone._everest_hook
    for end in _branch_ends(backbone):
        for module in end:
            if isinstance(module.dropout, nn.Sequential) and isinstance(module.dropout[-1], DropPath):
                module.dropout = module.dropout[0]
    if task_of(model) == "pretraining":
        model.__class__ = original.VideoMAEForPreTraining
        del model._positions, model._pixel_statistics
    backbone.embeddings.__class__ = original.VideoMAEEmbeddings
    del backbone.embeddings._positions, backbone.embeddings.everest
    backbone.embeddings.__dict__.pop("_warned_of_mask", None)
    if getattr(model.config, "everest", None) is model.everest.settings:
        del model.config.everest
        if numerics.lacking(model):  # what its numbers need stays with it, also in the next folder
            model.config.everest = {"task": task_of(model), **numerics.numbers_of(model)}
    del model.everest


def select(
    model: original.VideoMAEPreTrainedModel, pixel_values: Tensor, generator: torch.Generator | None
) -> TokenSelection:
    """Select without running the encoder."""
    request = SelectionRequest(generator=generator, with_importance=True)
    _backbone(model).embeddings(pixel_values, request)
    assert request.selection is not None
    return request.selection


def _backbone(model: original.VideoMAEPreTrainedModel) -> original.VideoMAEModel:
    return model if isinstance(model, original.VideoMAEModel) else model.videomae


def _branch_ends(backbone: original.VideoMAEModel) -> list[tuple[Any, Any]]:
    """The modules that end the two residual branches of each encoder block."""
    return [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]
