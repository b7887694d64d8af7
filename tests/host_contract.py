"""Small models of every host, which `hosts/test_contract*.py` and `integration/` check.

A new kind of model is one more `HostCase` in `CASES`; every check then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm_models
import torch
from family_models import FineTuningModel, PreTrainingModel, randomize
from host_case import HostCase, mask_of
from tiny_videomae import build_model
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et

# --- transformers: VideoMAE's own bool_masked_pos is the reference --------------------------------------------------


def _videomae(name: str, cls: Any, output: Callable[[Any], Tensor], **options: Any) -> HostCase:
    backbone = "" if cls is VideoMAEModel else "videomae."

    def build(seed: int) -> Any:
        model = build_model(cls, seed)
        model.set_attn_implementation("sdpa")
        return model

    def masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        return output(plain(clips, bool_masked_pos=mask_of(selection.visible, 48)))  # a classifier hands it on

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


def _predict_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """transformers' encoder with its own mask; its decoder over the visible and the target tokens alone."""
    seen = plain.videomae(clips, bool_masked_pos=mask_of(selection.visible, 48)).last_hidden_state
    table = plain.position_embeddings[0].to(clips.dtype)
    asked = plain.mask_token + table[selection.target]
    sequence = torch.cat([plain.encoder_to_decoder(seen) + table[selection.visible], asked], dim=1)
    return plain.decoder(sequence, selection.target.shape[1]).logits


def _masked_forward(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    return plain(clips, bool_masked_pos=mask_of(selection.visible, 48)).logits


# --- the VideoMAE family's own classes: their modules after the embedding, run on the chosen tokens -----------------


def _run_tokens(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    tokens = plain.patch_embed(clips)
    tokens = tokens + plain.pos_embed.detach().to(tokens.dtype)
    chosen = torch.stack([clip[row] for clip, row in zip(tokens, selection.visible, strict=True)])
    return plain.run_head(plain.run_tokens(chosen))


def _unshuffled(plain: Any) -> Any:
    """MME in the tokens' own order, which its mean over them doesn't depend on."""
    plain.random_masking = lambda tokens, mask_ratio: tokens
    return plain


def _fine_tuning(family: str, name: str = "", variant: bool = True, **options: Any) -> HostCase:
    return HostCase(
        name or family,
        lambda seed: randomize(FineTuningModel(family, **options), seed),
        clip=(3, 8, 48, 64),
        grid=(4, 3, 4),
        time=1,
        projection="patch_embed.proj",
        blocks="blocks",
        adapted=("blocks.0.mlp.fc1", "blocks.1.attn.proj"),
        prefix=int("use_cls_token" in options),
        reference=_run_tokens,
        **({"whole": _unshuffled} if family == "mme" else {}),
        checkpointing=None if family == "mme" else partial(_set_flag, family),
        variant=variant,
    )


def _set_flag(family: str, model: Any) -> None:
    """The attribute by which the family's repositories ask for checkpointing."""
    for stack in (model.encoder, model.decoder) if hasattr(model, "encoder") else (model,):
        setattr(stack, "with_cp" if family == "videomaev2" else "use_checkpoint", True)


def _run_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    return plain.run_masked(clips, mask_of(selection.visible, 48), ~mask_of(selection.target, 48))


def _pretraining(family: str, variant: bool = True) -> HostCase:
    return HostCase(
        f"{family}-pretraining",
        lambda seed: randomize(PreTrainingModel(family), seed),
        clip=(3, 8, 48, 64),
        grid=(4, 3, 4),
        time=1,
        projection="encoder.patch_embed.proj",
        blocks="encoder.blocks",
        adapted=("encoder.blocks.0.mlp.fc1", "decoder.blocks.1.attn.proj"),
        pretraining=True,
        output=lambda output: output[0] if isinstance(output, tuple) else output,
        reference=_run_masked,
        unpatched=_run_masked,
        checkpointing=partial(_set_flag, family),
        variant=variant,
    )


# --- timm: image models, whose modules are run by hand on clips -----------------------------------------------------


def _with_video_kernel(plain: Any) -> Any:
    """Its kernel as the patched model has it, for the reference alone: timm's own forward is then broken."""
    plain.patch_embed.proj.weight = torch.nn.Parameter(timm_models.inflated(plain))
    return plain


def _image_model(name: str, model: str, temporal: str, prefix: int, variant: bool = False, **options: Any) -> HostCase:
    settings = {"num_frames": 6, "tubelet_size": 2, "temporal_embedding": temporal}

    def reference(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        kernel = plain.patch_embed.proj.weight
        return timm_models.by_hand(plain, clips, selection, temporal=temporal, kernel=kernel).output

    return HostCase(
        name,
        lambda seed: timm_models.build(model, seed, torch.float32, **options),
        clip=(3, 6, *timm_models.MODELS[model].get("img_size", timm_models.SMALL["img_size"])),
        grid=(3, 2, 3),
        time=1,
        projection="patch_embed.proj",
        blocks="blocks",
        adapted=("blocks.0.mlp.fc1", "blocks.1.attn.proj"),
        prefix=prefix,
        image_model=True,
        any_size=model == timm_models.DINOV3,
        as_reference=_with_video_kernel,
        reference=reference,
        unpatched=reference,
        whole=lambda plain: et.patch_videomae(plain, et.ReRoSelector(1.0), **settings),
        settings=settings,
        checkpointing=lambda built: built.set_grad_checkpointing(True),
        rounding=1e-6 if temporal == "sincos" else 0.0,  # of the table over time, which is float32's
        variant=variant,
        skip=timm_models.lacking(model),
    )


CASES = [
    _videomae(
        "VideoMAEForPreTraining",
        VideoMAEForPreTraining,
        lambda output: output.logits,
        reference=_predict_masked,
        unpatched=_masked_forward,
        pretraining=True,
    ),
    _videomae("VideoMAEForVideoClassification", VideoMAEForVideoClassification, lambda output: output.logits),
    _videomae("VideoMAEModel", VideoMAEModel, lambda output: output.last_hidden_state),
    _fine_tuning("videomae", variant=False),
    _fine_tuning("videomae", "videomae-learnable", use_learnable_pos_emb=True, use_mean_pooling=False),
    _fine_tuning("videomaev2", cos_attn=True),
    _fine_tuning("mme"),
    _fine_tuning("mvd", "mvd-class-token", variant=False, use_cls_token=True),
    _fine_tuning("everest"),
    _pretraining("videomae", variant=False),
    _pretraining("videomaev2"),
    _pretraining("everest"),
    _image_model("vit", timm_models.VIT, "sincos", 1),
    _image_model("siglip", timm_models.SIGLIP, "none", 0),
    _image_model("dinov2-registers", timm_models.DINOV2, "none", 5, variant=True),
    _image_model("eva", timm_models.EVA, "sincos", 1),
    _image_model("eva-no-prefix", timm_models.EVA, "none", 0, variant=True, class_token=False),
    _image_model("dinov3", timm_models.DINOV3, "none", 5),
    _image_model("rope-mixed", timm_models.MIXED, "none", 1, variant=True),
]


def hosts(check: str = "", *, variants: bool = True, when: Callable[[HostCase], bool] = lambda case: True) -> Any:
    """Parametrises a test's `case`. What `fails` names for `check` is expected to fail, strictly."""
    chosen = []
    for case in CASES:
        if when(case) and (variants or not case.variant):
            marks = [case.skip] if case.skip is not None else []
            if check in case.fails:
                marks.append(pytest.mark.xfail(strict=True, reason=case.fails[check]))
            chosen.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", chosen)
