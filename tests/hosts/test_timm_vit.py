"""What a patched timm image model computes, against timm's own modules run by hand on the gathered tokens."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import everest_tokens as et

# Not square, so that swapped rows and columns show: 2 × 3 places.
SMALL: dict[str, Any] = {"img_size": (32, 48), "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "flexivit_small": {},
    "vit_base_patch32_clip_224": {"img_size": (64, 96)},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": (28, 42)},
    "eva02_tiny_patch14_224": {"img_size": (28, 42)},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
}
PREFIX = {
    "vit_tiny_patch16_224": 1,
    "deit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "flexivit_small": 1,
    "vit_base_patch32_clip_224": 1,
    "vit_base_patch16_siglip_224": 0,
    "vit_small_patch14_reg4_dinov2": 5,
    "eva02_tiny_patch14_224": 1,
    "vit_small_patch16_dinov3": 5,
    "vit_small_patch16_rope_mixed_224": 1,
    "vit_medium_patch16_rope_reg1_gap_256": 1,
}


def family(name: str, *rest: Any, id: str | None = None, needs: str | None = None) -> Any:
    """A test's parameter, skipped where the installed timm doesn't know the model or lacks one of its layers."""
    missing = not timm.is_model(name) or (needs is not None and not hasattr(timm.layers, needs))
    return pytest.param(
        name, *rest, id=id or name, marks=pytest.mark.skipif(missing, reason=f"timm {timm.__version__} lacks {name}")
    )


every_family = pytest.mark.parametrize("name", [family(name) for name in FAMILIES])
VIT, CLIP, SIGLIP, EVA = (
    "vit_tiny_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
)
DINOV3, MIXED = "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"
# Models are float64, so that what differs is wrong and not rounded; the temporal table may be float32's.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TIME = {"num_frames": 6, "tubelet_size": 2}  # 3 time steps, so 18 tokens


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny image model in eval mode whose every parameter is random: zero biases would hide mistakes."""
    model = timm.create_model(name, pretrained=False, **{**SMALL, **FAMILIES.get(name, {}), **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        parameter.data.copy_(0.2 * noise + around)
    return model.to(dtype)


def patched_copy(plain: Any, selector: Any = None, **kwargs: Any) -> Any:
    return et.patch_videomae(copy.deepcopy(plain), selector, **{**TIME, **kwargs})


def build_clips(
    plain: Any, batch: int = 2, frames: int = 6, size: tuple[int, int] | None = None, seed: int = 1
) -> Tensor:
    """(batch, channels, frames, height, width) of the model's dtype."""
    shape = (batch, 3, frames, *(size or plain.patch_embed.img_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(plain.parameters()).dtype)


def static_clips(plain: Any, frames: int = 6) -> tuple[Tensor, Tensor]:
    """Images (2, C, H, W) and clips (2, C, T, H, W) that show nothing else."""
    images = build_clips(plain, frames=1)[:, :, 0]
    return images, images[:, :, None].expand(-1, -1, frames, -1, -1).contiguous()


def grid_of(plain: Any, clips: Tensor, tubelet: int = 2) -> tuple[int, int, int]:
    _, _, frames, height, width = clips.shape
    return frames // tubelet, height // plain.patch_embed.patch_size[0], width // plain.patch_embed.patch_size[1]


def random_selection(grid: tuple[int, int, int], kept: int = 7, batch: int = 2, seed: int = 3) -> et.TokenSelection:
    """Random tokens of every clip; made without the library's own selecting."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(math.prod(grid), generator=generator) for _ in range(batch)])
    return et.TokenSelection(order[:, :kept].sort(dim=1).values, None, grid)


def inflated(plain: Any, tubelet: int = 2) -> Tensor:
    """The image's kernel, the same in every frame of a tubelet: (D, C, frames, height, width)."""
    return (plain.patch_embed.proj.weight.detach() / tubelet)[:, :, None].repeat(1, 1, tubelet, 1, 1)


def sincos(steps: int, width: int, rms: float) -> Tensor:
    """(steps, width) float64, by plain loops over the formula; sines and cosines have root mean square √½."""
    table = torch.zeros(steps, width, dtype=torch.float64)
    for p in range(steps):
        for i in range(width // 2):
            angle = p * 10000 ** (-i / (width / 2))
            table[p, i], table[p, width // 2 + i] = math.sin(angle), math.cos(angle)
    return table * rms * math.sqrt(2)


def image_rms(plain: Any) -> float:
    """Root mean square of the position embedding of the image's places."""
    if plain.pos_embed is None:
        return 0.02
    places = math.prod(plain.patch_embed.grid_size)
    return plain.pos_embed.detach()[:, -places:].double().square().mean().sqrt().item()


def temporal_of(plain: Any, steps: int, kind: str) -> Tensor:
    table = sincos(steps, plain.embed_dim, image_rms(plain))
    return (table if kind == "sincos" else torch.zeros_like(table)).to(next(plain.parameters()).dtype)


def tubelet_tokens(plain: Any, clips: Tensor, kernel: Tensor) -> Tensor:
    """(B, N, D): 2D convolutions of the frames, one for each frame of a tubelet; no Conv3d."""
    tubelet = kernel.shape[2]
    total: Any = 0
    for offset in range(tubelet):
        frames = clips[:, :, offset::tubelet].transpose(1, 2).flatten(0, 1)  # (B·t, C, H, W)
        total = total + F.conv2d(frames, kernel[:, :, offset], stride=plain.patch_embed.proj.stride)
    if plain.patch_embed.proj.bias is not None:
        total = total + plain.patch_embed.proj.bias[:, None, None]
    tokens = total.flatten(2).transpose(1, 2)  # (B·t, h·w, D)
    return plain.patch_embed.norm(tokens).unflatten(0, (clips.shape[0], -1)).flatten(1, 2)


def by_hand(
    plain: Any,
    clips: Tensor,
    selection: et.TokenSelection,
    *,
    tubelet: int = 2,
    temporal: str = "sincos",
    kernel: Tensor | None = None,
) -> SimpleNamespace:
    """timm's own blocks, norms, pooling and head on [prefix…, kept tokens with positions], one clip at a time.

    One clip at a time, so that rotary embeddings are what timm's blocks take for one image: (K, ·).
    """
    kernel = inflated(plain, tubelet) if kernel is None else kernel
    t, h, w = selection.grid
    tokens = tubelet_tokens(plain, clips, kernel)
    dtype = tokens.dtype
    flat = torch.zeros(1, h, w, plain.embed_dim, dtype=dtype)
    positions = plain._pos_embed(flat if plain.dynamic_img_size else flat.flatten(1, 2))  # timm's, of empty tokens
    positions, rope = positions if isinstance(positions, tuple) else (positions, None)
    prefix = plain.num_prefix_tokens
    table = temporal_of(plain, t, temporal)
    entering, blocks, features = [], [], []
    for clip, (own, visible) in enumerate(zip(tokens, selection.visible, strict=True)):
        places, steps = visible % (h * w), visible // (h * w)
        source = visible if selection.steps is None else selection.steps[clip][steps] * (h * w) + places
        x = own[source] + positions[0, prefix:][places] + table[steps]
        x = torch.cat([positions[0, :prefix], x])[None]
        x = getattr(plain, "norm_pre", nn.Identity())(x)
        entering.append(x)
        outputs = []
        for index, block in enumerate(plain.blocks):
            own_rope = rope[index] if rope is not None and rope.ndim == 4 else rope  # mixed: another one in each block
            x = block(x) if rope is None else block(x, rope=own_rope[..., places, :])
            outputs.append(x)
        blocks.append(outputs)
        features.append(plain.norm(x))
    last = torch.cat(features)
    return SimpleNamespace(
        tokens=tokens,
        entering=torch.cat(entering),
        blocks=[torch.cat(outputs) for outputs in zip(*blocks, strict=True)],
        features=last,
        output=plain.forward_head(last),
    )


def record(model: Any, run: Any, *modules: nn.Module) -> list[list[Tensor]]:
    """What enters each of `modules`, default block 0, in each of their calls during `run()`."""
    modules = modules or (model.blocks[0],)
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda module, args, into=into: into.append(args[0].detach().clone()))
        for module, into in zip(modules, seen, strict=True)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def entering_block_0(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    ((entered,),) = record(model, lambda: model(x, **kwargs))
    return entered


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def weighted(output: Tensor) -> Tensor:
    """A loss whose gradient is another one for each output."""
    return (output * torch.arange(1, output.numel() + 1, dtype=output.dtype).view_as(output)).sum()


class TestPatchEmbedding:
    @every_family
    @pytest.mark.parametrize("tubelet", [1, 2, 3])
    def test_a_static_clips_tokens_are_the_images(self, name, tubelet):
        plain = build(name)
        model = patched_copy(plain, et.ReRoSelector(1.0), tubelet_size=tubelet, temporal_embedding="none")
        images, clips = static_clips(plain)
        prefix, expected = plain.num_prefix_tokens, entering_block_0(plain, images)
        entered = entering_block_0(model, clips)
        torch.testing.assert_close(entered[:, :prefix], expected[:, :prefix], **CLOSE)
        for step in entered[:, prefix:].unflatten(1, (6 // tubelet, -1)).unbind(1):
            torch.testing.assert_close(step, expected[:, prefix:], **CLOSE)

    @every_family
    def test_the_projection_is_an_inflated_conv3d(self, name):
        plain = build(name)
        model = patched_copy(plain, tubelet_size=3)
        projection, image = model.patch_embed.proj, plain.patch_embed.proj
        assert isinstance(projection, nn.Conv3d)
        assert projection.kernel_size == projection.stride == (3, *image.kernel_size)
        assert torch.equal(projection.weight, (image.weight / 3)[:, :, None].expand(-1, -1, 3, -1, -1))
        assert (projection.bias is None) == (image.bias is None) == (name == CLIP)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
        assert [key for key, _ in model.named_buffers()] == [key for key, _ in plain.named_buffers()]
        for key, value in plain.state_dict().items():
            if key != "patch_embed.proj.weight":
                assert torch.equal(model.state_dict()[key], value), key

    def test_what_is_frozen_stays_frozen(self):
        plain = build(VIT)
        plain.patch_embed.proj.weight.requires_grad_(False)
        model = patched_copy(plain)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
        et.unpatch_videomae(model)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]

    def test_classes(self):
        for name, cls in [(VIT, VisionTransformer), (EVA, Eva)]:
            plain = build(name)
            model = patched_copy(plain)
            assert isinstance(model, cls)
            for (where, module), (_, original) in zip(model.named_modules(), plain.named_modules(), strict=True):
                if where != "patch_embed.proj":
                    assert isinstance(module, type(original)), where
                    assert type(module).__name__ == type(original).__name__, where


class TestDuplicatedTokens:
    """Attention over every token t times is attention over it once, and so are average and map pooling."""

    @pytest.mark.parametrize(
        ("name", "overrides"),
        [
            family(SIGLIP, {}),
            family(VIT, {"class_token": False, "global_pool": "avg"}),
            family("flexivit_small", {"class_token": False, "global_pool": "avg"}),
            family(CLIP, {"class_token": False, "global_pool": "avg"}),
            family(EVA, {"class_token": False}),
            family(DINOV3, {"class_token": False, "num_reg_tokens": 0}),
            family(MIXED, {"class_token": False, "global_pool": "avg"}),
        ],
    )
    @pytest.mark.parametrize("tubelet", [2, 3])
    def test_a_static_clip_gives_the_images_output(self, name, overrides, tubelet):
        plain = build(name, **overrides)
        assert plain.num_prefix_tokens == 0
        images, clips = static_clips(plain)
        expected = plain(images)
        settings = {"tubelet_size": tubelet, "temporal_embedding": "none"}
        model = patched_copy(plain, et.ReRoSelector(1.0), **settings)
        torch.testing.assert_close(model(clips), expected, **CLOSE)
        torch.testing.assert_close(
            model.forward_features(clips), plain.forward_features(images).repeat(1, 6 // tubelet, 1), **CLOSE
        )
        # whole copies in any number: the places of two of the steps
        places = math.prod(plain.patch_embed.grid_size)
        visible = torch.arange(places * 2).expand(2, -1).contiguous()
        selection = et.TokenSelection(visible, None, (6 // tubelet, *plain.patch_embed.grid_size))
        torch.testing.assert_close(model(clips, token_selection=selection), expected, **CLOSE)
        # ... but with a temporal embedding the output is another one
        timed = patched_copy(plain, et.ReRoSelector(1.0), **{**settings, "temporal_embedding": "sincos"})
        assert (timed(clips) - expected).abs().max() > 1e-3


class TestByHand:
    @every_family
    def test_the_reference_is_timms_forward(self, name):
        plain = build(name)
        images, clips = static_clips(plain, frames=2)
        places = math.prod(plain.patch_embed.grid_size)
        everything = et.TokenSelection(torch.arange(places).expand(2, -1), None, (1, *plain.patch_embed.grid_size))
        reference = by_hand(plain, clips, everything, temporal="none")
        torch.testing.assert_close(reference.output, plain(images), **CLOSE)
        torch.testing.assert_close(reference.features, plain.forward_features(images), **CLOSE)

    @every_family
    @pytest.mark.parametrize("temporal", ["sincos", "none"])
    def test_output(self, name, temporal):
        plain = build(name)
        model = patched_copy(plain, temporal_embedding=temporal)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        expected = by_hand(plain, clips, selection, temporal=temporal)
        actual = model(clips, token_selection=selection)
        assert actual.shape == (2, 5)
        torch.testing.assert_close(actual, expected.output, **CLOSE)
        entered = entering_block_0(model, clips, token_selection=selection)
        assert entered.shape == (2, PREFIX[name] + 7, 32)
        torch.testing.assert_close(entered, expected.entering, **CLOSE)

    @every_family
    def test_gradients(self, name):
        plain = build(name)
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        kernel = inflated(plain).requires_grad_()
        weighted(by_hand(plain, pixels[0], selection, kernel=kernel).output).backward()
        weighted(model(pixels[1], token_selection=selection)).backward()
        expected, actual = gradients(plain), gradients(model)
        expected["patch_embed.proj.weight"] = kernel.grad
        unused = {key for key, _ in plain.named_parameters()} - expected.keys()
        assert not unused & {"pos_embed", "cls_token", "reg_token", "dist_token", "patch_embed.proj.bias"}
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            # a key's bias moves every score of a query alike
            assert gradient.abs().max() > 1e-12 or "k_" in key, f"{key}: a gradient of zero proves nothing"
            torch.testing.assert_close(actual[key], gradient, msg=lambda text, key=key: f"{key}: {text}", **CLOSE)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **CLOSE)
        assert pixels[0].grad.abs().amax(dim=(1, 3, 4)).min() > 0

    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_gradients_where_the_projection_is_hooked(self, name):
        model = patched_copy(build(name))
        hooked = copy.deepcopy(model)
        calls = []
        hooked.patch_embed.proj.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        clips = build_clips(model)
        selection = random_selection(grid_of(model, clips))
        for each in (model, hooked):
            weighted(each(clips, token_selection=selection)).backward()
        assert calls == [(2, 32, 3, 2, 3)]
        expected, actual = gradients(model), gradients(hooked)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(actual[key], gradient, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("tubelet", [1, 3])
    @pytest.mark.parametrize("name", [family(VIT), family(EVA), family(MIXED)])
    def test_other_tubelets(self, name, tubelet):
        plain = build(name)
        model = patched_copy(plain, tubelet_size=tubelet)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips, tubelet))
        expected = by_hand(plain, clips, selection, tubelet=tubelet).output
        torch.testing.assert_close(model(clips, token_selection=selection), expected, **CLOSE)

    @pytest.mark.parametrize(
        ("name", "pooling"),
        [family(VIT, pooling, id=pooling or "none") for pooling in ("avg", "avgmax", "max", "token", "map", "")]
        + [family(VIT, "prr", id="prr", needs="AttentionPoolPrr")],
    )
    def test_poolings_are_timms(self, name, pooling):
        plain = build(name, global_pool=pooling)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        expected = by_hand(plain, clips, selection).output
        torch.testing.assert_close(patched_copy(plain)(clips, token_selection=selection), expected, **CLOSE)

    @pytest.mark.parametrize(
        ("name", "overrides"),
        [
            family(VIT, {"pos_embed": "none", "class_token": False, "global_pool": "avg"}, id="no-positions"),
            family(VIT, {"embed_layer": partial(PatchEmbed, norm_layer=nn.LayerNorm)}, id="normed-patches"),
            family("vit_small_patch16_18x2_224", {}, id="parallel"),
            family("vit_base_patch16_siglip_gap_224", {}, id="siglip-gap"),
            family("eva02_base_patch14_224", {"img_size": (28, 42)}, id="separate-qkv"),
            family(DINOV3, {"dynamic_img_size": False}, id="dinov3-one-size"),
            family("vit_small_patch16_rope_mixed_ape_224", {}, id="mixed-with-positions"),
            family("vit_pe_core_tiny_patch16_384", {}, id="perception-encoder"),
        ],
    )
    def test_variants(self, name, overrides):
        plain = build(name, **overrides)
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = et.select_tokens(model, clips)
        kernel = inflated(plain).requires_grad_()
        expected, actual = by_hand(plain, clips, selection, kernel=kernel).output, model(clips)
        torch.testing.assert_close(actual, expected, **CLOSE)
        weighted(expected).backward()
        weighted(actual).backward()
        wanted, found = gradients(plain) | {"patch_embed.proj.weight": kernel.grad}, gradients(model)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, **CLOSE)

    def test_default_arguments(self):
        plain = build(VIT)
        model = et.patch_videomae(copy.deepcopy(plain))
        clips = build_clips(plain, frames=16)  # 8·2·3 = 48 tokens
        selection = et.select_tokens(model, clips)
        assert selection.grid == (8, 2, 3)
        assert selection.visible.shape == (2, 28)  # ⌊0.6·48⌋
        assert selection.target is None
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)

    def test_grey_images(self):
        plain = build(VIT, in_chans=1)
        clips = build_clips(plain)[:, :1]
        selection = random_selection(grid_of(plain, clips))
        expected = by_hand(plain, clips, selection).output
        torch.testing.assert_close(patched_copy(plain)(clips, token_selection=selection), expected, **CLOSE)

    def test_position_dropout(self):
        plain = build(VIT, pos_drop_rate=0.75)
        model = patched_copy(plain, et.ReRoSelector(1.0)).train()
        zeros = (entering_block_0(model, build_clips(plain, batch=16)) == 0).float().mean().item()
        assert zeros == pytest.approx(0.75, abs=0.02)  # of 16·19·32 numbers: four standard deviations

    @pytest.mark.parametrize("distilled", [True, False])
    def test_distilled_training_has_two_outputs(self, distilled):
        plain = build("deit_tiny_distilled_patch16_224").train()
        plain.set_distilled_training(distilled)
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        expected = by_hand(plain, clips, selection).output
        assert isinstance(expected, tuple) == distilled
        torch.testing.assert_close(model(clips, token_selection=selection), expected, **CLOSE)

    @pytest.mark.parametrize("name", [family(DINOV3)])
    def test_rotary_augmentation_is_drawn_once_a_forward(self, name):
        plain = build(name, rope_rescale_coords=2.0).train()
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        outputs = []
        for run in (by_hand, lambda _, *args: SimpleNamespace(output=model(args[0], token_selection=args[1]))):
            torch.manual_seed(4)
            outputs.append(run(plain, clips, selection).output)
        torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
        torch.manual_seed(5)
        assert (by_hand(plain, clips, selection).output - outputs[0]).abs().max() > 1e-3  # it is drawn indeed


class TestNormOrder:
    def test_clips_norm_follows_the_positions(self):
        plain = build(CLIP)
        assert isinstance(plain.norm_pre, nn.LayerNorm)
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        run = lambda: model(clips, token_selection=selection)  # noqa: E731
        (normed,), (entered,) = record(model, run, model.norm_pre, model.blocks[0])
        tokens = tubelet_tokens(plain, clips, inflated(plain))
        places, steps = selection.visible % 6, selection.visible // 6
        table = temporal_of(plain, 3, "sincos")
        expected = tokens.gather(1, selection.visible[..., None].expand(-1, -1, 32))
        expected = expected + plain.pos_embed[0, 1:][places] + table[steps]
        torch.testing.assert_close(normed[:, 1:], expected, **CLOSE)
        torch.testing.assert_close(normed[:, 0], (plain.cls_token[0, 0] + plain.pos_embed[0, 0]).expand(2, -1), **CLOSE)
        torch.testing.assert_close(entered, plain.norm_pre(normed), **CLOSE)

    def test_flexivits_class_token_has_no_position(self):
        plain = build("flexivit_small")
        assert plain.pos_embed.shape[1] == 6
        entered = entering_block_0(patched_copy(plain), build_clips(plain))
        torch.testing.assert_close(entered[:, 0], plain.cls_token[0].expand(2, -1), **CLOSE)


class TestTemporalEmbedding:
    @pytest.mark.parametrize(
        "name", [family(VIT), family("flexivit_small"), family(SIGLIP), family(EVA), family(DINOV3), family(MIXED)]
    )
    def test_table_is_the_formula(self, name):
        plain = build(name)
        clips = build_clips(plain, frames=16)
        timed, still = (
            entering_block_0(patched_copy(plain, et.ReRoSelector(1.0), num_frames=16, temporal_embedding=kind), clips)
            for kind in ("sincos", "none")
        )
        prefix = plain.num_prefix_tokens
        assert torch.equal(timed[:, :prefix], still[:, :prefix])  # prefix tokens belong to no time step
        difference = (timed - still)[:, prefix:].unflatten(1, (8, 6))
        expected = sincos(8, 32, image_rms(plain))[None, :, None].expand_as(difference)
        torch.testing.assert_close(difference, expected, **CLOSE)
        assert (plain.pos_embed is None) == (abs(image_rms(plain) - 0.02) < 1e-3)

    def test_the_table_by_numbers(self):
        table = sincos(8, 32, math.sqrt(0.5))  # unscaled: the reference above against hand-worked numbers
        assert table[0].tolist() == pytest.approx([0.0] * 16 + [1.0] * 16)
        assert table[5, 0].item() == pytest.approx(math.sin(5))
        assert table[5, 24].item() == pytest.approx(math.cos(0.05))  # ω = 10000^(−8/16)
        assert table.square().mean().item() == pytest.approx(0.5)

    def test_no_embedding_leaves_time_out(self):
        plain = build(VIT)
        model = patched_copy(plain, et.ReRoSelector(1.0), temporal_embedding="none")
        clips = build_clips(plain)
        backwards = clips.unflatten(2, (3, 2)).flip(2).flatten(2, 3)  # the time steps, in another order
        torch.testing.assert_close(model(backwards), model(clips), **CLOSE)
        timed = patched_copy(plain, et.ReRoSelector(1.0))
        assert (timed(backwards) - timed(clips)).abs().max() > 1e-3


class TestSelecting:
    @pytest.mark.parametrize("name", [family(VIT), family(CLIP), family(EVA), family(DINOV3), family(MIXED)])
    def test_the_most_changed_tokens_before_positions(self, name):
        plain = build(name)
        model = patched_copy(plain, et.ReRoSelector(0.5))
        clips = build_clips(plain)
        tokens = tubelet_tokens(plain, clips, inflated(plain)).unflatten(1, (3, 6))
        change = (tokens[:, 1:] - tokens[:, :-1]).norm(dim=-1)
        importance = torch.cat([change[:, :1], change], dim=1).flatten(1)
        visible = importance.sort(dim=1, descending=True, stable=True).indices[:, :9].sort(dim=1).values
        selection = et.select_tokens(model, clips)
        assert torch.equal(selection.visible, visible)
        torch.testing.assert_close(selection.importance, importance.float())
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)

    @every_family
    def test_the_prefix_is_always_kept(self, name):
        plain = build(name)
        model = patched_copy(plain)
        clips = build_clips(plain)
        for ratio, kept in [(1 / 18, 1), (0.5, 9), (1.0, 18)]:
            model.everest.selector.keep_ratio = ratio  # live
            assert entering_block_0(model, clips).shape == (2, PREFIX[name] + kept, 32)
            assert et.select_tokens(model, clips).visible.shape == (2, kept)

    def test_a_place_that_moves(self):
        plain = build(VIT)
        _, clips = static_clips(plain)
        clips[0, :, 2:4, :16, 32:] += 1  # step 1, place 2
        clips[1, :, 4:6, 16:, :16] += 1  # step 2, place 3
        selection = et.select_tokens(patched_copy(plain, et.ReRoSelector(3 / 18)), clips)
        assert selection.visible[0].tolist() == [2, 8, 14]  # step 0 shares step 1's; back again at step 2
        assert selection.visible[1].tolist() == [0, 1, 15]  # ties go to the lower index

    def test_replay(self):
        plain = build(VIT)
        model = patched_copy(plain, et.RandomSelector(0.5))
        clips = build_clips(plain)
        selection = et.select_tokens(model, clips, generator=torch.Generator().manual_seed(0))
        again = et.select_tokens(model, clips, generator=torch.Generator().manual_seed(0))
        assert torch.equal(selection.visible, again.visible)
        expected = by_hand(plain, clips, selection)
        torch.testing.assert_close(model(clips, token_selection=selection), expected.output, **CLOSE)
        torch.manual_seed(6)
        drawn = et.select_tokens(model, clips)
        torch.manual_seed(6)
        torch.testing.assert_close(model(clips), by_hand(plain, clips, drawn).output, **CLOSE)
        assert not torch.equal(drawn.visible, selection.visible)

    def test_a_tampered_selection(self):
        model = patched_copy(build(VIT))
        clips = build_clips(model)
        for bad in (
            random_selection((3, 3, 2)),
            random_selection((3, 2, 3), batch=1),
            et.TokenSelection(torch.zeros(2, 3), None, (3, 2, 3)),
        ):
            with pytest.raises(ValueError, match="token_selection"):
                model(clips, token_selection=bad)
        with pytest.raises(TypeError):
            model(clips, token_selection=torch.zeros(2, 3, dtype=torch.int64))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", [family(VIT), family(EVA)])
    def test_frame_sampler(self, name, training):
        plain = build(name)
        model = patched_copy(plain, et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(2.0)).train(training)
        clips = build_clips(plain, frames=12)  # 6 candidate steps for 3
        selection = et.select_tokens(model, clips)
        assert selection.grid == (3, 2, 3)
        assert selection.visible.shape == (2, 9)
        assert selection.steps.shape == (2, 3)
        tokens = tubelet_tokens(plain, clips, inflated(plain)).unflatten(1, (6, 6))
        if not training:  # the steps that keep most of ⌊0.5·36⌋ tokens, ties to the earlier
            change = (tokens[:, 1:] - tokens[:, :-1]).norm(dim=-1)
            order = torch.cat([change[:, :1], change], 1).flatten(1).sort(dim=1, descending=True, stable=True).indices
            counts = torch.stack([torch.bincount(row[:18] // 6, minlength=6) for row in order])
            steps = counts.sort(dim=1, descending=True, stable=True).indices[:, :3].sort(dim=1).values
            assert torch.equal(selection.steps, steps)
        expected = by_hand(plain, clips, selection).output  # positions 0, 1, 2 whatever the candidates' are
        torch.testing.assert_close(model(clips, token_selection=selection), expected, **CLOSE)
        with pytest.raises(ValueError, match=r"12.*\n?.*6"):
            model(build_clips(plain))

    def test_frame_sampler_gradients(self):
        plain = build(VIT)
        model = patched_copy(plain, et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(2.0))
        clips = build_clips(plain, frames=12)
        selection = et.select_tokens(model, clips)
        kernel = inflated(plain).requires_grad_()
        weighted(by_hand(plain, clips, selection, kernel=kernel).output).backward()
        weighted(model(clips)).backward()  # eval: the most probable steps again
        torch.testing.assert_close(model.patch_embed.proj.weight.grad, kernel.grad, **CLOSE)


class TestUnpatching:
    @every_family
    @pytest.mark.parametrize("duplicate", [False, True])
    def test_untouched_weights_come_back_bit_for_bit(self, name, duplicate, caplog):
        plain = build(name)
        images = build_clips(plain, frames=1)[:, :, 0]
        model = patched_copy(plain, tubelet_size=3)  # a third three times isn't the whole, in floating point
        model(build_clips(plain))
        if duplicate:
            model = copy.deepcopy(model)
        with caplog.at_level(logging.INFO):
            et.unpatch_videomae(model)
        assert not caplog.records
        expected = plain.state_dict()
        assert list(model.state_dict()) == list(expected)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
        assert torch.equal(model(images), plain(images))
        assert not hasattr(model, "everest")
        for (where, module), (_, original) in zip(model.named_modules(), plain.named_modules(), strict=True):
            assert type(module) is type(original), where
            assert vars(module).keys() == vars(original).keys(), where
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
                assert len(getattr(module, hooks)) == len(getattr(original, hooks)), (where, hooks)
        assert type(model.patch_embed.proj) is nn.Conv2d
        assert model.patch_embed.proj.stride == plain.patch_embed.proj.stride

    @pytest.mark.parametrize("name", [VIT, CLIP, EVA])
    def test_after_training_the_kernel_is_summed_over_time(self, name, caplog):
        plain = build(name)
        model = patched_copy(plain, tubelet_size=2)
        weighted(model(build_clips(plain))).backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        trained = {key: value.clone() for key, value in model.state_dict().items()}
        with caplog.at_level(logging.INFO, logger="everest_tokens"):
            et.unpatch_videomae(model)
        (line,) = caplog.records
        assert line.name.startswith("everest_tokens")
        assert "sum" in line.getMessage()
        summed = trained.pop("patch_embed.proj.weight").sum(dim=2)
        assert not torch.equal(summed, plain.patch_embed.proj.weight)
        assert type(model.patch_embed.proj) is nn.Conv2d
        torch.testing.assert_close(model.patch_embed.proj.weight, summed)
        for key, value in trained.items():
            assert torch.equal(model.state_dict()[key], value), key
        # the image model that sees each frame of a tubelet alike
        images = build_clips(plain, frames=1)[:, :, 0]
        plain.load_state_dict({**trained, "patch_embed.proj.weight": summed})
        torch.testing.assert_close(model(images), plain(images), **CLOSE)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loaded_weights_are_not_the_old_ones(self, assign):
        plain, other = build(VIT), build(VIT, seed=1)
        model = patched_copy(plain)
        model.load_state_dict(patched_copy(other).state_dict(), assign=assign)
        et.unpatch_videomae(model)
        images = build_clips(plain, frames=1)[:, :, 0]
        torch.testing.assert_close(model(images), other(images), **CLOSE)

    @pytest.mark.parametrize("tubelet", [2, 3])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_dtype_is_no_training(self, dtype, tubelet, caplog):
        plain = build(VIT, dtype=torch.float32)
        model = patched_copy(plain, tubelet_size=tubelet).to(dtype)
        with caplog.at_level(logging.INFO):
            et.unpatch_videomae(model)
        assert not caplog.records
        expected = plain.to(dtype).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key

    @pytest.mark.parametrize("trained", [False, True])
    def test_what_was_frozen_meanwhile_stays_frozen(self, trained):
        model = patched_copy(build(VIT))
        if trained:
            model.patch_embed.proj.weight.data.mul_(1.5)
        model.patch_embed.requires_grad_(False)
        et.unpatch_videomae(model)
        assert [parameter.requires_grad for parameter in model.patch_embed.parameters()] == [False, False]

    def test_other_hooks_on_the_projection_stay(self):
        model = build(VIT)
        calls = []
        model.patch_embed.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        images = build_clips(model, frames=1)[:, :, 0]
        et.unpatch_videomae(et.patch_videomae(model, **TIME))(images)
        assert calls == [(2, 6, 32)]

    def test_a_hook_on_the_images_projection_is_not_lost(self):
        plain = build(VIT)
        plain.patch_embed.proj.register_forward_hook(lambda module, args, output: 3 * output)
        _, clips = static_clips(plain)
        with contextlib.suppress(TypeError, ValueError):  # a refusal is fine, silence is not
            model = patched_copy(plain, et.ReRoSelector(1.0), temporal_embedding="none")
            expected = entering_block_0(plain, clips[:, :, 0])[:, 1:].repeat(1, 3, 1)
            torch.testing.assert_close(entering_block_0(model, clips)[:, 1:], expected, **CLOSE)

    def test_an_unpatched_model(self):
        for call in (et.unpatch_videomae, lambda model: et.select_tokens(model, torch.zeros(1, 3, 6, 32, 48))):
            with pytest.raises(ValueError, match="not patched"):
                call(build(VIT))


class TestPatchingTwice:
    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_replaces_the_first(self, name):
        plain = build(name)
        model = patched_copy(plain, et.ReRoSelector(0.25), tubelet_size=3)
        assert et.patch_videomae(model, et.ReRoSelector(0.5), num_frames=8, tubelet_size=2) is model
        clips = build_clips(plain, frames=8)
        selection = et.select_tokens(model, clips)
        assert selection.visible.shape == (2, 12)
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)
        et.unpatch_videomae(model)
        assert torch.equal(model.patch_embed.proj.weight, plain.patch_embed.proj.weight)

    def test_keeps_the_trained_kernel_and_the_selection(self):
        """Of the same tubelets it is the same projection, which an optimiser may hold already."""
        model = patched_copy(build(VIT), et.ReRoSelector(0.8))
        parameter = model.patch_embed.proj.weight
        parameter.data[:, :, 0] += 1  # the two frames of a tubelet have their own weights now
        trained = parameter.detach().clone()
        et.patch_videomae(model, num_frames=8)
        assert model.patch_embed.proj.weight is parameter
        assert torch.equal(parameter, trained)
        assert model.everest.selector.keep_ratio == 0.8
        et.unpatch_videomae(model)
        assert torch.equal(model.patch_embed.proj.weight, trained.sum(dim=2))

    def test_a_failure_changes_nothing(self):
        plain = build(VIT)
        model = patched_copy(plain)
        clips = build_clips(plain)
        expected = model(clips)
        with pytest.raises(ValueError, match="temporal_embedding"):
            et.patch_videomae(model, **TIME, temporal_embedding="fourier")
        assert torch.equal(model(clips), expected)
        for arguments, match in [({"num_frames": 5}, "5"), ({"selector": et.ReRoSelector(0.01)}, "no token")]:
            untouched = copy.deepcopy(plain)
            with pytest.raises(ValueError, match=match):
                et.patch_videomae(untouched, **{**TIME, **arguments})
            assert type(untouched) is VisionTransformer
            assert type(untouched.patch_embed.proj) is nn.Conv2d
            assert not hasattr(untouched, "everest")


class TestTimmsMethods:
    @every_family
    def test_features_and_head(self, name):
        plain = build(name)
        model = patched_copy(plain)
        clips = build_clips(plain)
        expected = by_hand(plain, clips, et.select_tokens(model, clips))
        features = model.forward_features(clips)
        torch.testing.assert_close(features, expected.features, **CLOSE)
        torch.testing.assert_close(model.forward_head(features), expected.output, **CLOSE)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, plain.forward_head(expected.features, pre_logits=True), **CLOSE)

    @every_family
    def test_intermediates(self, name):
        plain = build(name, depth=3)
        model = patched_copy(plain)
        clips = build_clips(plain)
        expected = by_hand(plain, clips, et.select_tokens(model, clips))
        prefix = PREFIX[name]
        final, found = model.forward_intermediates(clips, output_fmt="NLC")
        torch.testing.assert_close(final, expected.features, **CLOSE)
        assert len(found) == 3
        for each, block in zip(found, expected.blocks, strict=True):
            torch.testing.assert_close(each, block[:, prefix:], **CLOSE)
        (only,) = model.forward_intermediates(
            clips, [1], output_fmt="NLC", norm=True, stop_early=True, intermediates_only=True
        )
        torch.testing.assert_close(only, plain.norm(expected.blocks[1])[:, prefix:], **CLOSE)
        if prefix:
            pairs = model.forward_intermediates(
                clips, 2, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
            )
            for (tokens, prefixes), block in zip(pairs, expected.blocks[1:], strict=True):
                torch.testing.assert_close(tokens, block[:, prefix:], **CLOSE)
                torch.testing.assert_close(prefixes, block[:, :prefix], **CLOSE)

    @pytest.mark.parametrize("name", [VIT, SIGLIP, EVA])
    def test_a_map_of_kept_tokens_does_not_exist(self, name):
        model = patched_copy(build(name))
        clips = build_clips(model)
        for kwargs in ({}, {"output_fmt": "NCHW"}):
            with pytest.raises(ValueError, match="NLC"):
                model.forward_intermediates(clips, **kwargs)

    @pytest.mark.parametrize("name", [family(VIT), family("vit_small_patch14_reg4_dinov2")])
    def test_get_intermediate_layers(self, name):
        plain = build(name, depth=3)
        model = patched_copy(plain)
        clips = build_clips(plain)
        expected = by_hand(plain, clips, et.select_tokens(model, clips))
        prefix = PREFIX[name]
        found = model.get_intermediate_layers(clips, 2)
        assert len(found) == 2
        for each, block in zip(found, expected.blocks[1:], strict=True):
            torch.testing.assert_close(each, block[:, prefix:], **CLOSE)
        (pair,) = model.get_intermediate_layers(clips, [0], return_prefix_tokens=True, norm=True)
        normed = plain.norm(expected.blocks[0])
        torch.testing.assert_close(pair, (normed[:, prefix:], normed[:, :prefix]), **CLOSE)
        with pytest.raises(ValueError, match=r"NLC|reshape"):
            model.get_intermediate_layers(clips, 1, reshape=True)

    @every_family
    def test_gradient_checkpointing(self, name):
        plain = build(name).train()
        model = patched_copy(plain)
        plain.set_grad_checkpointing(True)
        try:
            plain(build_clips(plain, frames=1)[:, :, 0])
        except ValueError as error:
            pytest.skip(f"timm {timm.__version__}'s own fails on images: {error}")
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(True)
        clips = build_clips(model)
        calls = [[], []]
        for each, into in zip((model, other), calls, strict=True):
            each.blocks[1].norm1.register_forward_pre_hook(lambda module, args, into=into: into.append(1))
            weighted(each(clips)).backward()
        assert [len(each) for each in calls] == [1, 2]  # checkpointing ran it again in backward
        expected, actual = gradients(model), gradients(other)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(actual[key], gradient, rtol=1e-9, atol=1e-11)
        other.set_grad_checkpointing(False)
        assert not other.grad_checkpointing

    @every_family
    def test_layer_decay_groups_are_the_images(self, name):
        def groups(model: Any) -> dict[str, tuple[float, float]]:
            named = {id(parameter): key for key, parameter in model.named_parameters()}
            listed = param_groups_layer_decay(
                model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
            )
            return {
                named[id(parameter)]: (group["lr_scale"], group["weight_decay"])
                for group in listed
                for parameter in group["params"]
            }

        plain = build(name)
        expected, actual = groups(plain), groups(patched_copy(plain))
        assert expected["patch_embed.proj.weight"][0] < expected["blocks.1.attn.proj.weight"][0] < 1
        assert actual == expected

    def test_an_optimiser_of_timms_trains_it(self):
        model = patched_copy(build(VIT)).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        clips, labels = build_clips(model, batch=4), torch.arange(4)
        losses = []
        for _ in range(8):
            losses.append(F.cross_entropy(model(clips), labels))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]

    def test_clips_by_timms_keyword(self):
        model = patched_copy(build(VIT))
        clips = build_clips(model)
        assert torch.equal(model(x=clips), model(clips))
        assert torch.equal(model.forward_features(x=clips), model.forward_features(clips))
        found = model.forward_intermediates(x=clips, indices=1, output_fmt="NLC", intermediates_only=True)
        by_position = model.forward_intermediates(clips, 1, False, False, False, "NLC", True)
        assert torch.equal(found[0], by_position[0])

    def test_another_classifier(self):
        model = patched_copy(build(VIT, dtype=torch.float32))
        clips = build_clips(model)
        features = model.forward_features(clips)
        model.reset_classifier(7)
        assert model(clips).shape == (2, 7)
        assert torch.equal(model.forward_features(clips), features)
        model.reset_classifier(0)
        torch.testing.assert_close(model(clips), features[:, 0], **CLOSE)


class TestDynamicImageSize:
    @pytest.mark.parametrize("size", [(64, 64), (32, 80), (48, 32), (32, 48)])
    @pytest.mark.parametrize(
        "name", [family(VIT), family("flexivit_small"), family(EVA), family(DINOV3), family(MIXED)]
    )
    def test_other_sizes(self, name, size):
        plain = build(name, dynamic_img_size=True)
        patch = plain.patch_embed.patch_size[0]
        size = (size[0] // 16 * patch, size[1] // 16 * patch)
        model = patched_copy(plain, et.ReRoSelector(0.5))
        clips = build_clips(plain, size=size)
        grid = grid_of(plain, clips)
        selection = random_selection(grid, kept=7)
        expected = by_hand(plain, clips, selection)
        torch.testing.assert_close(model(clips, token_selection=selection), expected.output, **CLOSE)
        selection = et.select_tokens(model, clips)
        assert selection.grid == grid
        assert selection.visible.shape == (2, math.prod(grid) // 2)
        if plain.pos_embed is None:
            return
        prefix = plain.pos_embed.shape[1] - 6
        resampled = resample_abs_pos_embed(
            plain.pos_embed, new_size=grid[1:], old_size=(2, 3), num_prefix_tokens=prefix
        )[0, prefix:]
        area = math.prod(grid[1:])
        visible = selection.visible
        tokens = tubelet_tokens(plain, clips, inflated(plain)).gather(1, visible[..., None].expand(-1, -1, 32))
        summed = tokens + resampled[visible % area] + temporal_of(plain, 3, "sincos")[visible // area]
        entered = entering_block_0(model, clips)[:, plain.num_prefix_tokens :]
        torch.testing.assert_close(entered, summed, **CLOSE)

    def test_positions_learn_at_another_size(self):
        plain = build(VIT, dynamic_img_size=True)
        model = patched_copy(plain)
        clips = build_clips(plain, size=(64, 64))
        selection = random_selection(grid_of(plain, clips))
        weighted(by_hand(plain, clips, selection).output).backward()
        weighted(model(clips, token_selection=selection)).backward()
        torch.testing.assert_close(model.pos_embed.grad, plain.pos_embed.grad, **CLOSE)

    @pytest.mark.parametrize("name", [family(VIT), family(EVA)])
    def test_padding(self, name):
        plain = build(name, dynamic_img_size=True, dynamic_img_pad=True)
        model = patched_copy(plain, et.ReRoSelector(0.5))
        patch = plain.patch_embed.patch_size[0]
        clips = build_clips(plain, size=(2 * patch + 3, 4 * patch - 5))
        selection = et.select_tokens(model, clips)
        assert selection.grid == (3, 3, 4)
        expected = by_hand(plain, F.pad(clips, (0, 5, 0, patch - 3)), selection)
        actual = model(clips)
        torch.testing.assert_close(actual, expected.output, **CLOSE)
        assert model.forward_intermediates(clips, output_fmt="NLC")[1][0].shape == (2, 18, 32)
        kernel = inflated(plain).requires_grad_()
        weighted(by_hand(plain, F.pad(clips, (0, 5, 0, patch - 3)), selection, kernel=kernel).output).backward()
        weighted(actual).backward()
        torch.testing.assert_close(model.patch_embed.proj.weight.grad, kernel.grad, **CLOSE)

    def test_set_input_size(self):
        plain = build(VIT)
        model = patched_copy(plain)
        for each in (plain, model):
            each.set_input_size(img_size=(48, 64))
        clips = build_clips(plain)
        assert clips.shape == (2, 3, 6, 48, 64)
        selection = et.select_tokens(model, clips)
        assert selection.grid == (3, 3, 4)
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)

    def test_a_size_that_is_no_multiple_of_the_patch(self):
        model = patched_copy(build(VIT, dynamic_img_size=True))
        with pytest.raises(ValueError, match="40"):
            model(build_clips(model, size=(40, 48)))


class TestRefusals:
    @pytest.mark.parametrize("name", [family(VIT), family(EVA), family(DINOV3)])
    def test_images(self, name):
        model = patched_copy(build(name))
        images = build_clips(model, frames=1)[:, :, 0]
        for call in (model, model.forward_features, lambda x: et.select_tokens(model, x)):
            with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)") as caught:
                call(images)
            assert "unpatch_videomae" in str(caught.value)
            assert str(tuple(images.shape)) in str(caught.value)

    @pytest.mark.parametrize("name", [VIT, EVA])
    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param((2, 3, 4, 32, 48), id="frames"),
            pytest.param((2, 3, 6, 48, 32), id="size"),
            pytest.param((2, 3, 6, 32, 64), id="width"),
            pytest.param((2, 1, 6, 32, 48), id="channels"),
            pytest.param((2, 6, 3, 32, 48), id="frames-first"),
        ],
    )
    def test_shapes(self, name, shape):
        model = patched_copy(build(name, img_size=(28, 42) if name == EVA else (32, 48)))
        if name == EVA:
            shape = (*shape[:3], shape[3] // 16 * 14, shape[4] // 16 * 14)
        height, width = model.patch_embed.img_size
        for call in (model, lambda x: et.select_tokens(model, x)):
            with pytest.raises(ValueError, match=rf"3, 6, {height}, {width}") as caught:
                call(torch.zeros(shape))
            assert str(shape) in str(caught.value)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
    def test_integer_pixels(self, dtype):
        model = patched_copy(build(VIT))
        with pytest.raises(ValueError, match=str(dtype)):
            model(torch.zeros(2, 3, 6, 32, 48, dtype=dtype))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_no_tensor(self, dynamic):
        with pytest.raises(TypeError, match="list"):
            patched_copy(build(VIT, dynamic_img_size=dynamic))([1, 2])

    def test_a_hybrids_patch_embedding(self):
        model = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, embed_dim=24, num_heads=2, depth=1)
        with pytest.raises(TypeError, match="patch"):
            et.patch_videomae(model)
        assert type(model) is VisionTransformer

    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_patch_dropout(self, name):
        with pytest.raises(ValueError, match="patch_drop"):
            et.patch_videomae(build(name, patch_drop_rate=0.25))

    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            family("resnet10t", {}),
            family("mixer_s32_224", {}),
            family(
                "swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
            ),
            family("beit_base_patch16_224", {"embed_dim": 24, "num_heads": 2, "depth": 1}),
            family("naflexvit_base_patch16_gap", {"embed_dim": 24, "num_heads": 2, "depth": 1}),
        ],
    )
    @pytest.mark.parametrize("call", [et.patch_videomae, et.count_flops])
    def test_other_timm_models(self, name, kwargs, call):
        model = timm.create_model(name, pretrained=False, **kwargs)
        with pytest.raises(TypeError, match="VisionTransformer") as caught:
            call(model)
        assert type(model).__name__ in str(caught.value)
        assert "Eva" in str(caught.value)

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"num_frames": 7}, "7.*divisible.*2|7.*2"),
            ({"num_frames": 2}, "two time steps"),
            ({"num_frames": 0}, "num_frames|time steps"),
            ({"tubelet_size": 0}, "tubelet_size"),
            ({"tubelet_size": -2}, "tubelet_size"),
            ({"num_frames": 16.0}, "num_frames"),
            ({"temporal_embedding": "learned"}, "learned"),
            ({"temporal_embedding": None}, "temporal_embedding"),
            ({"fused_attention": True}, "fused_attention"),
            ({"visible": et.TubeSelector(0.5)}, "visible"),
            ({"selector": et.ReRoSelector(0.001)}, "no token"),
        ],
    )
    def test_settings(self, kwargs, match):
        model = build(VIT)
        with pytest.raises((ValueError, TypeError), match=match):
            et.patch_videomae(model, **{**TIME, **kwargs})
        assert type(model.patch_embed.proj) is nn.Conv2d

    def test_unknown_temporal_embeddings_name_the_known(self):
        with pytest.raises(ValueError, match=r"sincos.*none|none.*sincos"):
            et.patch_videomae(build(VIT), temporal_embedding="learned")


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("name", [family(VIT), family(EVA), family(DINOV3), family(MIXED)])
    def test_a_copy_is_the_same_and_independent(self, name, duplicate):
        plain = build(name)
        model = patched_copy(plain)
        clips = build_clips(plain)
        expected = model(clips)
        copied = duplicate(model)
        assert type(copied) is type(model)
        assert torch.equal(copied(clips), expected)
        copied.everest.selector.keep_ratio = 0.25
        for parameter in copied.parameters():
            parameter.data.zero_()
        assert torch.equal(model(clips), expected)
        et.unpatch_videomae(copied)
        assert torch.equal(model(clips), expected)
        assert type(copied) is type(plain)

    @every_family
    @pytest.mark.parametrize("trained", [False, True])
    def test_a_state_dict_loads_into_a_fresh_model(self, name, trained):
        model = patched_copy(build(name))
        clips = build_clips(model)
        if trained:  # what was scaled to the positions at patching must not hang on them
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = patched_copy(build(name, seed=9))
        fresh.load_state_dict(torch.load(buffer))
        torch.testing.assert_close(fresh(clips), model(clips), **CLOSE)

    def test_an_images_state_dict_is_refused_by_shape(self):
        plain = build(VIT)
        with pytest.raises(RuntimeError, match=r"patch_embed\.proj\.weight"):
            patched_copy(plain).load_state_dict(plain.state_dict())


