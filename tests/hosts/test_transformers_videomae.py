"""What a patched transformers model computes, against transformers' own outputs and gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import host_case
import pytest
import torch
from host_case import gradients
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae import modeling_videomae
from versions import set_attention

import everest_tokens as et

CLASSES = [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel]
SHAPES: list[dict[str, Any]] = [
    {"image_size": 32},
    {"tubelet_size": 1, "num_frames": 4},
    {"tubelet_size": 4},
    {"num_channels": 1},
    {"num_channels": 4, "patch_size": 8, "image_size": (24, 16)},
]


def mask_of(selection: et.TokenSelection) -> Tensor:
    """The bool_masked_pos of transformers that leaves the selection's visible tokens. (B, N), True where masked."""
    return host_case.mask_of(selection.visible, math.prod(selection.grid))


def assert_same_gradients(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a reference gradient of zero proves nothing"
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64


class TestKeepingEverything:
    @pytest.mark.parametrize(
        ("cls", "options"),
        [
            (VideoMAEForVideoClassification, {"use_mean_pooling": False}),
            (VideoMAEForVideoClassification, {"image_size": (40, 56)}),  # Conv3d drops 8 rows and 8 columns
            (VideoMAEForPreTraining, {"norm_pix_loss": False}),
            *((cls, shape) for shape in SHAPES for cls in (VideoMAEForPreTraining, VideoMAEForVideoClassification)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:use_mean_pooling")
    def test_is_transformers(self, make_model, make_clips, cls, options):
        plain = make_model(cls, **options).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), mask_ratio=0.75)
        clips, labels = make_clips(plain), {"labels": torch.tensor([1, 4])}
        selection = et.select_tokens(patched, clips)
        mask = {"bool_masked_pos": mask_of(selection)}
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        given = (labels, labels) if cls is VideoMAEForVideoClassification else (mask, {"token_selection": selection})
        expected = plain(pixels[0], output_hidden_states=True, **given[0])
        actual = patched(pixels[1], output_hidden_states=True, **given[1])
        assert len(actual.hidden_states) == 3
        for name in ("logits", "loss", "hidden_states"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **EXACT)
        expected.loss.backward()
        actual.loss.backward()
        assert_same_gradients(patched, plain, **EXACT)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **EXACT)


class TestPreTraining:
    def test_pixels_of_another_number_of_channels(self, make_model, make_clips):
        plain = make_model(VideoMAEForPreTraining, norm_pix_loss=False, num_channels=1)
        with pytest.raises(ValueError, match="RGB"):
            plain(make_clips(plain), torch.arange(48).expand(2, -1) > 4)
        with pytest.raises(TypeError, match="RGB"):  # told when it is patched
            et.patch_videomae(plain)

    def test_random_selector_with_tubes_is_videomae(self, make_model, make_clips):
        plain = make_model(VideoMAEForPreTraining).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.RandomSelector(1.0), visible=et.TubeSelector(0.25))
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        tubes = mask_of(selection).unflatten(1, (4, 12))
        assert (tubes == tubes[:, :1]).all()
        assert (~tubes).sum(2).tolist() == [[3] * 4] * 2  # 0.25 of 12 places
        expected = plain(clips, bool_masked_pos=mask_of(selection))
        actual = patched(clips, token_selection=selection)
        torch.testing.assert_close((actual.loss, actual.logits), (expected.loss, expected.logits), **EXACT)
        # ... and so without a given selection: the loss is one that transformers gives for some tube mask
        torch.manual_seed(5)
        drawn = et.select_tokens(patched, clips)
        torch.manual_seed(5)
        torch.testing.assert_close(patched(clips).loss, plain(clips, mask_of(drawn)).loss, **EXACT)

    @pytest.mark.parametrize("norm_pix_loss", [True, False])
    @pytest.mark.parametrize("shape", SHAPES[:2])
    def test_the_loss_is_of_the_targets_pixels_alone(self, make_model, make_clips, monkeypatch, shape, norm_pix_loss):
        plain = make_model(VideoMAEForPreTraining, norm_pix_loss=norm_pix_loss, **shape).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.75), mask_ratio=0.75)
        clips, rows = make_clips(plain), torch.arange(2)[:, None]
        selection = et.select_tokens(patched, clips)
        mask = mask_of(selection)

        # transformers computes the pixels of every masked token: our targets are some of them
        labels = {}

        class Recording(torch.nn.MSELoss):
            def forward(self, predicted, wanted):
                labels["all"] = wanted
                return super().forward(predicted, wanted)

        monkeypatch.setattr(modeling_videomae, "MSELoss", Recording)
        plain(clips, bool_masked_pos=mask)
        by_position = torch.full((*mask.shape, labels["all"].shape[-1]), math.nan, dtype=clips.dtype)
        by_position[mask] = labels["all"].flatten(0, 1)
        wanted = by_position[rows, selection.target]

        actual = patched(clips, token_selection=selection)
        assert actual.logits.shape == wanted.shape
        torch.testing.assert_close(actual.loss, (actual.logits - wanted).square().mean(), **EXACT)

    @pytest.mark.parametrize(
        ("visible", "target", "message"),
        [
            ([0, 5], [9, 7], "target must be ascending"),
            ([5, 0], [7, 9], "visible must be ascending"),
            ([0, 0], [7, 9], "visible must be ascending without repeats"),
            ([0, 5], [7, 48], r"target must be positions in 0…47 of grid \(4, 3, 4\), got 2…48"),
            ([-1, 5], [7, 9], r"visible must be positions in 0…47 .* got -1…5"),
            ([0, 7], [7, 9], "kept, visible and target together, must be ascending without repeats"),
        ],
    )
    def test_positions_that_are_none(self, make_model, make_clips, visible, target, message):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        selection = et.TokenSelection(torch.tensor([visible, [0, 1]]), torch.tensor([target, [2, 3]]), (4, 3, 4))
        with pytest.raises(ValueError, match=message):
            model(make_clips(model), token_selection=selection)

    @pytest.mark.parametrize("training", [True, False])
    def test_visible_tokens_are_drawn_anew_in_eval_too(self, make_model, make_clips, training):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining), et.ReRoSelector(0.5)).train(training)
        clips = make_clips(model, batch=1)
        picks = {tuple(et.select_tokens(model, clips).visible[0].tolist()) for _ in range(12)}
        losses = {model(clips).loss.item() for _ in range(12)}
        assert len(picks) > 3
        assert len(losses) > 3
        kept = {tuple(et.select_tokens(model, clips).kept[0].tolist()) for _ in range(3)}
        assert len(kept) == 1  # of the same kept tokens


