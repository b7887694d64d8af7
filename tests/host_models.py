"""How a small model of each host is made for the contract, and what it must compute: `host_contract` lists them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm_models
import torch
import transformers
from family_models import FineTuningModel, PreTrainingModel, randomize
from host_case import HostCase, mask_of
from mmaction_model import MMActionViT
from tiny_videomae import build_model
from torch import Tensor
from transformers import VideoMAEModel
from versions import set_attention

import everest_tokens as et


def hidden(selection: et.TokenSelection) -> Tensor:
    """(B, N) bool, True where a token isn't visible."""
    return mask_of(selection.visible, math.prod(selection.grid))


# --- transformers: VideoMAE's own bool_masked_pos is the reference --------------------------------------------------


def videomae(name: str, cls: Any, output: Callable[[Any], Tensor], **options: Any) -> HostCase:
    backbone = "" if cls is VideoMAEModel else "videomae."

    def build(seed: int) -> Any:
        model = build_model(cls, seed)
        set_attention(model, "sdpa")
        return model

    def masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        return output(plain(clips, bool_masked_pos=hidden(selection)))

    return HostCase(
        name,
        build,
        clip=(8, 3, 48, 64),
        grid=(4, 3, 4),
        projection=f"{backbone}embeddings.patch_embeddings.projection",
        blocks=f"{backbone}encoder.layer",
        adapted=tuple(f"{backbone}encoder.layer.{index}.attention.attention.query" for index in range(2)),
        output=output,
        checkpointing=lambda model: model.gradient_checkpointing_enable(),
        **{"reference": masked, **options},
    )


def predict_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """transformers' encoder with its own mask; its decoder over the visible and the target tokens alone."""
    seen = plain.videomae(clips, bool_masked_pos=hidden(selection)).last_hidden_state
    table = plain.position_embeddings[0].to(clips.dtype)
    asked = plain.mask_token + table[selection.target]
    sequence = torch.cat([plain.encoder_to_decoder(seen) + table[selection.visible], asked], dim=1)
    return plain.decoder(sequence, selection.target.shape[1]).logits


def classify_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """The head over transformers' encoder with its own mask: a classifier hands the mask on in newer releases alone."""
    seen = plain.videomae(clips, bool_masked_pos=hidden(selection)).last_hidden_state
    return plain.classifier(plain.fc_norm(seen.mean(1)))


def masked_forward(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    return plain(clips, bool_masked_pos=hidden(selection)).logits


# --- transformers' other encoders -------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 5,
    "attn_implementation": "sdpa",
}
_CONFIGS = {
    "VJEPA2": {
        "patch_size": 16,
        "crop_size": 48,
        "frames_per_clip": 8,
        "mlp_ratio": 1.5,
        "num_pooler_layers": 1,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 2,
    },
    "Vivit": {"image_size": 48, "num_frames": 8, "tubelet_size": [2, 16, 16]},
    "Timesformer": {"image_size": 48, "num_frames": 4, "attention_type": "joint_space_time"},
}
VJEPA2Model = getattr(transformers, "VJEPA2Model", object)


class VJEPA2EncoderOnly(VJEPA2Model):  # type: ignore[misc, valid-type]
    """V-JEPA 2 as the patched model runs it; that the predictor is refused has a test of its own."""

    def forward(self, pixel_values_videos: Any, skip_predictor: bool = True, **kwargs: Any) -> Any:
        return super().forward(pixel_values_videos, skip_predictor=skip_predictor, **kwargs)


