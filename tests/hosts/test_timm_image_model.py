"""A patched timm image model in use: unpatching, timm's own methods, other image sizes, refusals, FLOPs."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from host_case import weighted
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm_models import (
    CLIP,
    CLOSE,
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
    inflated,
    patched_copy,
    random_selection,
    static_clips,
    temporal_of,
    tubelet_tokens,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import everest_tokens as et


class TestUnpatching:
    @pytest.mark.parametrize("name", [VIT, EVA])
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

    @pytest.mark.parametrize("name", [VIT])
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

    def test_a_hook_on_the_images_projection_is_not_lost(self):
        plain = build(VIT)
        plain.patch_embed.proj.register_forward_hook(lambda module, args, output: 3 * output)
        _, clips = static_clips(plain)
        with contextlib.suppress(TypeError, ValueError):  # a refusal is fine, silence is not
            model = patched_copy(plain, et.ReRoSelector(1.0), temporal_embedding="none")
            expected = entering_block_0(plain, clips[:, :, 0])[:, 1:].repeat(1, 3, 1)
            torch.testing.assert_close(entering_block_0(model, clips)[:, 1:], expected, **CLOSE)


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
        prefix = plain.num_prefix_tokens
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
        prefix = plain.num_prefix_tokens
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


class TestCountFlops:
    """Half of what torch counts: it counts a multiply–accumulate as two."""

    @staticmethod
    def counted(model: Any, x: Tensor) -> float:
        model = copy.deepcopy(model).requires_grad_(False)  # torch's counter stumbles over parameters as arguments
        for module in model.modules():  # torch doesn't count fused attention on the CPU
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
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
        ],
    )

    @SHAPES
    def test_the_image_model(self, name, overrides):
        model = build(name, **{"embed_dim": 64, **overrides})
        images = build_clips(model, batch=1, frames=1)[:, :, 0]
        assert et.count_flops(model).total == pytest.approx(self.counted(model, images), rel=0.005)

    @SHAPES
    @pytest.mark.parametrize("ratio", [0.3, 1.0])
    def test_patched(self, name, overrides, ratio):
        model = et.patch_videomae(build(name, **{"embed_dim": 64, **overrides}), et.ReRoSelector(ratio), num_frames=8)
        clips = build_clips(model, batch=1, frames=8)
        count = et.count_flops(model)
        assert count.total == pytest.approx(self.counted(model, clips), rel=0.005)
        assert count.decoder == 0
        assert count.selection == 3 * 6 * 64  # l2: one product a channel of each pair
        assert count.patch_embedding == 24 * 64 * 3 * 2 * math.prod(model.patch_embed.patch_size)

    def test_a_full_size_model(self):
        # ViT-B over 8·14·14 tokens is VideoMAE's ViT-B (180.5 GFLOPs in Table 1); a block counts alike twelve times.
        model = VisionTransformer(depth=1, num_classes=400, class_token=False, global_pool="avg").to("meta")
        count = et.count_flops(et.patch_videomae(model, et.ReRoSelector(1.0)))
        assert (count.patch_embedding + 12 * count.encoder + count.head) / 1e9 == pytest.approx(180.5, rel=0.01)
        assert type(et.unpatch_videomae(model).patch_embed.proj) is nn.Conv2d