class TestPartialKeep:
    def test_first_kept_token_without_mean_pooling(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification, use_mean_pooling=False)
        with pytest.warns(UserWarning, match="use_mean_pooling"):
            et.patch_videomae(model)
        clips = make_clips(model)
        selection = et.select_tokens(model, clips)
        out = model(clips, token_selection=selection, output_hidden_states=True)
        last = model.videomae.layernorm(out.hidden_states[-1])
        torch.testing.assert_close(out.logits, model.classifier(last[:, 0]))

    def test_a_parametrised_projection_trains_its_parametrisation(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification).double()
        torch.nn.utils.parametrizations.weight_norm(plain.videomae.embeddings.patch_embeddings.projection)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model(make_clips(plain), labels=torch.tensor([1, 4])).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)


class TestFrameSampler:
    def test_eval_takes_the_most_probable_steps(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification)
        clips = make_clips(model, batch=1, frames=12)
        still = clips[:, :2].repeat(1, 6, 1, 1, 1)
        # a jump between steps 1 and 2, a larger one between 3 and 4, nothing else changes
        still[:, 4:8] += clips[:, 4:6].repeat(1, 2, 1, 1, 1)
        still[:, 8:12] += 5 * clips[:, 6:8].repeat(1, 2, 1, 1, 1)
        et.patch_videomae(model, et.ReRoSelector(0.25), frame_sampler=et.InfoFrameSampler(1.5))
        picks = {tuple(et.select_tokens(model, still).steps[0].tolist()) for _ in range(5)}
        # 18 of 72 kept: 12 of step 4 and 6 of step 2; the others tie at 0 and go to the earlier
        assert picks == {(0, 1, 2, 4)}
        assert len({model(still).logits.sum().item() for _ in range(3)}) == 1
        picks = [tuple(et.select_tokens(model.train(), still).steps[0].tolist()) for _ in range(40)]
        assert len(set(picks)) > 1
        assert all({2, 4} <= set(pick) for pick in picks)  # the empty steps come only once these two are drawn

    @pytest.mark.parametrize(("alpha", "frames"), [(1.3, 20), (1.5, 24), (1.8, 28), (2.0, 32)])
    def test_frame_counts(self, make_model, make_clips, alpha, frames):
        model = make_model(VideoMAEForVideoClassification, num_frames=16, image_size=32)
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(alpha))
        for training in (True, False):
            assert model.train(training)(make_clips(model, frames=frames)).logits.shape == (2, 5)
            for wrong in (16, frames - 2, frames + 2):
                with pytest.raises(ValueError, match=rf"\b{frames}\b.*\b{wrong}\b"):
                    model(make_clips(model, frames=wrong))


