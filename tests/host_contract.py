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
from family_models import FAMILIES
from host_case import HostCase
from host_models import (
    TwoHeads,
    classify_masked,
    fine_tuning,
    image_model,
    masked_forward,
    mmaction,
    predict_masked,
    pretraining,
    timesformer,
    videomae,
    vivit,
    vjepa2,
)
from timm.layers import PatchEmbed
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

CASES = [
    videomae(
        "VideoMAEForPreTraining",
        VideoMAEForPreTraining,
        lambda output: output.logits,
        reference=predict_masked,
        unpatched=masked_forward,
        pretraining=True,
    ),
    videomae(
        "VideoMAEForVideoClassification",
        VideoMAEForVideoClassification,
        lambda output: output.logits,
        reference=classify_masked,
    ),
    videomae("VideoMAEModel", VideoMAEModel, lambda output: output.last_hidden_state, variant=True),
    vjepa2("VJEPA2ForVideoClassification"),
    vjepa2("VJEPA2EncoderOnly", variant=True),
    vivit("VivitForVideoClassification"),
    vivit("VivitModel", variant=True),
    timesformer("TimesformerForVideoClassification"),
    timesformer("TimesformerModel", variant=True),
    fine_tuning("videomae"),
    fine_tuning("videomae", "two-heads", cls=TwoHeads),
    fine_tuning("videomae", "videomae-learnable", use_learnable_pos_emb=True, use_mean_pooling=False),
    fine_tuning("videomaev2", cos_attn=True),
    fine_tuning("mme"),
    fine_tuning("mvd", "mvd-class-token", variant=False, use_cls_token=True),
    fine_tuning("everest"),
    mmaction(),
    pretraining("videomae", variant=False),
    pretraining("videomaev2"),
    pretraining("everest"),
    image_model("vit", timm_models.VIT, variant=False),
    image_model("siglip", timm_models.SIGLIP, "none", 0),
    image_model("dinov2-registers", timm_models.DINOV2, "none", 5),
    image_model("eva", timm_models.EVA, variant=False),
    image_model("eva-no-prefix", timm_models.EVA, "none", 0, class_token=False),
    image_model("dinov3", timm_models.DINOV3, "none", 5, variant=False),
    image_model("rope-mixed", timm_models.MIXED, "none", 1),
]

