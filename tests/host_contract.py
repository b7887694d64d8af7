"""Small models of every host, which `hosts/test_contract*.py` and `integration/` check.

A new kind of model is one more `HostCase` in `CASES`; every check then runs on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm_models
import torch
import transformers
from family_models import FAMILIES, FineTuningModel, PreTrainingModel, randomize
from host_case import HostCase, mask_of
from timm.layers import PatchEmbed
from tiny_videomae import build_model
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from versions import set_attention

import everest_tokens as et


def hidden(selection: et.TokenSelection) -> Tensor:
    """(B, N) bool, True where a token isn't visible."""
    return mask_of(selection.visible, math.prod(selection.grid))


# --- transformers: VideoMAE's own bool_masked_pos is the reference --------------------------------------------------


def _videomae(name: str, cls: Any, output: Callable[[Any], Tensor], **options: Any) -> HostCase:
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


def _predict_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """transformers' encoder with its own mask; its decoder over the visible and the target tokens alone."""
    seen = plain.videomae(clips, bool_masked_pos=hidden(selection)).last_hidden_state
    table = plain.position_embeddings[0].to(clips.dtype)
    asked = plain.mask_token + table[selection.target]
    sequence = torch.cat([plain.encoder_to_decoder(seen) + table[selection.visible], asked], dim=1)
    return plain.decoder(sequence, selection.target.shape[1]).logits


def _classify_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """The head over transformers' encoder with its own mask: a classifier hands the mask on in newer releases alone."""
    seen = plain.videomae(clips, bool_masked_pos=hidden(selection)).last_hidden_state
    return plain.classifier(plain.fc_norm(seen.mean(1)))