class TestAttentionImplementations:
    @pytest.mark.parametrize(
        ("cls", "implementation"),
        [
            (VideoMAEForPreTraining, "eager"),
            (VideoMAEForPreTraining, "sdpa"),
            (VideoMAEForVideoClassification, "eager"),
            (VideoMAEForVideoClassification, "flex_attention"),
        ],
    )
    def test_each_gives_transformers_numbers(self, make_model, make_clips, cls, implementation):
        plain = make_model(cls).requires_grad_(False)  # flex attention has no backward on the CPU
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            set_attention(model, implementation)
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        given = {} if cls is VideoMAEForVideoClassification else {"bool_masked_pos": mask_of(selection)}
        with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention, which takes a minute
            try:
                expected = plain(clips, **given)
            except (NotImplementedError, ImportError) as error:
                pytest.skip(f"transformers itself cannot run {implementation} here: {error}")
            torch.testing.assert_close(patched(clips, token_selection=selection).logits, expected.logits)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_attentions_and_hidden_states(self, make_model, make_clips, cls):
        plain = make_model(cls).double()
        set_attention(plain, "eager")
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        encoder = plain if cls is VideoMAEModel else plain.videomae
        kwargs = {"output_attentions": True, "output_hidden_states": True}
        expected = encoder(clips, bool_masked_pos=mask_of(selection), **kwargs)
        actual = patched(clips, token_selection=selection, **kwargs)
        seen = selection.visible.shape[1]
        assert [tuple(each.shape) for each in actual.attentions] == [(2, 2, seen, seen)] * 2
        torch.testing.assert_close(actual.attentions, expected.attentions, **EXACT)
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, **EXACT)
        silent = patched(clips)
        assert silent.hidden_states is None
        assert silent.attentions is None


class TestPrecision:
    @pytest.mark.parametrize("how", ["weights", "autocast"])
    def test_loss(self, make_model, make_clips, how):
        plain = make_model(VideoMAEForPreTraining).to(torch.bfloat16 if how == "weights" else torch.float32)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = make_clips(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            selection = et.select_tokens(patched, clips)
            expected, actual = plain(clips, mask_of(selection)).loss, patched(clips, token_selection=selection).loss
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


class TestDropPath:
    def test_rates_rise_linearly_from_0_and_drop_whole_branches_per_clip(self, make_model, make_clips):
        batch, depth, rate = 512, 3, 0.6
        model = make_model(VideoMAEModel, num_hidden_layers=depth, image_size=32, num_frames=4)
        et.patch_videomae(model, et.ReRoSelector(1.0), drop_path=rate).train()
        ends: dict[tuple[int, str], Tensor] = {}
        for index, layer in enumerate(model.encoder.layer):
            layer.attention.register_forward_hook(
                lambda module, args, output, index=index: ends.__setitem__(
                    (index, "attention"), output[0] if isinstance(output, tuple) else output
                )
            )
            layer.output.register_forward_hook(
                lambda module, args, output, index=index: ends.__setitem__((index, "mlp"), output - args[1])
            )
        torch.manual_seed(0)
        with torch.no_grad():
            model(make_clips(model, batch=batch))
        for (index, branch), end in ends.items():
            expected = rate * index / (depth - 1)
            tokens_of_zeros = (end.abs() < 1e-6).all(dim=2)  # (B, V)
            dropped = tokens_of_zeros.all(dim=1)
            assert torch.equal(tokens_of_zeros.any(dim=1), dropped), "a branch must be dropped as a whole"
            share = dropped.float().mean().item()
            assert abs(share - expected) < 0.09, (index, branch, share)  # four standard deviations
            assert (share == 0) == (index == 0)

    def test_a_single_block_is_never_dropped(self, make_model, make_clips):
        plain = make_model(VideoMAEModel, num_hidden_layers=1).double()
        # linspace(0, rate, 1) is 0, as timm and VideoMAE have it
        single = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), drop_path=0.9).train()
        torch.testing.assert_close(single(make_clips(plain))[0], plain(make_clips(plain))[0], **EXACT)