# Options of the same models that change numbers alone.
_NO_PREFIX = {"class_token": False, "global_pool": "avg"}
_DROPOUTS = {"drop_rate": 0.2, "attn_drop_rate": 0.1}
_ANY_SIZE = {"dynamic_img_size": True}
OTHER_SIZES = [  # of the clips than the model's own
    image_model("vit-64x64", timm_models.VIT, size=(64, 64), **_ANY_SIZE),
    image_model("flexivit-32x80", "flexivit_small", size=(32, 80), **_ANY_SIZE),
    image_model("eva-42x28", timm_models.EVA, size=(42, 28), **_ANY_SIZE),
    image_model("dinov3-64x64", timm_models.DINOV3, size=(64, 64), **_ANY_SIZE),
    image_model("rope-mixed-32x80", timm_models.MIXED, size=(32, 80), **_ANY_SIZE),
]
MORE = [
    *(fine_tuning(family, f"{family}-plain") for family in ("videomaev2", "mvd")),
    *(
        fine_tuning(family, f"{family}-first", use_mean_pooling=False)
        for family in ("videomaev2", "mme", "mvd", "everest")
    ),
    fine_tuning("mvd", "mvd-class-token-first", use_cls_token=True, use_mean_pooling=False),
    *(fine_tuning(family, f"{family}-dropouts", head_drop_rate=0.4, **_DROPOUTS) for family in FAMILIES),
    fine_tuning("videomae", "layer-scale", init_values=0.1, drop_path_rate=0.3),
    fine_tuning("videomae", "no-qkv-bias", qkv_bias=False),
    fine_tuning("videomae", "tubelet1", tubelet_size=1, num_frames=4),
    fine_tuning("videomae", "grey", in_chans=1, patch_size=8, img_size=(24, 16)),
    fine_tuning("videomae", "headless", num_classes=0),
    *(fine_tuning(family, f"{family}-fused", fused=True) for family in FAMILIES),
    fine_tuning("videomae", "fused-no-qkv-bias", fused=True, qkv_bias=False),
    fine_tuning("mvd", "fused-layer-scale", fused=True, init_values=0.1),
    *(pretraining(family, f"{family}-pretraining-fused", fused=True) for family in ("videomae", "everest")),
    *(pretraining(family, f"{family}-pretraining-dropouts", **_DROPOUTS) for family in ("videomae", "videomaev2")),
    pretraining("everest", "everest-pretraining-dropouts", **_DROPOUTS),
    pretraining("videomae", "pretraining-layer-scale", init_values=0.1, qkv_bias=False),
    pretraining("videomaev2", "pretraining-tubelet1", tubelet_size=1),
    pretraining("videomaev2", "pretraining-cosine", cos_attn=True),
    pretraining("videomaev2", "pretraining-patch8", patch_size=8, img_size=(24, 16)),
    mmaction("mmaction-learnable", learnable=True),
    mmaction("mmaction-first", mean=False),
    image_model("vit-tubelet1", timm_models.VIT, tubelet=1),
    image_model("eva-tubelet3", timm_models.EVA, tubelet=3),
    image_model("rope-mixed-tubelet3", timm_models.MIXED, tubelet=3),
    image_model("vit-grey", timm_models.VIT, in_chans=1),
    *(image_model(name, name) for name in ("deit_tiny_distilled_patch16_224", "flexivit_small", timm_models.CLIP)),
    image_model("rope-register", "vit_medium_patch16_rope_reg1_gap_256"),
    *(
        image_model(f"pooling-{kind}", timm_models.VIT, global_pool=kind)
        for kind in ("avg", "avgmax", "max", "map", "")
    ),
    image_model("pooling-prr", timm_models.VIT, global_pool="prr", needs="AttentionPoolPrr"),
    image_model("narrow-mlp", timm_models.VIT, mlp_ratio=1.5),
    image_model("without-head", timm_models.CLIP, num_classes=0),
    image_model("swiglu-packed", "vit_giant_patch14_dinov2", img_size=(28, 42), mlp_ratio=5.0),
    image_model("no-positions", timm_models.VIT, pos_embed="none", **_NO_PREFIX),
    image_model("normed-patches", timm_models.VIT, embed_layer=partial(PatchEmbed, norm_layer=torch.nn.LayerNorm)),
    image_model("parallel", "vit_small_patch16_18x2_224"),
    image_model("siglip-gap", "vit_base_patch16_siglip_gap_224"),
    image_model("separate-qkv", "eva02_base_patch14_224", img_size=(28, 42)),
    image_model("dinov3-one-size", timm_models.DINOV3, dynamic_img_size=False),
    image_model("rope-mixed-with-positions", "vit_small_patch16_rope_mixed_ape_224"),
    image_model("perception-encoder", "vit_pe_core_tiny_patch16_384"),
    *OTHER_SIZES,
]


def hosts(when: Callable[[HostCase], bool] = lambda case: True, more: bool = False) -> Any:
    """Parametrises a test's `case`: every model, of `MORE` too where numbers are checked."""
    chosen = []
    for case in CASES + MORE * more:
        lacking = case.skip is not None and case.skip.args[0]  # then it can't be built to look at it
        if lacking or when(case):
            chosen.append(pytest.param(case, id=case.name, marks=[case.skip] if case.skip is not None else []))
    return pytest.mark.parametrize("case", chosen)


def kinds(when: Callable[[HostCase], bool] = lambda case: True) -> Any:
    """Parametrises a test's `case`: one model for each mechanism."""
    return hosts(lambda case: not case.variant and when(case))