class TestCompileAndPrecision:
    @pytest.mark.parametrize(
        ("name", "overrides", "backend", "training"),
        [
            family(VIT, {}, "aot_eager", True, id="vit-training"),
            family(CLIP, {}, "eager", False, id="clip"),
            family(SIGLIP, {}, "eager", False, id="siglip"),
            family("deit_tiny_distilled_patch16_224", {}, "eager", False, id="distilled"),
            family(EVA, {}, "eager", True, id="eva-training"),
            family(DINOV3, {}, "eager", False, id="dinov3"),
            family(MIXED, {}, "eager", False, id="mixed"),
            family(VIT, {"dynamic_img_size": True}, "eager", False, id="dynamic"),
        ],
    )
    def test_compiles_whole(self, name, overrides, backend, training):
        torch._dynamo.reset()
        model = patched_copy(build(name, **overrides)).train(training)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
        clips = build_clips(model)
        with torch.set_grad_enabled(training):
            expected, actual = model(clips), compiled(clips)
        torch.testing.assert_close(actual, expected, **CLOSE)
        if training:
            weighted(expected).backward()
            weighted(actual).backward()
            wanted, found = gradients(model), gradients(compiled._orig_mod)
            assert found.keys() == wanted.keys()
            for key, gradient in wanted.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-3)
        # wrappers are looked through
        assert torch.equal(et.select_tokens(compiled, clips).visible, et.select_tokens(model, clips).visible)
        assert type(et.unpatch_videomae(compiled)._orig_mod.patch_embed.proj) is nn.Conv2d

    @pytest.mark.parametrize("name", [VIT, SIGLIP, EVA])
    def test_exports_with_a_dynamic_batch(self, name):
        plain = build(name)
        model = patched_copy(plain)
        batch = torch.export.Dim("batch", min=1, max=64)
        # timm's own does
        torch.export.export(plain, (build_clips(plain, frames=1)[:, :, 0],), dynamic_shapes=({0: batch},))
        exported = torch.export.export(model, (build_clips(plain),), dynamic_shapes=({0: batch},)).module()
        clips = build_clips(plain, batch=5)
        torch.testing.assert_close(exported(clips), model(clips), **CLOSE)

    def test_a_selection_and_a_live_ratio_under_compile(self):
        torch._dynamo.reset()
        plain = build(VIT)
        model = patched_copy(plain)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips = build_clips(plain)
        selection = random_selection((3, 2, 3))
        with torch.no_grad():
            expected = by_hand(plain, clips, selection).output
            torch.testing.assert_close(compiled(clips, token_selection=selection), expected, **CLOSE)
            for ratio in (0.25, 0.75):
                model.everest.selector.keep_ratio = ratio
                expected = by_hand(plain, clips, et.select_tokens(model, clips)).output
                torch.testing.assert_close(compiled(clips), expected, **CLOSE)

    @every_family
    def test_autocast(self, name):
        plain = build(name, dtype=torch.float32)
        model = patched_copy(plain)
        clips = build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert et.select_tokens(model, clips).importance.dtype == torch.float32
            actual = model(clips, token_selection=selection)
            expected = by_hand(plain, clips, selection)
        assert actual.dtype == expected.output.dtype == torch.bfloat16
        whole = by_hand(plain, clips, selection).output  # in float32
        error = (actual.float() - whole).norm() / whole.norm()
        assert error < 3 * (expected.output - whole).norm() / whole.norm() + 0.02
        actual.float().sum().backward()
        assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
        assert gradients(model)["patch_embed.proj.weight"].abs().max() > 0

    @pytest.mark.parametrize("name", [family(VIT), family(EVA), family(DINOV3)])
    def test_weights_of_half_precision(self, name):
        plain = build(name, dtype=torch.float32)
        clips = build_clips(plain)
        model = patched_copy(plain).to(torch.bfloat16)
        selection = random_selection(grid_of(plain, clips))
        actual = model(clips.to(torch.bfloat16), token_selection=selection)
        assert actual.dtype == torch.bfloat16
        expected = by_hand(plain, clips, selection).output
        assert (actual.float() - expected).norm() / expected.norm() < 0.06