def build_encoder(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model of one of these classes in eval mode, whose every parameter is random."""
    kind = next(kind for kind in _CONFIGS if name.startswith(kind))
    options = {**_SMALL, **_CONFIGS[kind], **options}
    if kind == "Timesformer":
        options.pop("attn_implementation")  # it has one
    cls = VJEPA2EncoderOnly if name == "VJEPA2EncoderOnly" else getattr(transformers, name)
    model = randomize(cls(getattr(transformers, f"{kind}Config")(**options)), seed)
    if kind == "VJEPA2":  # which gets no gradient
        getattr(model, "vjepa2", model).predictor.requires_grad_(False)
    return model


def _logits(output: Any) -> Tensor:
    return output.logits


def _tokens(output: Any) -> Tensor:
    """(B, 1 + V, D), and ViViT's pooled class token behind them."""
    pooled = [output.pooler_output[:, None]] if hasattr(output, "pooler_output") else []
    return torch.cat([output.last_hidden_state, *pooled], dim=1)


def _encoder(name: str, kind: str, blocks: str, query: str, **options: Any) -> HostCase:
    classifies = name.endswith("ForVideoClassification")
    backbone = f"{kind.lower()}." if classifies else ""
    inner = "encoder." if kind == "VJEPA2" else ""
    return HostCase(
        name,
        partial(build_encoder, name),
        clip=(4 if kind == "Timesformer" else 8, 3, 48, 48),
        grid=(4, 3, 3),
        projection=f"{backbone}{inner}embeddings.patch_embeddings.{'proj' if kind == 'VJEPA2' else 'projection'}",
        blocks=f"{backbone}{blocks}",
        adapted=tuple(f"{backbone}{blocks}.{index}.{query}" for index in range(2)),
        output=_logits if classifies else _tokens,
        prefix=int(kind != "VJEPA2"),
        checkpointing=lambda model: model.gradient_checkpointing_enable(),
        **options,
    )


vjepa2 = partial(
    _encoder,
    kind="VJEPA2",
    blocks="encoder.layer",
    query="attention.query",
    any_length=True,
    skip=pytest.mark.skipif(VJEPA2Model is object, reason="transformers has V-JEPA 2 from 4.53 on"),
)
vivit = partial(_encoder, kind="Vivit", blocks="layers", query="attention.q_proj")
if hasattr(transformers.models.vivit.modeling_vivit, "VivitEncoder"):  # before transformers 5
    vivit = partial(_encoder, kind="Vivit", blocks="encoder.layer", query="attention.attention.query")
timesformer = partial(
    _encoder, kind="Timesformer", blocks="encoder.layer", query="attention.attention.qkv", place_major=True
)

# --- the VideoMAE family's own classes: their modules after the embedding, run on the chosen tokens -----------------


def _run_tokens(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    tokens = plain.patch_embed(clips)
    tokens = tokens + plain.pos_embed.detach().to(tokens.dtype)
    chosen = torch.stack([clip[row] for clip, row in zip(tokens, selection.visible, strict=True)])
    return _joined(plain.run_head(plain.run_tokens(chosen)))


class TwoHeads(FineTuningModel):
    """Scores of verbs and of nouns, as scripts for EPIC-Kitchens have them; no `head`."""

    def __init__(self, family: str, **options: Any) -> None:
        super().__init__(family, **options)
        del self.head
        self.head_verb, self.head_noun = torch.nn.Linear(32, 5), torch.nn.Linear(32, 7)

    def run_head(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.head_verb(features), self.head_noun(features)


def _joined(scores: Any) -> Tensor:
    return torch.cat(scores, dim=1) if isinstance(scores, tuple) else scores


def _unshuffled(plain: Any) -> Any:
    """MME in the tokens' own order, which its mean over them doesn't depend on."""
    plain.random_masking = lambda tokens, mask_ratio: tokens
    return plain


def _geometry(
    img_size: Any = (48, 64),
    patch_size: int = 16,
    num_frames: int = 8,
    tubelet_size: int = 2,
    in_chans: int = 3,
    **_: Any,
) -> dict[str, Any]:
    """Clip and grid of a family model's options."""
    height, width = img_size
    grid = (num_frames // tubelet_size, height // patch_size, width // patch_size)
    return {"clip": (in_chans, num_frames, height, width), "grid": grid, "time": 1}


def fine_tuning(
    family: str, name: str = "", variant: bool = True, cls: Any = FineTuningModel, fused: bool = False, **options: Any
) -> HostCase:
    return HostCase(
        name or family,
        lambda seed: randomize(cls(family, **options), seed),
        **_geometry(**options),
        projection="patch_embed.proj",
        blocks="blocks",
        adapted=("blocks.0.mlp.fc1", "blocks.1.attn.proj"),
        prefix=int("use_cls_token" in options),
        output=_joined,
        reference=_run_tokens,
        # dropout's numbers follow the memory's order, which isn't the same in the models' own forward
        unpatched=_run_tokens if "drop_rate" in options else None,
        **({"whole": _unshuffled} if family == "mme" else {}),
        settings={"fused_attention": True} if fused else {},
        checkpointing=None if family == "mme" else partial(_set_flag, family),
        variant=variant,
    )


def mmaction(name: str = "mmaction", **options: Any) -> HostCase:
    def run(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        tokens = plain.patch_embed(clips)[0] + plain.pos_embed
        chosen = torch.stack([clip[row] for clip, row in zip(tokens, selection.visible, strict=True)])
        return plain.after_embedding(chosen, clips.shape[0])

    return HostCase(
        name,
        lambda seed: randomize(MMActionViT(**options), seed),
        **_geometry(),
        projection="patch_embed.projection",
        blocks="blocks",
        adapted=("blocks.0.mlp.0", "blocks.1.attn.proj"),
        reference=run,
        variant=True,
    )


def _set_flag(family: str, model: Any) -> None:
    """The attribute by which the family's repositories ask for checkpointing."""
    for stack in (model.encoder, model.decoder) if hasattr(model, "encoder") else (model,):
        setattr(stack, "with_cp" if family == "videomaev2" else "use_checkpoint", True)


def _run_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    target = ~mask_of(selection.target, math.prod(selection.grid))
    return plain.run_masked(clips, hidden(selection), target)


def pretraining(family: str, name: str = "", variant: bool = True, fused: bool = False, **options: Any) -> HostCase:
    return HostCase(
        name or f"{family}-pretraining",
        lambda seed: randomize(PreTrainingModel(family, **options), seed),
        **_geometry(**options),
        projection="encoder.patch_embed.proj",
        blocks="encoder.blocks",
        adapted=("encoder.blocks.0.mlp.fc1", "decoder.blocks.1.attn.proj"),
        pretraining=True,
        output=lambda output: output[0] if isinstance(output, tuple) else output,
        reference=_run_masked,
        unpatched=_run_masked,
        settings={"fused_attention": True} if fused else {},
        checkpointing=partial(_set_flag, family),
        variant=variant,
    )


# --- timm: image models, whose modules are run by hand on clips -----------------------------------------------------


def image_model(
    name: str,
    model: str,
    temporal: str = "sincos",
    prefix: int = 1,
    variant: bool = True,
    tubelet: int = 2,
    size: tuple[int, int] | None = None,
    needs: str | None = None,
    **options: Any,
) -> HostCase:
    """`size`, of the clips, where it isn't the model's own."""
    settings = {"num_frames": 6, "tubelet_size": tubelet, "temporal_embedding": temporal}
    own = {**timm_models.SMALL, **timm_models.MODELS.get(model, {}), **options}["img_size"]
    patch = own[0] // 2
    height, width = size or own

    def with_video_kernel(plain: Any) -> Any:
        """Its kernel as the patched model has it, for the reference alone: timm's own forward is then broken."""
        plain.patch_embed.proj.weight = torch.nn.Parameter(timm_models.inflated(plain, tubelet))
        return plain

    def reference(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        kernel = plain.patch_embed.proj.weight
        return timm_models.by_hand(plain, clips, selection, temporal=temporal, kernel=kernel).output

    return HostCase(
        name,
        lambda seed: timm_models.build(model, seed, torch.float32, **options),
        clip=(options.get("in_chans", 3), 6, height, width),
        grid=(6 // tubelet, height // patch, width // patch),
        time=1,
        projection="patch_embed.proj",
        blocks="blocks",
        adapted=("blocks.0.mlp.fc1", "blocks.1.attn.proj"),
        prefix=prefix,
        image_model=True,
        any_size=model == timm_models.DINOV3,
        as_reference=with_video_kernel,
        reference=reference,
        unpatched=reference,
        whole=lambda plain: et.patch_videomae(plain, et.ReRoSelector(1.0), **settings),
        settings=settings,
        checkpointing=lambda built: built.set_grad_checkpointing(True),
        rounding=1e-6 if temporal == "sincos" else 0.0,  # of the table over time, which is float32's
        variant=variant,
        skip=timm_models.lacking(model, needs),
    )