def _masked_forward(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
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


_vjepa2 = partial(
    _encoder,
    kind="VJEPA2",
    blocks="encoder.layer",
    query="attention.query",
    any_length=True,
    skip=pytest.mark.skipif(VJEPA2Model is object, reason="transformers has V-JEPA 2 from 4.53 on"),
)
_vivit = partial(_encoder, kind="Vivit", blocks="layers", query="attention.q_proj")
if hasattr(transformers.models.vivit.modeling_vivit, "VivitEncoder"):  # before transformers 5
    _vivit = partial(_encoder, kind="Vivit", blocks="encoder.layer", query="attention.attention.query")
_timesformer = partial(
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


def _fine_tuning(
    family: str, name: str = "", variant: bool = True, cls: Any = FineTuningModel, **options: Any
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
        checkpointing=None if family == "mme" else partial(_set_flag, family),
        variant=variant,
    )


def _set_flag(family: str, model: Any) -> None:
    """The attribute by which the family's repositories ask for checkpointing."""
    for stack in (model.encoder, model.decoder) if hasattr(model, "encoder") else (model,):
        setattr(stack, "with_cp" if family == "videomaev2" else "use_checkpoint", True)


def _run_masked(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    target = ~mask_of(selection.target, math.prod(selection.grid))
    return plain.run_masked(clips, hidden(selection), target)


def _pretraining(family: str, name: str = "", variant: bool = True, **options: Any) -> HostCase:
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
        checkpointing=partial(_set_flag, family),
        variant=variant,
    )


# --- timm: image models, whose modules are run by hand on clips -----------------------------------------------------


def _image_model(
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


CASES = [
    _videomae(
        "VideoMAEForPreTraining",
        VideoMAEForPreTraining,
        lambda output: output.logits,
        reference=_predict_masked,
        unpatched=_masked_forward,
        pretraining=True,
    ),
    _videomae(
        "VideoMAEForVideoClassification",
        VideoMAEForVideoClassification,
        lambda output: output.logits,
        reference=_classify_masked,
    ),
    _videomae("VideoMAEModel", VideoMAEModel, lambda output: output.last_hidden_state, variant=True),
    _vjepa2("VJEPA2ForVideoClassification"),
    _vjepa2("VJEPA2EncoderOnly", variant=True),
    _vivit("VivitForVideoClassification"),
    _vivit("VivitModel", variant=True),
    _timesformer("TimesformerForVideoClassification"),
    _timesformer("TimesformerModel", variant=True),
    _fine_tuning("videomae"),
    _fine_tuning("videomae", "two-heads", cls=TwoHeads),
    _fine_tuning("videomae", "videomae-learnable", use_learnable_pos_emb=True, use_mean_pooling=False),
    _fine_tuning("videomaev2", cos_attn=True),
    _fine_tuning("mme"),
    _fine_tuning("mvd", "mvd-class-token", variant=False, use_cls_token=True),
    _fine_tuning("everest"),
    _pretraining("videomae", variant=False),
    _pretraining("videomaev2"),
    _pretraining("everest"),
    _image_model("vit", timm_models.VIT, variant=False),
    _image_model("siglip", timm_models.SIGLIP, "none", 0),
    _image_model("dinov2-registers", timm_models.DINOV2, "none", 5),
    _image_model("eva", timm_models.EVA, variant=False),
    _image_model("eva-no-prefix", timm_models.EVA, "none", 0, class_token=False),
    _image_model("dinov3", timm_models.DINOV3, "none", 5, variant=False),
    _image_model("rope-mixed", timm_models.MIXED, "none", 1),
]

# Options of the same models that change numbers alone.
_NO_PREFIX = {"class_token": False, "global_pool": "avg"}
_DROPOUTS = {"drop_rate": 0.2, "attn_drop_rate": 0.1}
_ANY_SIZE = {"dynamic_img_size": True}
MORE = [
    *(_fine_tuning(family, f"{family}-plain") for family in ("videomaev2", "mvd")),
    *(
        _fine_tuning(family, f"{family}-first", use_mean_pooling=False)
        for family in ("videomaev2", "mme", "mvd", "everest")
    ),
    _fine_tuning("mvd", "mvd-class-token-first", use_cls_token=True, use_mean_pooling=False),
    *(_fine_tuning(family, f"{family}-dropouts", head_drop_rate=0.4, **_DROPOUTS) for family in FAMILIES),
    _fine_tuning("videomae", "layer-scale", init_values=0.1, drop_path_rate=0.3),
    _fine_tuning("videomae", "no-qkv-bias", qkv_bias=False),
    _fine_tuning("videomae", "tubelet1", tubelet_size=1, num_frames=4),
    _fine_tuning("videomae", "grey", in_chans=1, patch_size=8, img_size=(24, 16)),
    _fine_tuning("videomae", "headless", num_classes=0),
    *(_pretraining(family, f"{family}-pretraining-dropouts", **_DROPOUTS) for family in ("videomae", "videomaev2")),
    _pretraining("everest", "everest-pretraining-dropouts", **_DROPOUTS),
    _pretraining("videomae", "pretraining-layer-scale", init_values=0.1, qkv_bias=False),
    _pretraining("videomaev2", "pretraining-tubelet1", tubelet_size=1),
    _pretraining("videomaev2", "pretraining-cosine", cos_attn=True),
    _pretraining("videomaev2", "pretraining-patch8", patch_size=8, img_size=(24, 16)),
    _image_model("vit-tubelet1", timm_models.VIT, tubelet=1),
    _image_model("eva-tubelet3", timm_models.EVA, tubelet=3),
    _image_model("rope-mixed-tubelet3", timm_models.MIXED, tubelet=3),
    _image_model("vit-grey", timm_models.VIT, in_chans=1),
    *(_image_model(name, name) for name in ("deit_tiny_distilled_patch16_224", "flexivit_small", timm_models.CLIP)),
    _image_model("rope-register", "vit_medium_patch16_rope_reg1_gap_256"),
    *(
        _image_model(f"pooling-{kind}", timm_models.VIT, global_pool=kind)
        for kind in ("avg", "avgmax", "max", "map", "")
    ),
    _image_model("pooling-prr", timm_models.VIT, global_pool="prr", needs="AttentionPoolPrr"),
    _image_model("no-positions", timm_models.VIT, pos_embed="none", **_NO_PREFIX),
    _image_model("normed-patches", timm_models.VIT, embed_layer=partial(PatchEmbed, norm_layer=torch.nn.LayerNorm)),
    _image_model("parallel", "vit_small_patch16_18x2_224"),
    _image_model("siglip-gap", "vit_base_patch16_siglip_gap_224"),
    _image_model("separate-qkv", "eva02_base_patch14_224", img_size=(28, 42)),
    _image_model("dinov3-one-size", timm_models.DINOV3, dynamic_img_size=False),
    _image_model("rope-mixed-with-positions", "vit_small_patch16_rope_mixed_ape_224"),
    _image_model("perception-encoder", "vit_pe_core_tiny_patch16_384"),
    _image_model("vit-64x64", timm_models.VIT, size=(64, 64), **_ANY_SIZE),
    _image_model("flexivit-32x80", "flexivit_small", size=(32, 80), **_ANY_SIZE),
    _image_model("eva-42x28", timm_models.EVA, size=(42, 28), **_ANY_SIZE),
    _image_model("dinov3-64x64", timm_models.DINOV3, size=(64, 64), **_ANY_SIZE),
    _image_model("rope-mixed-32x80", timm_models.MIXED, size=(32, 80), **_ANY_SIZE),
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
