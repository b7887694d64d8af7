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
from everest_tokens.hosts.base import PatchOptions
from everest_tokens.hosts.patched_class import Patched
from everest_tokens.hosts.running import forward_of
from everest_tokens.hosts.transformers_encoders import TransformersHost
from everest_tokens.policy import SelectionPolicy
from everest_tokens.positions import ConstantTable
from everest_tokens.selection import TokenSelection, source_positions
from everest_tokens.tubelets import gather_tubelets


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
            return tokens + self._positions.to(tokens.device).to(tokens.dtype)[current.visible]


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
        geometry = self.everest.host.geometry(self)
        source = source_positions(selection.target, selection.steps, geometry.grid)
        pixels = rearrange(gather_tubelets(pixel_values, source, geometry.size), "b m c f p q -> b m (f p q) c")
        if self.config.num_channels == 3:
            mean, std = self._pixel_statistics.to(pixels.device).to(pixels.dtype).unbind(0)
            pixels = pixels * std + mean  # back to [0, 1]
        if self.config.norm_pix_loss:
            centred = pixels - pixels.mean(dim=2, keepdim=True)
            pixels = centred / (pixels.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        return pixels.flatten(2)


class TransformersVideoMAE(TransformersHost):
    patchable = "transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification and VideoMAEModel"
    kind, head_class, embeddings = "VideoMAE", "VideoMAEPreTrainedModel", Embeddings

    def task(self, root: Any) -> str:
        return "pretraining" if isinstance(root, original.VideoMAEForPreTraining) else "encoder"

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        """A classifier stays as it is, a model with a pixel decoder doesn't."""
        wrapped = super().wraps(root)
        return [*wrapped, (root, PreTraining)] if self.task(root) == "pretraining" else wrapped

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        """Compute the numbers that the settings record, and put tables where they belong."""
        super().prepare(root, policy, options)
        embeddings = self.backbone(root).embeddings
        class_token = hasattr(embeddings, "cls_token") or policy.settings.get("class_token")
        if hasattr(root, "classifier") and not root.config.use_mean_pooling and not class_token:
            warnings.warn(
                "use_mean_pooling=False: the classifier reads the first kept token alone. EVEREST averages them: "
                "load the checkpoint with use_mean_pooling=True",
                stacklevel=4,
            )
        numbers = numerics.numbers_in(policy.settings)
        if numbers not in ({}, numerics.numbers_of(root)) and not numerics.is_equipped(root):
            numerics.equip(root, numbers)
        policy.settings.update(numerics.numbers_of(root))
        device = next(root.parameters()).device
        embeddings._positions = ConstantTable(embeddings.position_embeddings[0], device)
        if self.task(root) == "pretraining":
            root._positions = ConstantTable(root.position_embeddings[0], device)
            statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device="cpu")
            root._pixel_statistics = ConstantTable(statistics, device)

    def numbers(self, root: Any) -> dict[str, Any]:
        return numerics.numbers_of(root)

    def restore(self, root: Any, policy: SelectionPolicy, again: PatchOptions | None) -> None:
        """A checkpoint's own numbers stay with the model, also in the next folder that is saved of it."""
        super().restore(root, policy, again)
        if numerics.lacking(root) and not hasattr(root.config, "everest"):
            root.config.everest = {"task": self.task(root), **numerics.numbers_of(root)}
