"""Host: transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel, patched in place.

`VideoMAEModel` and its blocks keep their class, which carries transformers' capturing of hidden states and attentions.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.models.videomae import modeling_videomae as original
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from everest_tokens import numerics
from everest_tokens.hosts.base import Host
from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.patched_class import Patched, own_class
from everest_tokens.hosts.running import forward_of
from everest_tokens.hosts.stochastic_depth import add_drop_path, remove_drop_path
from everest_tokens.hosts.tubelet_embedding import TubeletEmbedding
from everest_tokens.policy import SelectionPolicy
from everest_tokens.positions import ConstantTable
from everest_tokens.selection import TokenSelection, source_positions
from everest_tokens.tubelets import Grid, TubeletSize, gather_tubelets


class Tubelets(TubeletEmbedding):
    """`VideoMAEPatchEmbeddings` that hands on the visible tokens."""

    def geometry(self, clips: Any = None) -> tuple[TubeletSize, Grid, tuple[int, int]]:
        size = TubeletSize(self.tubelet_size, *self.patch_size)
        height, width = self.image_size
        steps = self.num_patches // ((height // size.height) * (width // size.width))
        return size, size.grid(size.frames * steps, height, width), (height, width)

    def channels(self) -> int:
        return self.num_channels

    def runs_without_clips(self) -> bool:
        # Its attention leaves a size of its views to be worked out; in older releases it names all of them.
        return hasattr(original.VideoMAESelfAttention, "transpose_for_scores")

    def only_projects(self) -> bool:
        return own_class(self) is original.VideoMAEPatchEmbeddings


class Embeddings(Patched):
    """`VideoMAEEmbeddings` of the visible tokens, with their positions."""

    patched_attributes = ("_positions", "_warned_of_mask")
    _positions: ConstantTable  # (N, D) float32
    _warned_of_mask = False

    def forward(self, pixel_values: Tensor, bool_masked_pos: Any = None) -> Tensor:
        """(B, T, C, H, W) → visible tokens with their positions, (B, V, D)."""
        if bool_masked_pos is not None and not torch.compiler.is_compiling() and not self._warned_of_mask:
            self._warned_of_mask = True
            warnings.warn("bool_masked_pos is ignored: the patched model selects its own tokens", stacklevel=2)
        with forward_of(self.everest) as current:
            tokens = self.patch_embeddings(pixel_values)
            return tokens + self._positions.to(tokens.device).to(tokens.dtype)[current.selection.visible]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._positions.follow(self)
        return self


class PreTraining(Patched):
    """Predicts the pixels of the kept tokens that are not visible (Eq. 3)."""

    patched_attributes = ("_positions", "_pixel_statistics")
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
        with forward_of(self.everest, kwargs.pop("token_selection", None)) as current:
            # Handed on as an argument too: should the encoder be run again for its gradients, this forward is over.
            outputs = self.videomae(
                pixel_values, bool_masked_pos=bool_masked_pos, token_selection=current.given, **kwargs
            )
            selection = current.selection

        seen = self.encoder_to_decoder(outputs.last_hidden_state)  # (B, V, decoder D)
        positions = self._positions.to(seen.device).to(pixel_values.dtype)
        # Positions are added, not orders restored, so the decoder takes its tokens in any order: targets last.
        tokens = torch.cat([seen + positions[selection.visible], self.mask_token + positions[selection.target]], dim=1)
        logits = self.decoder(tokens, selection.target.shape[1]).logits
        loss = nn.functional.mse_loss(logits, self._targets(pixel_values, selection))
        return original.VideoMAEForPreTrainingOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    # Which keywords go on to the encoder, for what reads the signature.
    forward.__annotations__["kwargs"] = original.VideoMAEForPreTraining.forward.__annotations__.get("kwargs", Any)

    @torch.no_grad()
    def _targets(self, pixel_values: Tensor, selection: TokenSelection) -> Tensor:
        """What transformers computes for every token, for the targets only: (B, M, frames·height·width·C)."""
        assert selection.target is not None
        patches = self.videomae.embeddings.patch_embeddings
        size, grid, _ = patches.geometry()
        source = source_positions(selection.target, selection.steps, grid)
        pixels = rearrange(gather_tubelets(pixel_values, source, size), "b m c f p q -> b m (f p q) c")
        if self.config.num_channels == 3:
            mean, std = self._pixel_statistics.to(pixels.device).to(pixels.dtype).unbind(0)
            pixels = pixels * std + mean  # back to [0, 1]
        if self.config.norm_pix_loss:
            centred = pixels - pixels.mean(dim=2, keepdim=True)
            pixels = centred / (pixels.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        return pixels.flatten(2)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._positions.follow(self)
        self._pixel_statistics.follow(self)
        return self


class TransformersVideoMAE(Host):
    patchable = "transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel"
    options = ("drop_path",)  # its attention is chosen by attn_implementation

    def recognises(self, root: nn.Module) -> bool:
        own = isinstance(root, original.VideoMAEPreTrainedModel) and hasattr(root, "videomae")
        return own or isinstance(getattr(root, "videomae", root), original.VideoMAEModel)

    def check(self, root: Any) -> None:
        """Raise TypeError for a subclass whose own forward a patch would silently replace."""
        if not isinstance(root, original.VideoMAEPreTrainedModel):
            raise TypeError(
                f"{type(root).__qualname__} has a VideoMAEModel inside: patch that, patch_videomae(model.videomae)"
            )
        swapped = [(_backbone(root).embeddings, original.VideoMAEEmbeddings)]
        if self.task(root) == "pretraining":
            swapped.append((root, original.VideoMAEForPreTraining))
        for module, plain in swapped:
            if own_class(module) is not plain:
                raise TypeError(
                    f"{type(module).__qualname__} is not {plain.__name__} itself; patchable are {self.patchable}"
                )

    def task(self, root: Any) -> str:
        return "pretraining" if isinstance(root, original.VideoMAEForPreTraining) else "encoder"

    def embeds(self, root: Any) -> nn.Module:
        return _backbone(root).embeddings

    def grid(self, root: Any, options: PatchOptions) -> Grid:
        return Tubelets.geometry(_backbone(root).embeddings.patch_embeddings)[1]

    def example(self, root: Any) -> tuple[tuple[int, ...], Grid, int]:
        patches = _backbone(root).embeddings.patch_embeddings
        size, grid, image = Tubelets.geometry(patches)
        steps = self.num_candidates(root, grid)
        return (1, size.frames * steps, patches.num_channels, *image), grid, root.config.hidden_size

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        embeddings = _backbone(root).embeddings
        pretraining = [(root, PreTraining)] if self.task(root) == "pretraining" else []
        return [(embeddings.patch_embeddings, Tubelets), (embeddings, Embeddings), *pretraining]

    def entries(self, root: Any) -> list[nn.Module]:
        backbone = _backbone(root)
        return [backbone] if self.task(root) == "pretraining" or backbone is root else [backbone, root]

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        """Compute the numbers that the settings record, and put tables and stochastic depth where they belong."""
        backbone = _backbone(root)
        embeddings = backbone.embeddings
        class_token = hasattr(embeddings, "cls_token") or policy.settings.get("class_token")
        if hasattr(root, "classifier") and not root.config.use_mean_pooling and not class_token:
            warnings.warn(
                "use_mean_pooling=False: the classifier reads the first kept token alone. EVEREST averages them: "
                "load the checkpoint with use_mean_pooling=True",
                stacklevel=4,
            )
        numbers = numerics.numbers_in(policy.settings)
        if numbers and not numerics.is_equipped(root):
            numerics.equip(root, numbers)
        policy.settings.update(numerics.numbers_of(root))
        device = next(root.parameters()).device
        embeddings._positions = ConstantTable(embeddings.position_embeddings[0], device)
        if self.task(root) == "pretraining":
            root._positions = ConstantTable(root.position_embeddings[0], device)
            statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device="cpu")
            root._pixel_statistics = ConstantTable(statistics, device)
        if options.drop_path:
            add_drop_path(_branch_ends(backbone), options.drop_path)

    def numbers(self, root: Any) -> dict[str, Any]:
        return numerics.numbers_of(root)

    def restore(self, root: Any, again: PatchOptions | None) -> None:
        """A checkpoint's own numbers stay with the model, also in the next folder that is saved of it."""
        remove_drop_path(_branch_ends(_backbone(root)))
        if numerics.lacking(root) and not hasattr(root.config, "everest"):
            root.config.everest = {"task": self.task(root), **numerics.numbers_of(root)}


def _backbone(root: Any) -> Any:
    return root if isinstance(root, original.VideoMAEModel) else root.videomae


def _branch_ends(backbone: Any) -> list[tuple[Any, Any]]:
    """The modules that end the two residual branches of each encoder block."""
    return [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]
