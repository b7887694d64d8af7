"""What a patched timm image model computes, against timm's own modules run by hand on the gathered tokens."""

from __future__ import annotations

import contextlib
import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from host_case import gradients, weighted
from timm.layers import PatchEmbed
from timm_models import (
    CLIP,
    CLOSE,
    DINOV3,
    EVA,
    MIXED,
    SIGLIP,
    VIT,
    build,
    build_clips,
    by_hand,
    entering_block_0,
    every_family,
    family,
    grid_of,
    image_rms,
    inflated,
    patched_copy,
    random_selection,
    record,
    sincos,
    static_clips,
    temporal_of,
    tubelet_tokens,
)
from torch import nn

import everest_tokens as et


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
    def test_output_and_gradients(self, name, temporal):
        plain = build(name)
        model = patched_copy(plain, temporal_embedding=temporal)
        pixels = [build_clips(plain).requires_grad_() for _ in range(2)]
        selection = random_selection(grid_of(plain, pixels[0]))
        kernel = inflated(plain).requires_grad_()
        expected = by_hand(plain, pixels[0], selection, temporal=temporal, kernel=kernel)
        actual = model(pixels[1], token_selection=selection)
        assert actual.shape == (2, 5)
        torch.testing.assert_close(actual, expected.output, **CLOSE)
        entered = entering_block_0(model, pixels[1], token_selection=selection)
        torch.testing.assert_close(entered, expected.entering, **CLOSE)
        weighted(expected.output).backward()
        weighted(actual).backward()
        wanted, found = gradients(plain), gradients(model)
        wanted["patch_embed.proj.weight"] = kernel.grad
        unused = {key for key, _ in plain.named_parameters()} - wanted.keys()
        assert not unused & {"pos_embed", "cls_token", "reg_token", "dist_token", "patch_embed.proj.bias"}
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            # a key's bias moves every score of a query alike
            assert gradient.abs().max() > 1e-12 or "k_" in key, f"{key}: a gradient of zero proves nothing"
            torch.testing.assert_close(found[key], gradient, msg=lambda text, key=key: f"{key}: {text}", **CLOSE)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **CLOSE)

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
    def test_a_place_that_moves(self):
        plain = build(VIT)
        _, clips = static_clips(plain)
        clips[0, :, 2:4, :16, 32:] += 1  # step 1, place 2
        clips[1, :, 4:6, 16:, :16] += 1  # step 2, place 3
        selection = et.select_tokens(patched_copy(plain, et.ReRoSelector(3 / 18)), clips)
        assert selection.visible[0].tolist() == [2, 8, 14]  # step 0 shares step 1's; back again at step 2
        assert selection.visible[1].tolist() == [0, 1, 15]  # ties go to the lower index


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
