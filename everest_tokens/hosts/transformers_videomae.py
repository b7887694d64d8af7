"""Host: transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel, patched in place.

Only the embeddings and the pre-training root get another class. `VideoMAEModel` and its blocks keep theirs, which carry
transformers' capturing of hidden states and attentions; the selection passes through them in the place of
`bool_masked_pos`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as original
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from everest_tokens.hosts.constant_table import ConstantTable
from everest_tokens.hosts.model_shape import Blocks, ModelShape
from everest_tokens.selection import LiveSettings, SelectionPolicy, TokenSelection, source_positions
from everest_tokens.selectors import Grid
from everest_tokens.tubelets import (
    TubeletSize,
    embed_chosen,
    gather_tokens,
    gather_tubelets,
    is_plain_conv3d,
    is_unhooked,
)

PATCHABLE = "transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel"


class SelectionRequest:
    """Travels through VideoMAEModel in the place of `bool_masked_pos`; the embeddings fill in what was selected.

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


class VideoMAEEmbeddings(original.VideoMAEEmbeddings):
    """Embeds the whole clip once, selects, and passes on the visible tokens only."""

    everest: SelectionPolicy
    _positions: ConstantTable  # (N, D) float32
    _warned_of_mask = False

    def forward(self, pixel_values: Tensor, bool_masked_pos: SelectionRequest | None = None) -> Tensor:
        """(B, T, C, H, W) → visible tokens with their positions, (B, V, D); fills in the request."""
        size, grid = geometry(self)
        self._check_pixels(pixel_values, size, grid)
        request = bool_masked_pos or SelectionRequest()

        projection = self.patch_embeddings.projection
        plain = type(self.patch_embeddings) is original.VideoMAEPatchEmbeddings and is_unhooked(self.patch_embeddings)
        reuse = plain and is_plain_conv3d(projection)
        if reuse:
            with torch.no_grad():
                embedded = self.patch_embeddings(pixel_values)  # (B, N, D)
        else:
            embedded = self.patch_embeddings(pixel_values)

        if request.selection is None:
            request.selection = self.everest.select(
                embedded,
                grid,
                training=self.training,
                generator=request.generator,
                with_importance=request.with_importance,
            )
        else:
            self._check_selection(request.selection, pixel_values, grid)
        visible = request.selection.visible
        source = source_positions(visible, request.selection.steps, grid)
        if reuse:
            tokens = embed_chosen(embedded, pixel_values, source, projection, size)
        else:
            tokens = gather_tokens(embedded, source)
        return tokens + self._positions.to(tokens.device).to(tokens.dtype)[visible]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._positions.to(self.patch_embeddings.projection.weight.device)
        return self

    def _check_pixels(self, pixel_values: Tensor, size: TubeletSize, grid: Grid) -> None:
        patches, sampler = self.patch_embeddings, self.everest.frame_sampler
        frames = size.frames * self.everest.num_candidates(grid[0])
        expected = (frames, patches.num_channels, *patches.image_size)
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"expected pixel_values as a tensor (B, T, C, H, W), got {type(pixel_values).__name__}")
        if tuple(pixel_values.shape[1:]) != expected:
            sampled = "" if sampler is None else f" ({sampler} of {self.config.num_frames})"
            raise ValueError(
                f"expected pixel_values (batch, frames, channels, height, width) = (B, {', '.join(map(str, expected))})"
                f"{sampled}, got {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"expected normalised floating-point pixel_values, got {pixel_values.dtype}")

    def _check_selection(self, selection: TokenSelection, pixel_values: Tensor, grid: Grid) -> None:
        clips = pixel_values.shape[0]
        if tuple(selection.grid) != grid or selection.visible.shape[0] != clips:
            raise ValueError(
                f"token_selection is for {selection.visible.shape[0]} clips of grid {tuple(selection.grid)}, "
                f"the input has {clips} of grid {grid}"
            )
        if (selection.steps is None) != (self.everest.frame_sampler is None):
            raise ValueError("token_selection must have `steps` exactly where the model has a frame sampler")
        for name in ("visible", "target", "steps"):
            index = getattr(selection, name)
            if index is not None and (index.ndim != 2 or index.shape[0] != clips or index.dtype != torch.int64):
                got = f"{index.dtype} {tuple(index.shape)}"
                raise ValueError(f"token_selection.{name} must be int64 ({clips}, …), got {got}")
        if selection.target is None and self.everest.task == "pretraining":
            raise ValueError("token_selection has no targets, which pre-training needs: select with this model")


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
        request = SelectionRequest(_checked(kwargs.pop("token_selection", None)))
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


def _checked(selection: Any) -> TokenSelection | None:
    if selection is not None and not isinstance(selection, TokenSelection):
        raise TypeError(f"token_selection must be a TokenSelection, got {type(selection).__name__}")
    return selection


def _request_selection(
    module: original.VideoMAEModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of VideoMAEModel: puts a `SelectionRequest` in the place of `bool_masked_pos`.

    Its forward drops `token_selection`, but hands `bool_masked_pos` on to the embeddings.
    """
    selection = _checked(kwargs.pop("token_selection", None))
    mask = args[1] if len(args) > 1 else kwargs.get("bool_masked_pos")
    if isinstance(mask, SelectionRequest):  # the pre-training root's
        return args, kwargs
    if mask is not None:
        _ignore_mask(module.embeddings)
    return args[:1], {**kwargs, "bool_masked_pos": SelectionRequest(selection)}


def task_of(model: original.VideoMAEPreTrainedModel) -> str:
    """ "pretraining" for a model with a pixel decoder, else "encoder"."""
    return "pretraining" if isinstance(model, original.VideoMAEForPreTraining) else "encoder"


def check_patchable(model: nn.Module) -> None:
    """Raise TypeError for another model, and for a subclass whose own forward a patch would silently replace."""
    if not isinstance(getattr(model, "videomae", model), original.VideoMAEModel):
        raise TypeError(f"cannot patch {type(model).__qualname__}; patchable are {PATCHABLE}")
    swapped = [(_backbone(model).embeddings, original.VideoMAEEmbeddings, VideoMAEEmbeddings)]
    if task_of(model) == "pretraining":
        swapped.append((model, original.VideoMAEForPreTraining, VideoMAEForPreTraining))
    for module, plain, patched in swapped:
        if type(module) is not plain and not isinstance(module, patched):  # sharding subclasses what is patched
            raise TypeError(f"{type(module).__qualname__} is not {plain.__name__} itself; patchable are {PATCHABLE}")
    if hasattr(_backbone(model), "_everest_hook") != hasattr(model, "everest"):
        raise TypeError("a part of this model, or a model that it is part of, is patched already: unpatch that first")


def shape_of(model: original.VideoMAEPreTrainedModel) -> ModelShape:
    """The model's widths and depths. Raises as `check_patchable`."""
    check_patchable(model)
    config = model.config
    size, grid = geometry(_backbone(model).embeddings)
    patch = config.num_channels * size.frames * size.height * size.width
    decoder, outputs = None, 0
    if task_of(model) == "pretraining":
        decoder = Blocks(config.decoder_num_hidden_layers, config.decoder_hidden_size, config.decoder_intermediate_size)
        outputs = patch
    elif isinstance(model, original.VideoMAEForVideoClassification):
        outputs = config.num_labels
    encoder = Blocks(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    return ModelShape(grid, patch, encoder, decoder, outputs)


def norm_eps(model: original.VideoMAEPreTrainedModel) -> float | None:
    """The eps that transformers hard-codes, so that a folder's numbers need a checkpoint's other one beside it."""
    norm = _own_norm(model)
    return None if norm is None else norm.eps


def model_grid(model: original.VideoMAEPreTrainedModel) -> Grid:
    return geometry(_backbone(model).embeddings)[1]


def attach(model: original.VideoMAEPreTrainedModel, policy: SelectionPolicy, drop_path: float) -> None:
    """Make `model` select by `policy`. It must be unpatched."""
    backbone = _backbone(model)
    embeddings = backbone.embeddings
    if not model.config.use_mean_pooling and hasattr(model, "classifier"):
        warnings.warn(
            "use_mean_pooling=False: the classifier reads the first kept token alone. EVEREST averages them: "
            "load the checkpoint with use_mean_pooling=True",
            stacklevel=3,
        )
    norm = _own_norm(model)
    if norm is not None:
        backbone._eps_before = norm.eps
        norm.eps = policy.settings["norm_eps"]
    embeddings.__class__ = VideoMAEEmbeddings
    embeddings.everest = model.everest = policy
    device = next(model.parameters()).device
    embeddings._positions = ConstantTable(embeddings.position_embeddings[0], device)
    if task_of(model) == "pretraining":
        model.__class__ = VideoMAEForPreTraining
        model._positions = ConstantTable(model.position_embeddings[0], device)
        model._pixel_statistics = ConstantTable(torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]), device)
    backbone._everest_hook = backbone.register_forward_pre_hook(_request_selection, with_kwargs=True)
    if drop_path:
        rates = torch.linspace(0, drop_path, len(backbone.encoder.layer)).tolist()  # as VideoMAE: rising with depth
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


def detach(model: original.VideoMAEPreTrainedModel) -> None:
    """Undo `attach`."""
    backbone = _backbone(model)
    backbone._everest_hook.remove()
    del backbone._everest_hook
    norm = _own_norm(model)
    if norm is not None:
        norm.eps = backbone.__dict__.pop("_eps_before")
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


def _own_norm(model: original.VideoMAEPreTrainedModel) -> nn.LayerNorm | None:
    """The layer norm that transformers builds with its own eps, whatever config.layer_norm_eps says."""
    return model.decoder.norm if task_of(model) == "pretraining" else getattr(model, "fc_norm", None)