class TestDropPath:
    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_rises_and_is_taken_back(self, name):
        plain = build(name, depth=3)
        model = patched_copy(plain, et.ReRoSelector(1.0), drop_path=0.5)
        clips = build_clips(plain)
        assert torch.equal(model(clips), patched_copy(plain, et.ReRoSelector(1.0))(clips))  # eval
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
        assert rates == pytest.approx([0, 0.25, 0.5])
        assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks] == pytest.approx(rates)
        assert list(model.state_dict()) == list(plain.state_dict())
        et.unpatch_videomae(model)
        assert {type(block.drop_path1) for block in model.blocks} == {nn.Identity}
        assert {type(block.drop_path2) for block in model.blocks} == {nn.Identity}

    def test_blocks_without_a_place_for_it(self):
        model = build("vit_small_patch16_18x2_224")  # two attentions and two MLPs side by side
        with contextlib.suppress(ValueError):  # a refusal is fine, silence is not
            patched = patched_copy(model, drop_path=0.9).train()
            clips, selection = build_clips(model, batch=8), random_selection((3, 2, 3), batch=8)
            first, second = (patched(clips, token_selection=selection) for _ in range(2))
            assert (first - second).abs().max() > 1e-3


class TestCountFlops:
    """Half of what torch counts: it counts a multiply–accumulate as two."""

    @staticmethod
    def counted(model: Any, x: Tensor) -> float:
        model = copy.deepcopy(model).requires_grad_(False)  # torch's counter stumbles over parameters as arguments
        # unfused, because torch doesn't count the CPU's fused attention
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(x)
        return counter.get_total_flops() / 2

    SHAPES = pytest.mark.parametrize(
        ("name", "overrides"),
        [
            family(VIT, {}),
            family(VIT, {"mlp_ratio": 1.5, "global_pool": "avg"}, id="narrow-mlp"),
            family("deit_tiny_distilled_patch16_224", {}),
            family(CLIP, {"num_classes": 0}, id="clip-without-head"),
            family(SIGLIP, {}),
            family(VIT, {"global_pool": "map"}, id="map-without-prefix"),
            family("vit_small_patch14_reg4_dinov2", {}),
            family("vit_small_patch16_18x2_224", {}, id="parallel"),
            family("vit_giant_patch14_dinov2", {"img_size": (28, 42), "mlp_ratio": 5.0}, id="swiglu-packed"),
            family(EVA, {}),
            family("eva02_base_patch14_224", {"img_size": (28, 42)}, id="swiglu"),
            family(DINOV3, {}),
            family(MIXED, {}),
            family("vit_dpwee_patch16_reg1_gap_256", {}, id="differential-attention"),
            family(VIT, {"global_pool": "prr"}, id="prr", needs="AttentionPoolPrr"),
        ],
    )

    @SHAPES
    def test_the_image_model(self, name, overrides):
        model = build(name, **{"embed_dim": 64, **overrides})
        images = build_clips(model, batch=1, frames=1)[:, :, 0]
        assert et.count_flops(model).total == self.counted(model, images)

    @SHAPES
    @pytest.mark.parametrize("ratio", [0.3, 1.0])
    def test_patched(self, name, overrides, ratio):
        model = et.patch_videomae(build(name, **{"embed_dim": 64, **overrides}), et.ReRoSelector(ratio), num_frames=8)
        clips = build_clips(model, batch=1, frames=8)
        count = et.count_flops(model)
        assert count.total - count.selection == self.counted(model, clips)
        assert count.decoder == 0
        assert count.selection == 3 * 6 * 64  # l2: one product a channel of each pair
        assert count.patch_embedding == 24 * 64 * 3 * 2 * math.prod(model.patch_embed.patch_size)

    def test_frame_sampler(self):
        model = et.patch_videomae(
            build(VIT, embed_dim=64), et.ReRoSelector(0.5), num_frames=8, frame_sampler=et.InfoFrameSampler(1.5)
        )
        clips = build_clips(model, batch=1, frames=12)
        assert et.count_flops(model).total == pytest.approx(self.counted(model, clips), rel=0.005)

    def test_a_full_size_model(self):
        # ViT-B over 8·14·14 tokens is VideoMAE's ViT-B (180.5 GFLOPs in Table 1); a block counts alike twelve times.
        model = VisionTransformer(depth=1, num_classes=400, class_token=False, global_pool="avg").to("meta")
        count = et.count_flops(et.patch_videomae(model, et.ReRoSelector(1.0)))
        assert (count.patch_embedding + 12 * count.encoder + count.head) / 1e9 == pytest.approx(180.5, rel=0.01)
        assert type(et.unpatch_videomae(model).patch_embed.proj) is nn.Conv2d
