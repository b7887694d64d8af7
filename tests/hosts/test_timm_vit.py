"""What timm's image models have of their own, against timm's modules run by hand; all else is the host contract's."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from host_case import weighted
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm_models import (
    CLIP,
    CLOSE,
    DINOV2,
    DINOV3,
    EVA,
    MIXED,
    SIGLIP,
    TIME,
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
    sincos,
    static_clips,
    temporal_of,
    tubelet_tokens,
)
from torch import nn

import everest_tokens as et

NO_PREFIX = {"class_token": False, "global_pool": "avg"}


class TestInflation:
    @every_family
    def test_a_static_clips_tokens_are_the_images(self, name):
        plain = build(name)
        images, clips = static_clips(plain)
        prefix, expected = plain.num_prefix_tokens, entering_block_0(plain, images)
        for tubelet in (1, 2, 3):
            model = patched_copy(plain, et.ReRoSelector(1.0), tubelet_size=tubelet, temporal_embedding="none")
            entered = entering_block_0(model, clips)
            torch.testing.assert_close(entered[:, :prefix], expected[:, :prefix], **CLOSE)
            for step in entered[:, prefix:].unflatten(1, (6 // tubelet, -1)).unbind(1):
                torch.testing.assert_close(step, expected[:, prefix:], **CLOSE)

    @every_family
    def test_the_projection_is_an_inflated_conv3d(self, name):
        plain = build(name)
        plain.patch_embed.proj.weight.requires_grad_(False)
        model = patched_copy(plain, tubelet_size=3)
        projection, image = model.patch_embed.proj, plain.patch_embed.proj
        assert isinstance(projection, nn.Conv3d)
        assert projection.kernel_size == projection.stride == (3, *image.kernel_size)
        assert torch.equal(projection.weight, (image.weight / 3)[:, :, None].expand(-1, -1, 3, -1, -1))
        assert (projection.bias is None) == (image.bias is None) == (name == CLIP)
        for _ in range(2):  # what is frozen stays frozen, unpatched too
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
            model = et.unpatch_videomae(model) if hasattr(model, "everest") else model

    @pytest.mark.parametrize(
        ("name", "overrides"),
        [
            family(SIGLIP, {}),
            family(VIT, NO_PREFIX),
            family("flexivit_small", NO_PREFIX),
            family(CLIP, NO_PREFIX),
            family(EVA, {"class_token": False}),
            family(DINOV3, {"class_token": False, "num_reg_tokens": 0}),
            family(MIXED, NO_PREFIX),
        ],
    )
    @pytest.mark.parametrize("tubelet", [2, 3])
    def test_a_static_clip_gives_the_images_output(self, name, overrides, tubelet):
        """Attention over every token t times is attention over it once, and so are average and map pooling."""
        plain = build(name, **overrides)
        images, clips = static_clips(plain)
        expected = plain(images)
        settings = {"tubelet_size": tubelet, "temporal_embedding": "none"}
        model = patched_copy(plain, et.ReRoSelector(1.0), **settings)
        torch.testing.assert_close(model(clips), expected, **CLOSE)
        features = plain.forward_features(images).repeat(1, 6 // tubelet, 1)
        torch.testing.assert_close(model.forward_features(clips), features, **CLOSE)
        # whole copies in any number: the places of two of the steps
        visible = torch.arange(2 * math.prod(plain.patch_embed.grid_size)).expand(2, -1).contiguous()
        selection = et.TokenSelection(visible, None, (6 // tubelet, *plain.patch_embed.grid_size))
        torch.testing.assert_close(model(clips, token_selection=selection), expected, **CLOSE)
        # ... but with a temporal embedding the output is another one
        timed = patched_copy(plain, et.ReRoSelector(1.0), **{**settings, "temporal_embedding": "sincos"})
        assert (timed(clips) - expected).abs().max() > 1e-3

    def test_a_hook_on_the_images_projection_is_not_lost(self):
        plain = build(VIT)
        plain.patch_embed.proj.register_forward_hook(lambda module, args, output: 3 * output)
        _, clips = static_clips(plain)
        with contextlib.suppress(TypeError, ValueError):  # a refusal is fine, silence is not
            model = patched_copy(plain, et.ReRoSelector(1.0), temporal_embedding="none")
            expected = entering_block_0(plain, clips[:, :, 0])[:, 1:].repeat(1, 3, 1)
            torch.testing.assert_close(entering_block_0(model, clips)[:, 1:], expected, **CLOSE)


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

    def test_default_arguments(self):
        plain = build(VIT)
        model = et.patch_videomae(copy.deepcopy(plain))
        clips = build_clips(plain, frames=16)  # 8·2·3 = 48 tokens
        selection = et.select_tokens(model, clips)
        assert selection.grid == (8, 2, 3)
        assert selection.visible.shape == (2, 28)  # ⌊0.6·48⌋
        assert selection.target is None
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)

    def test_position_dropout(self):
        model = patched_copy(build(VIT, pos_drop_rate=0.75), et.ReRoSelector(1.0)).train()
        zeros = (entering_block_0(model, build_clips(model, batch=16, size=(32, 48))) == 0).float().mean().item()
        assert zeros == pytest.approx(0.75, abs=0.02)  # of 16·19·32 numbers: four standard deviations

    def test_distilled_training_has_two_outputs(self):
        plain = build("deit_tiny_distilled_patch16_224").train()
        plain.set_distilled_training(True)
        clips, selection = build_clips(plain), random_selection((3, 2, 3))
        expected = by_hand(plain, clips, selection).output
        assert isinstance(expected, tuple)
        torch.testing.assert_close(patched_copy(plain)(clips, token_selection=selection), expected, **CLOSE)

    @pytest.mark.parametrize("name", [family(DINOV3)])
    def test_rotary_augmentation_is_drawn_once_a_forward(self, name):
        plain = build(name, rope_rescale_coords=2.0).train()
        model, clips = patched_copy(plain), build_clips(plain)
        selection = random_selection(grid_of(plain, clips))
        outputs = []
        for run in (by_hand, lambda _, *args: SimpleNamespace(output=model(args[0], token_selection=args[1]))):
            torch.manual_seed(4)
            outputs.append(run(plain, clips, selection).output)
        torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
        torch.manual_seed(5)
        assert (by_hand(plain, clips, selection).output - outputs[0]).abs().max() > 1e-3  # it is drawn indeed


class TestTemporalEmbedding:
    @pytest.mark.parametrize(
        "name", [family(VIT), family("flexivit_small"), family(SIGLIP), family(EVA), family(DINOV3), family(MIXED)]
    )
    def test_table_is_the_formula(self, name):
        plain = build(name)
        clips, prefix = build_clips(plain, frames=16), plain.num_prefix_tokens
        timed, still = (
            entering_block_0(patched_copy(plain, et.ReRoSelector(1.0), num_frames=16, temporal_embedding=kind), clips)
            for kind in ("sincos", "none")
        )
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


class TestDropPath:
    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_rises_and_is_taken_back(self, name):
        model = patched_copy(build(name, depth=3), et.ReRoSelector(1.0), drop_path=0.5)
        for branch in ("drop_path1", "drop_path2"):
            rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in model.blocks]
            assert rates == pytest.approx([0, 0.25, 0.5])
        et.unpatch_videomae(model)
        assert {type(each) for block in model.blocks for each in (block.drop_path1, block.drop_path2)} == {nn.Identity}

    def test_blocks_without_a_place_for_it(self):
        model = build("vit_small_patch16_18x2_224")  # two attentions and two MLPs side by side
        with contextlib.suppress(ValueError):  # a refusal is fine, silence is not
            patched = patched_copy(model, drop_path=0.9).train()
            clips, selection = build_clips(model, batch=8), random_selection((3, 2, 3), batch=8)
            first, second = (patched(clips, token_selection=selection) for _ in range(2))
            assert (first - second).abs().max() > 1e-3


class TestKernel:
    """What unpatching and patching again make of the inflated kernel."""

    @pytest.mark.parametrize("duplicate", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_untouched_it_comes_back_bit_for_bit(self, duplicate, dtype, caplog):
        plain = build(VIT, dtype=torch.float32)
        model = patched_copy(plain, tubelet_size=3)  # a third three times isn't the whole, in floating point
        model(build_clips(plain))
        model = (copy.deepcopy(model) if duplicate else model).to(dtype)  # another type is no training
        model.patch_embed.requires_grad_(False)
        with caplog.at_level(logging.INFO):
            et.unpatch_videomae(model)
        assert not caplog.records
        assert torch.equal(model.patch_embed.proj.weight, plain.to(dtype).patch_embed.proj.weight)
        assert [p.requires_grad for p in model.patch_embed.parameters()] == [False, False]  # frozen meanwhile

    def test_after_training_it_is_summed_over_time_with_a_log_line(self, caplog):
        model = patched_copy(build(VIT))
        model.patch_embed.proj.weight.data[:, :, 0] += 1
        model.patch_embed.requires_grad_(False)
        summed = model.patch_embed.proj.weight.sum(dim=2)
        with caplog.at_level(logging.INFO, logger="everest_tokens"):
            et.unpatch_videomae(model)
        (line,) = caplog.records
        assert line.name.startswith("everest_tokens")
        assert "sum" in line.getMessage()
        torch.testing.assert_close(model.patch_embed.proj.weight, summed)
        assert [p.requires_grad for p in model.patch_embed.parameters()] == [False, False]  # frozen meanwhile

    @pytest.mark.parametrize("assign", [False, True])
    def test_loaded_weights_are_not_the_old_ones(self, assign):
        plain, other = build(VIT), build(VIT, seed=1)
        model = patched_copy(plain)
        model.load_state_dict(patched_copy(other).state_dict(), assign=assign)
        images = build_clips(plain, frames=1)[:, :, 0]
        torch.testing.assert_close(et.unpatch_videomae(model)(images), other(images), **CLOSE)

    @pytest.mark.parametrize("name", [VIT, EVA])
    def test_other_tubelets_inflate_it_anew(self, name):
        plain = build(name)
        model = patched_copy(plain, et.ReRoSelector(0.25), tubelet_size=3)
        assert et.patch_videomae(model, et.ReRoSelector(0.5), num_frames=8, tubelet_size=2) is model
        clips = build_clips(plain, frames=8)
        selection = et.select_tokens(model, clips)
        assert selection.visible.shape == (2, 12)
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)
        et.unpatch_videomae(model)
        assert torch.equal(model.patch_embed.proj.weight, plain.patch_embed.proj.weight)

    def test_the_same_tubelets_keep_the_trained_one_and_the_selection(self):
        """An optimiser may hold it already."""
        model = patched_copy(build(VIT), et.ReRoSelector(0.8))
        parameter = model.patch_embed.proj.weight
        parameter.data[:, :, 0] += 1  # the two frames of a tubelet have their own weights now
        trained = parameter.detach().clone()
        et.patch_videomae(model, num_frames=8)
        assert model.patch_embed.proj.weight is parameter
        assert torch.equal(parameter, trained)
        assert model.everest.selector.keep_ratio == 0.8


class TestTimmsMethods:
    @every_family
    def test_features_and_intermediates(self, name):
        plain = build(name, depth=3)
        model, clips, prefix = patched_copy(plain), build_clips(plain), plain.num_prefix_tokens
        expected = by_hand(plain, clips, et.select_tokens(model, clips))
        features = model.forward_features(clips)
        torch.testing.assert_close(features, expected.features, **CLOSE)
        torch.testing.assert_close(model.forward_head(features), expected.output, **CLOSE)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, plain.forward_head(expected.features, pre_logits=True), **CLOSE)

        final, found = model.forward_intermediates(clips, output_fmt="NLC")
        torch.testing.assert_close(final, expected.features, **CLOSE)
        torch.testing.assert_close(found, [block[:, prefix:] for block in expected.blocks], **CLOSE)
        options = {"output_fmt": "NLC", "intermediates_only": True}
        (only,) = model.forward_intermediates(clips, [1], norm=True, stop_early=True, **options)
        torch.testing.assert_close(only, plain.norm(expected.blocks[1])[:, prefix:], **CLOSE)
        if prefix:
            pairs = model.forward_intermediates(clips, 2, return_prefix_tokens=True, **options)
            wanted = [(block[:, prefix:], block[:, :prefix]) for block in expected.blocks[1:]]
            torch.testing.assert_close(pairs, wanted, **CLOSE)

    @pytest.mark.parametrize("name", [family(VIT), family(DINOV2)])
    def test_get_intermediate_layers(self, name):
        plain = build(name, depth=3)
        model, clips, prefix = patched_copy(plain), build_clips(plain), plain.num_prefix_tokens
        expected = by_hand(plain, clips, et.select_tokens(model, clips))
        found = model.get_intermediate_layers(clips, 2)
        torch.testing.assert_close(tuple(found), tuple(block[:, prefix:] for block in expected.blocks[1:]), **CLOSE)
        (pair,) = model.get_intermediate_layers(clips, [0], return_prefix_tokens=True, norm=True)
        normed = plain.norm(expected.blocks[0])
        torch.testing.assert_close(pair, (normed[:, prefix:], normed[:, :prefix]), **CLOSE)
        with pytest.raises(ValueError, match=r"NLC|reshape"):
            model.get_intermediate_layers(clips, 1, reshape=True)

    @pytest.mark.parametrize("name", [VIT, SIGLIP, EVA])
    def test_a_map_of_kept_tokens_does_not_exist(self, name):
        model = patched_copy(build(name))
        for kwargs in ({}, {"output_fmt": "NCHW"}):
            with pytest.raises(ValueError, match="NLC"):
                model.forward_intermediates(build_clips(model), **kwargs)

    @every_family
    def test_layer_decay_groups_are_the_images(self, name):
        def groups(model: Any) -> dict[str, tuple[float, float]]:
            named = {id(parameter): key for key, parameter in model.named_parameters()}
            listed = param_groups_layer_decay(
                model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
            )
            rates = {id(p): (group["lr_scale"], group["weight_decay"]) for group in listed for p in group["params"]}
            return {named[parameter]: rate for parameter, rate in rates.items()}

        plain = build(name)
        expected, actual = groups(plain), groups(patched_copy(plain))
        assert expected["patch_embed.proj.weight"][0] < expected["blocks.1.attn.proj.weight"][0] < 1
        assert actual == expected

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
    @pytest.mark.parametrize(("name", "size"), [(VIT, (64, 64)), ("flexivit_small", (32, 80)), (EVA, (42, 28))])
    def test_positions_are_timms_resampled(self, name, size):
        plain = build(name, dynamic_img_size=True)
        model, clips = patched_copy(plain, et.ReRoSelector(0.5)), build_clips(plain, size=size)
        selection, grid = et.select_tokens(model, clips), grid_of(plain, clips)
        visible, area = selection.visible, math.prod(grid[1:])
        assert selection.grid == grid
        assert visible.shape == (2, math.prod(grid) // 2)
        prefix = plain.pos_embed.shape[1] - 6
        resampled = resample_abs_pos_embed(
            plain.pos_embed, new_size=grid[1:], old_size=(2, 3), num_prefix_tokens=prefix
        )[0, prefix:]
        tokens = tubelet_tokens(plain, clips, inflated(plain)).gather(1, visible[..., None].expand(-1, -1, 32))
        summed = tokens + resampled[visible % area] + temporal_of(plain, 3, "sincos")[visible // area]
        entered = entering_block_0(model, clips)[:, plain.num_prefix_tokens :]
        torch.testing.assert_close(entered, summed, **CLOSE)

    @pytest.mark.parametrize("name", [family(VIT), family(EVA)])
    def test_padding(self, name):
        plain = build(name, dynamic_img_size=True, dynamic_img_pad=True)
        model = patched_copy(plain, et.ReRoSelector(0.5))
        patch = plain.patch_embed.patch_size[0]
        clips = build_clips(plain, size=(2 * patch + 3, 4 * patch - 5))
        selection = et.select_tokens(model, clips)
        assert selection.grid == (3, 3, 4)
        kernel = inflated(plain).requires_grad_()
        expected = by_hand(plain, F.pad(clips, (0, 5, 0, patch - 3)), selection, kernel=kernel).output
        actual = model(clips)
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert model.forward_intermediates(clips, output_fmt="NLC")[1][0].shape == (2, 18, 32)
        weighted(expected).backward()
        weighted(actual).backward()
        torch.testing.assert_close(model.patch_embed.proj.weight.grad, kernel.grad, **CLOSE)

    def test_set_input_size(self):
        plain = build(VIT)
        model = patched_copy(plain)
        for each in (plain, model):
            each.set_input_size(img_size=(48, 64))
        clips = build_clips(plain)
        selection = et.select_tokens(model, clips)
        assert selection.grid == (3, 3, 4)
        torch.testing.assert_close(model(clips), by_hand(plain, clips, selection).output, **CLOSE)

    def test_a_size_that_is_no_multiple_of_the_patch(self):
        model = patched_copy(build(VIT, dynamic_img_size=True))
        with pytest.raises(ValueError, match="40"):
            model(build_clips(model, size=(40, 48)))


TINY = {"embed_dim": 24, "num_heads": 2, "depth": 1}


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

    def test_a_hybrids_patch_embedding(self):
        model = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, **TINY)
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
            family("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1,) * 4, "num_heads": (1,) * 4}),
            family("beit_base_patch16_224", TINY),
            family("naflexvit_base_patch16_gap", TINY),
        ],
    )
    def test_other_timm_models(self, name, kwargs):
        model = timm.create_model(name, pretrained=False, **kwargs)
        for call in (et.patch_videomae, et.count_flops):
            with pytest.raises(TypeError, match=r"VisionTransformer.*Eva|Eva.*VisionTransformer") as caught:
                call(model)
            assert type(model).__name__ in str(caught.value)

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
            ({"temporal_embedding": "learned"}, r"sincos.*none|none.*sincos"),
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


class TestCountFlops:
    def test_a_full_size_model(self):
        # ViT-B over 8·14·14 tokens is VideoMAE's ViT-B (180.5 GFLOPs in Table 1); a block counts alike twelve times.
        model = VisionTransformer(depth=1, num_classes=400, class_token=False, global_pool="avg").to("meta")
        count = et.count_flops(et.patch_videomae(model, et.ReRoSelector(1.0)))
        assert (count.patch_embedding + 12 * count.encoder + count.head) / 1e9 == pytest.approx(180.5, rel=0.01)
        assert type(et.unpatch_videomae(model).patch_embed.proj) is nn.Conv2d
