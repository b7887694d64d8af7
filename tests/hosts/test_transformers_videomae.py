"""What a patched transformers model computes, against transformers' own outputs and gradients."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae import modeling_videomae

import everest_tokens as et

CLASSES = [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel]
SHAPES = [
    pytest.param({}, id="3x4"),
    pytest.param({"image_size": 32}, id="2x2"),
    pytest.param({"tubelet_size": 1, "num_frames": 4}, id="tubelet1"),
    pytest.param({"tubelet_size": 4}, id="tubelet4"),
    pytest.param({"num_channels": 1}, id="grey"),
    pytest.param({"num_channels": 4, "patch_size": 8, "image_size": (24, 16)}, id="4channels"),
]


def mask_of(selection: et.TokenSelection) -> Tensor:
    """The bool_masked_pos of transformers that leaves the selection's visible tokens. (B, N), True where masked."""
    mask = torch.ones(selection.visible.shape[0], math.prod(selection.grid), dtype=torch.bool)
    return mask.scatter(1, selection.visible, False)


def random_selection(model: Any, kept: int, visible: int | None = None, seed: int = 3) -> et.TokenSelection:
    """Random tokens of two clips; made without the library's own selecting."""
    embeddings = getattr(model, "videomae", model).embeddings
    config = model.config
    height, width = embeddings.patch_embeddings.image_size
    grid = (config.num_frames // config.tubelet_size, height // config.patch_size, width // config.patch_size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(math.prod(grid), generator=generator) for _ in range(2)])
    if visible is None:
        return et.TokenSelection(order[:, :kept].sort(dim=1).values, None, grid)
    return et.TokenSelection(order[:, :visible].sort(1).values, order[:, visible:kept].sort(1).values, grid)


def pixels_of(selection: et.TokenSelection, tokens: Tensor, model: Any) -> Tensor:
    """Which pixels belong to `tokens` (B, M): bool (B, T, C, H, W), by plain loops."""
    config, (_, h, w) = model.config, selection.grid
    frames, patch = config.tubelet_size, config.patch_size
    height, width = getattr(model, "videomae", model).embeddings.patch_embeddings.image_size
    found = torch.zeros(tokens.shape[0], config.num_frames, config.num_channels, height, width, dtype=torch.bool)
    for clip, row in enumerate(tokens.tolist()):
        for token in row:
            i, y, x = token // (h * w), token // w % h, token % w
            found[
                clip,
                i * frames : (i + 1) * frames,
                :,
                y * patch : (y + 1) * patch,
                x * patch : (x + 1) * patch,
            ] = True
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a reference gradient of zero proves nothing"
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64


class TestKeepingEverything:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("pooling", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.filterwarnings("ignore:use_mean_pooling")
    def test_classifier(self, make_model, make_clips, same_to_rounding, shape, pooling, training, dtype):
        plain = make_model(VideoMAEForVideoClassification, use_mean_pooling=pooling, **shape).train(training).to(dtype)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips, labels = make_clips(plain), torch.tensor([1, 4])
        kwargs = {"labels": labels, "output_hidden_states": True}
        expected, actual = plain(clips, **kwargs), patched(clips, **kwargs)
        same_to_rounding(actual.logits, expected.logits)
        same_to_rounding(actual.loss, expected.loss)
        assert len(actual.hidden_states) == 3
        same_to_rounding(actual.hidden_states, expected.hidden_states)

    @pytest.mark.parametrize("pooling", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_backbone(self, make_model, make_clips, same_to_rounding, pooling, dtype):
        plain = make_model(VideoMAEModel, use_mean_pooling=pooling).to(dtype)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = make_clips(plain)
        same_to_rounding(patched(clips).last_hidden_state, plain(clips).last_hidden_state)

    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_both_ways_to_embed_a_clip(self, make_model, make_clips, same_to_rounding, cls):
        """The product, and the projection's own convolution where a hook listens, keep the same tokens."""
        product = et.patch_videomae(make_model(cls).double(), et.ReRoSelector(0.5))
        convolution = copy.deepcopy(product)
        hook_projection(convolution)
        clips = make_clips(product, batch=8)
        torch.manual_seed(1)
        selection = et.select_tokens(product, clips)
        torch.manual_seed(1)
        assert torch.equal(et.select_tokens(convolution, clips).kept, selection.kept)
        same_to_rounding(product(clips, token_selection=selection)[0], convolution(clips, token_selection=selection)[0])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_classifier_gradients(self, make_model, make_clips, shape):
        plain = make_model(VideoMAEForVideoClassification, **shape).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips, labels = make_clips(plain), torch.tensor([1, 4])
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        plain(pixels[0], labels=labels).loss.backward()
        patched(pixels[1], labels=labels).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **EXACT)

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_a_frozen_half_of_the_projection(self, make_model, make_clips, frozen):
        plain = make_model(VideoMAEForVideoClassification).double()
        getattr(plain.videomae.embeddings.patch_embeddings.projection, frozen).requires_grad_(False)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model(make_clips(plain), labels=torch.tensor([1, 4])).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)

    def test_image_sides_that_leave_a_margin(self, make_model, make_clips):
        plain = make_model(
            VideoMAEForVideoClassification, image_size=(40, 56)
        ).double()  # Conv3d drops 8 rows and 8 columns
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model(make_clips(plain), labels=torch.tensor([1, 4])).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)


class TestPreTraining:
    @pytest.mark.parametrize(
        ("shape", "norm_pix_loss"),
        [(shape.values[0], norm) for shape in SHAPES for norm in (True, False)],
    )
    def test_keeping_everything_is_transformers(self, make_model, make_clips, shape, norm_pix_loss):
        plain = make_model(VideoMAEForPreTraining, norm_pix_loss=norm_pix_loss, **shape).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), mask_ratio=0.75)
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        mask = mask_of(selection)
        assert mask.sum(1).tolist() == [selection.target.shape[1]] * 2
        if not norm_pix_loss and plain.config.num_channels != 3:
            for call in (lambda: plain(clips, mask), lambda: patched(clips, token_selection=selection)):
                with pytest.raises(ValueError, match="RGB"):
                    call()
            return
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        expected = plain(pixels[0], bool_masked_pos=mask, output_hidden_states=True)
        actual = patched(pixels[1], token_selection=selection, output_hidden_states=True)
        torch.testing.assert_close(actual.logits, expected.logits, **EXACT)
        torch.testing.assert_close(actual.loss, expected.loss, **EXACT)
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, **EXACT)
        expected.loss.backward()
        actual.loss.backward()
        assert_same_gradients(patched, plain, **EXACT)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **EXACT)

    def test_float32_differs_by_rounding_alone(self, make_model, make_clips, same_to_rounding):
        plain = make_model(VideoMAEForPreTraining)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        same_to_rounding(patched(clips, token_selection=selection).logits, plain(clips, mask_of(selection)).logits)

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
    @pytest.mark.parametrize("shape", SHAPES[:4])
    def test_partial_targets_and_decoder(self, make_model, make_clips, monkeypatch, shape, norm_pix_loss):
        plain = make_model(VideoMAEForPreTraining, norm_pix_loss=norm_pix_loss, **shape).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.75), mask_ratio=0.75)
        clips, rows = make_clips(plain), torch.arange(2)[:, None]
        tokens = plain.videomae.embeddings.num_patches
        selection = random_selection(plain, kept=tokens * 3 // 4, visible=tokens // 4)
        mask = mask_of(selection)

        # transformers computes the pixels of every masked token: our targets are some of them
        labels = {}

        class Recording(torch.nn.MSELoss):
            def forward(self, predicted, wanted):
                labels["all"] = wanted
                return super().forward(predicted, wanted)

        monkeypatch.setattr(modeling_videomae, "MSELoss", Recording)
        plain(clips, bool_masked_pos=mask)
        by_position = torch.full((2, tokens, labels["all"].shape[-1]), math.nan, dtype=clips.dtype)
        by_position[mask] = labels["all"].flatten(0, 1)
        wanted = by_position[rows, selection.target]

        # the decoder sees visible tokens and mask tokens at the targets, and nothing else
        seen = plain.encoder_to_decoder(plain.videomae(clips, bool_masked_pos=mask).last_hidden_state)
        table = plain.position_embeddings.double()[0]
        sequence = [seen + table[selection.visible], plain.mask_token + table[selection.target]]
        expected = plain.decoder(torch.cat(sequence, dim=1), selection.target.shape[1]).logits

        actual = patched(clips, token_selection=selection)
        assert actual.logits.shape == wanted.shape
        torch.testing.assert_close(actual.logits, expected, **EXACT)
        torch.testing.assert_close(actual.loss, (expected - wanted).square().mean(), **EXACT)

    def test_logits_follow_the_order_of_the_targets(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining).double(), mask_ratio=0.9)
        clips = make_clips(model)
        selection = random_selection(model, kept=20, visible=6)
        backwards = et.TokenSelection(selection.visible, selection.target.flip(1), selection.grid)
        logits = [model(clips, token_selection=given).logits for given in (selection, backwards)]
        torch.testing.assert_close(logits[1].flip(1), logits[0], **EXACT)
        assert not torch.allclose(logits[1], logits[0])

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

    def test_dual_masking_targets_are_the_kept_that_are_not_visible(self, make_model, make_clips):
        model = make_model(VideoMAEForPreTraining, image_size=64)
        et.patch_videomae(model, et.RunningCellSelector(0.5), visible=et.TubeSelector(0.25))
        selection = et.select_tokens(model, make_clips(model))
        assert selection.visible.shape == (2, 16)
        assert selection.target.shape == (2, 24)  # a tube's place is kept every second step: 32 - 16 / 2
        for visible, target in zip(selection.visible.tolist(), selection.target.tolist(), strict=True):
            assert not set(visible) & set(target)
        assert model(make_clips(model), token_selection=selection).logits.shape == (2, 24, 16 * 16 * 2 * 3)


class TestPartialKeep:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("cls", CLASSES)
    def test_encoder_sees_the_visible_tokens_alone(self, make_model, make_clips, cls, shape):
        plain = make_model(cls, **shape).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.6), mask_ratio=0.75)
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        encoder = plain if cls is VideoMAEModel else plain.videomae
        expected = encoder(clips, bool_masked_pos=mask_of(selection), output_hidden_states=True)
        actual = patched(clips, token_selection=selection, output_hidden_states=True)
        assert actual.hidden_states[0].shape[1] == selection.visible.shape[1]
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, **EXACT)
        if cls is VideoMAEModel:
            torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **EXACT)

    @pytest.mark.parametrize("pooling", [True, False])
    @pytest.mark.filterwarnings("ignore:use_mean_pooling")
    def test_classifier_head(self, make_model, make_clips, pooling):
        plain = make_model(VideoMAEForVideoClassification, use_mean_pooling=pooling).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.6))
        clips, labels = make_clips(plain), torch.tensor([1, 4])
        selection = et.select_tokens(patched, clips)
        # transformers' classifier hands further arguments to its backbone, so it runs a mask as well
        for model, given in (
            (plain, {"bool_masked_pos": mask_of(selection)}),
            (patched, {"token_selection": selection}),
        ):
            model(clips, labels=labels, **given).loss.backward()
        torch.testing.assert_close(
            patched(clips, token_selection=selection).logits, plain(clips, bool_masked_pos=mask_of(selection)).logits
        )
        assert_same_gradients(patched, plain, **EXACT)

    @pytest.mark.parametrize("training", [True, False])
    def test_encoder_forward_is_what_select_tokens_says(self, make_model, make_clips, training):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification)).train(training)
        clips = make_clips(model)
        selection = et.select_tokens(model, clips)
        assert selection.visible.shape == (2, 28)  # 0.6 of 48
        assert torch.equal(model(clips).logits, model(clips, token_selection=selection).logits)
        assert torch.equal(selection.kept, selection.visible)

    def test_pretraining_forward_is_what_select_tokens_says(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        clips = make_clips(model)
        torch.manual_seed(7)
        selection = et.select_tokens(model, clips)
        torch.manual_seed(7)
        actual = model(clips)
        assert (selection.visible.shape, selection.target.shape) == ((2, 4), (2, 10))  # 0.1 and 0.2 of 48
        assert torch.equal(actual.logits, model(clips, token_selection=selection).logits)

    def test_importance_is_eq_2_on_the_models_own_embeddings(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification)
        clips = make_clips(plain)
        tokens = plain.videomae.embeddings.patch_embeddings(clips).unflatten(1, (4, 12))  # before the positions
        change = (tokens[:, 1:] - tokens[:, :-1]).norm(dim=-1)
        expected = torch.cat([change[:, :1], change], dim=1).flatten(1)
        selection = et.select_tokens(et.patch_videomae(plain), clips)
        torch.testing.assert_close(selection.importance, expected)
        for row, kept in zip(expected, selection.kept, strict=True):
            others = torch.tensor(sorted(set(range(48)) - set(kept.tolist())))
            assert row[kept].min() >= row[others].max()

    def test_first_kept_token_without_mean_pooling(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification, use_mean_pooling=False)
        with pytest.warns(UserWarning, match="use_mean_pooling"):
            et.patch_videomae(model)
        clips = make_clips(model)
        selection = random_selection(model, kept=12)
        out = model(clips, token_selection=selection, output_hidden_states=True)
        last = model.videomae.layernorm(out.hidden_states[-1])
        torch.testing.assert_close(out.logits, model.classifier(last[:, 0]))


def hook_projection(model: Any) -> Any:
    model.videomae.embeddings.patch_embeddings.projection.register_forward_hook(lambda module, args, output: None)
    return model


def hook_patch_embeddings(model: Any) -> Any:
    model.videomae.embeddings.patch_embeddings.register_forward_pre_hook(lambda module, args: None)
    return model


def leave_alone(model: Any) -> Any:
    return model


PATHS = [leave_alone, hook_projection, hook_patch_embeddings]


class TestUnselectedTokens:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_have_no_influence(self, make_model, make_clips, cls, path):
        model = path(et.patch_videomae(make_model(cls).double()))
        selection = random_selection(model, kept=20, visible=8 if cls is VideoMAEForPreTraining else None)
        kept = pixels_of(selection, selection.kept, model)
        visible = pixels_of(selection, selection.visible, model)
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4])}
        runs = []
        for change in (0.0, 1000.0):
            clips = torch.where(kept, make_clips(model), make_clips(model) + change).requires_grad_()
            model.zero_grad()
            out = model(clips, token_selection=selection, output_hidden_states=True, **labels)
            out.loss.backward()
            assert (clips.grad[~visible] == 0).all()
            assert (clips.grad[visible] != 0).float().mean() > 0.99
            runs.append((out, gradients(model)))
        (first, first_gradients), (second, second_gradients) = runs
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.loss, second.loss)
        assert all(map(torch.equal, first.hidden_states, second.hidden_states))
        for name, gradient in first_gradients.items():
            torch.testing.assert_close(second_gradients[name], gradient, **EXACT, msg=name)

    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_may_even_be_nan(self, make_model, make_clips, cls):
        model = et.patch_videomae(make_model(cls))
        selection = random_selection(model, kept=20, visible=8 if cls is VideoMAEForPreTraining else None)
        clips = make_clips(model).masked_fill(~pixels_of(selection, selection.kept, model), math.nan)
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4])}
        model(clips, token_selection=selection, **labels).loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    @pytest.mark.parametrize("path", PATHS[1:])
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_both_paths_give_the_same_gradients(self, make_model, make_clips, cls, path):
        model = et.patch_videomae(make_model(cls).double())
        other = path(copy.deepcopy(model))
        selection = random_selection(model, kept=20, visible=8 if cls is VideoMAEForPreTraining else None)
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4])}
        for each in (model, other):
            each(make_clips(model), token_selection=selection, **labels).loss.backward()
        assert_same_gradients(other, model, **EXACT)

    def test_a_hook_that_changes_the_embedding_is_obeyed(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification)
        clips = make_clips(plain)
        handle = lambda module, args, output: output * 3  # noqa: E731
        plain.videomae.embeddings.patch_embeddings.projection.register_forward_hook(handle)
        expected = plain(clips).logits
        assert torch.equal(et.patch_videomae(plain, et.ReRoSelector(1.0))(clips).logits, expected)

    def test_a_parametrised_projection_trains_its_parametrisation(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification).double()
        torch.nn.utils.parametrizations.weight_norm(plain.videomae.embeddings.patch_embeddings.projection)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model(make_clips(plain), labels=torch.tensor([1, 4])).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)


class TestFrameSampler:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_runs_the_drawn_steps_at_positions_from_0(self, make_model, make_clips, cls, training):
        plain = make_model(cls).double().train(training)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5))
        clips = make_clips(plain, frames=12)
        selection = et.select_tokens(patched, clips)
        assert selection.steps.shape == (2, 4)
        assert (selection.steps.diff(dim=1) > 0).all()
        assert selection.steps.min() >= 0
        assert selection.steps.max() <= 5
        frames = torch.stack([2 * selection.steps, 2 * selection.steps + 1], dim=-1).flatten(1)
        short = clips[torch.arange(2)[:, None], frames]
        mask = mask_of(selection)
        actual = patched(clips, token_selection=selection, output_hidden_states=True)
        if cls is VideoMAEForPreTraining:  # plain patching on the drawn frames alone, which is tested above
            whole = et.TokenSelection(selection.visible, selection.target, selection.grid)
            reference = et.patch_videomae(copy.deepcopy(plain))
            expected = reference(short, token_selection=whole, output_hidden_states=True)
            torch.testing.assert_close((actual.loss, actual.logits), (expected.loss, expected.logits), **EXACT)
        else:
            expected = plain(short, bool_masked_pos=mask, output_hidden_states=True)
            torch.testing.assert_close(actual[0], expected[0], **EXACT)
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, **EXACT)

    def test_gradients_reach_the_drawn_steps_alone(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5))
        clips = make_clips(plain, frames=12)
        selection = et.select_tokens(patched.train(), clips)
        frames = torch.stack([2 * selection.steps, 2 * selection.steps + 1], dim=-1).flatten(1)
        rows = torch.arange(2)[:, None]
        short, clips = clips[rows, frames].requires_grad_(), clips.requires_grad_()
        labels = torch.tensor([1, 4])
        patched(clips, labels=labels, token_selection=selection).loss.backward()
        plain(short, labels=labels, bool_masked_pos=mask_of(selection)).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)
        torch.testing.assert_close(clips.grad[rows, frames], short.grad, **EXACT)
        assert (clips.grad.clone().index_put_((rows, frames), torch.zeros((), dtype=torch.float64)) == 0).all()

    def test_importance_is_computed_again_between_the_drawn_steps(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification)
        clips = make_clips(model, frames=12)
        tokens = torch.cat(
            [model.videomae.embeddings.patch_embeddings(clips[:, i : i + 2]) for i in range(0, 12, 2)], 1
        )
        et.patch_videomae(model, et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5)).train()
        selection = et.select_tokens(model, clips)
        drawn = tokens.unflatten(1, (6, 12))[torch.arange(2)[:, None], selection.steps]
        change = (drawn[:, 1:] - drawn[:, :-1]).norm(dim=-1)
        torch.testing.assert_close(selection.importance, torch.cat([change[:, :1], change], dim=1).flatten(1))

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
    @pytest.mark.parametrize("training", [True, False])
    def test_frame_counts(self, make_model, make_clips, alpha, frames, training):
        model = make_model(VideoMAEForVideoClassification, num_frames=16, image_size=32).train(training)
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(alpha))
        assert model(make_clips(model, frames=frames)).logits.shape == (2, 5)
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
            (VideoMAEForVideoClassification, "sdpa"),
            (VideoMAEForVideoClassification, "flex_attention"),  # compiles: slow, so it runs once
        ],
    )
    def test_each_gives_transformers_numbers(self, make_model, make_clips, cls, implementation):
        plain = make_model(cls).requires_grad_(False)  # flex attention has no backward on the CPU
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model.set_attn_implementation(implementation)
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        given = {} if cls is VideoMAEForVideoClassification else {"bool_masked_pos": mask_of(selection)}
        try:
            expected = plain(clips, **given)
        except (NotImplementedError, ImportError) as error:
            pytest.skip(f"transformers itself cannot run {implementation} here: {error}")
        torch.testing.assert_close(patched(clips, token_selection=selection).logits, expected.logits)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_attentions_and_hidden_states(self, make_model, make_clips, cls):
        plain = make_model(cls).double()
        plain.set_attn_implementation("eager")
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
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_of_half_precision(self, make_model, make_clips, same_to_rounding, dtype):
        plain = make_model(VideoMAEForVideoClassification).to(dtype)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips, labels = make_clips(plain), torch.tensor([1, 4])
        assert clips.dtype == dtype
        expected, actual = plain(clips, labels=labels), patched(clips, labels=labels)
        same_to_rounding(actual.logits, expected.logits)
        for out in (expected, actual):
            out.loss.backward()
        assert {gradient.dtype for gradient in gradients(patched).values()} == {dtype}
        for name, gradient in gradients(plain).items():
            difference = (gradients(patched)[name] - gradient).float().norm() / gradient.float().norm()
            assert difference < 0.03, name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_pretraining_with_weights_of_half_precision(self, make_model, make_clips, same_to_rounding, dtype):
        plain = make_model(VideoMAEForPreTraining).to(dtype)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = make_clips(plain)
        selection = et.select_tokens(patched, clips)
        expected, actual = plain(clips, mask_of(selection)), patched(clips, token_selection=selection)
        same_to_rounding(actual.logits, expected.logits)
        same_to_rounding(actual.loss, expected.loss)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_autocast(self, make_model, make_clips, same_to_rounding, cls, dtype):
        plain = make_model(cls)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = make_clips(plain)
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4])}
        with torch.autocast("cpu", dtype=dtype):
            selection = et.select_tokens(patched, clips)
            mask = {"bool_masked_pos": mask_of(selection)} if cls is VideoMAEForPreTraining else {}
            expected = plain(clips, **labels, **mask)
            actual = patched(clips, **labels, token_selection=selection)
        assert selection.importance.dtype == torch.float32
        assert actual.logits.dtype == expected.logits.dtype
        same_to_rounding(actual.logits, expected.logits)
        assert actual.loss.dtype == expected.loss.dtype
        for out in (expected, actual):
            out.loss.backward()
        for name, gradient in gradients(plain).items():
            assert gradients(patched)[name].dtype == torch.float32
            difference = (gradients(patched)[name] - gradient).norm() / gradient.norm()
            assert difference < 0.03, name

    def test_selecting_first_costs_no_gradient_under_autocast(self, make_model, make_clips):
        model = hook_projection(et.patch_videomae(make_model(VideoMAEForVideoClassification)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            selection = et.select_tokens(model, make_clips(model))  # casts the projection's weight under no_grad
            model(make_clips(model), labels=torch.tensor([1, 4]), token_selection=selection).loss.backward()
        assert model.videomae.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0

    def test_an_evaluation_first_costs_no_gradient_under_autocast(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(make_clips(model), labels=torch.tensor([1, 4]))  # the projection runs without grad inside
            model(make_clips(model), labels=torch.tensor([1, 4])).loss.backward()
        assert len(gradients(model)) == len(list(model.parameters()))

    def test_moving_after_patching(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        clips = make_clips(model)
        selection = et.select_tokens(model, clips)
        expected = model(clips, token_selection=selection).logits
        double = model.double()(clips.double(), token_selection=selection).logits
        torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-3)
        assert double.dtype == torch.float64

    @pytest.mark.parametrize("cls", CLASSES)
    def test_patched_on_the_meta_device(self, make_model, make_clips, cls):
        source = make_model(cls)
        with torch.device("meta"):
            model = cls(copy.deepcopy(source.config))
        et.patch_videomae(model).to_empty(device="cpu").load_state_dict(source.state_dict())
        clips = make_clips(source)
        selection = et.select_tokens(model, clips)
        expected = et.patch_videomae(source)(clips, token_selection=selection)
        assert torch.equal(model.eval()(clips, token_selection=selection)[0], expected[0])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
class TestGradientCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_same_gradients(self, make_model, make_clips, cls, reentrant):
        model = et.patch_videomae(make_model(cls).double(), drop_path=0.5).train()
        other = copy.deepcopy(model)
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        clips = make_clips(model, batch=4)
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4, 0, 2])}
        for each in (model, other):
            torch.manual_seed(2)  # the same tokens drawn, the same branches dropped
            each(clips, **labels).loss.backward()
        assert_same_gradients(other, model, **EXACT)

    def test_frozen_embeddings_with_input_require_grads(self, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification).double().train()
        plain.videomae.embeddings.requires_grad_(False)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for model in (plain, patched):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()  # what PEFT does: a hook on the patch embeddings
            model(make_clips(plain), labels=torch.tensor([1, 4])).loss.backward()
        assert_same_gradients(patched, plain, **EXACT)


class TestDropPath:
    def test_eval_is_unchanged(self, make_model, make_clips, same_to_rounding):
        plain = make_model(VideoMAEForVideoClassification)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), drop_path=0.9)
        same_to_rounding(patched(make_clips(plain)).logits, plain(make_clips(plain)).logits)
        assert patched.state_dict().keys() == plain.state_dict().keys()
        assert len(list(patched.parameters())) == len(list(plain.parameters()))

    def test_rates_rise_linearly_from_0_and_drop_whole_branches_per_clip(self, make_model, make_clips):
        batch, depth, rate = 512, 3, 0.6
        model = make_model(VideoMAEModel, num_hidden_layers=depth, image_size=32, num_frames=4)
        et.patch_videomae(model, et.ReRoSelector(1.0), drop_path=rate).train()
        ends: dict[tuple[int, str], Tensor] = {}
        for index, layer in enumerate(model.encoder.layer):
            layer.attention.register_forward_hook(
                lambda module, args, output, index=index: ends.__setitem__((index, "attention"), output)
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

    def test_survivors_are_rescaled(self, make_model, make_clips, same_to_rounding):
        plain = make_model(VideoMAEModel, num_hidden_layers=1).eval()
        # a single block: linspace(0, rate, 1) is 0, as timm and VideoMAE have it
        single = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), drop_path=0.9).train()
        same_to_rounding(single(make_clips(plain))[0], plain(make_clips(plain))[0])
        plain = make_model(VideoMAEModel, num_hidden_layers=2).eval()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), drop_path=0.5).train()
        ends = {}
        for name, model in (("plain", plain), ("patched", patched)):
            layer = model.encoder.layer[1].attention
            layer.register_forward_hook(lambda module, args, output, name=name: ends.__setitem__(name, output))
            torch.manual_seed(1)
            model(make_clips(plain, batch=16))
        survived = ends["patched"].abs().amax(dim=(1, 2)) > 0
        assert 0 < survived.sum() < 16
        torch.testing.assert_close(ends["patched"][survived], 2 * ends["plain"][survived])

    @pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, True])
    def test_bad_rates(self, make_model, rate):
        with pytest.raises(ValueError, match="drop_path"):
            et.patch_videomae(make_model(VideoMAEModel), drop_path=rate)


class CountOps(TorchDispatchMode):
    """Counts the aten operators that run, and those with a boolean index."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        self.counts[name] += 1
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.counts[f"product over {args[-1].shape[-2]}"] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.counts["boolean index"] += 1
        return func(*args, **(kwargs or {}))


SYNCHRONISING = [
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "boolean index",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "_assert_async",
]


def run_counting(model: Any, clips: Tensor, **kwargs: Any) -> tuple[Counter[str], Counter[str]]:
    with CountOps() as forward:
        out = model(clips, **kwargs)
    with CountOps() as backward:
        out.loss.backward()
    return forward.counts, backward.counts


SETTINGS = [
    pytest.param({}, id="defaults"),
    pytest.param({"selector": et.ReRoSelector(0.5, distance="cosine"), "drop_path": 0.2}, id="cosine"),
    pytest.param({"selector": et.ReRoSelector(0.5, distance="cka", descending=False)}, id="cka"),
    pytest.param({"frame_sampler": et.InfoFrameSampler(1.5)}, id="frames"),
    pytest.param({"selector": et.TubeSelector(0.5)}, id="tubes"),
    pytest.param({"selector": et.RunningCellSelector(0.5)}, id="cells"),
]


class TestOperators:
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_one_embedding_and_no_synchronisation(self, make_model, make_clips, cls, settings):
        model = et.patch_videomae(make_model(cls, image_size=64), **settings).train()
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4])}
        clips = make_clips(model, frames=12 if "frame_sampler" in settings else None)
        forward, backward = run_counting(model, clips, **labels)
        # Embedded once: no convolution, and no second product over a tubelet's pixels.
        projection = model.videomae.embeddings.patch_embeddings.projection
        pixels = projection.weight[0].numel()
        assert forward["convolution"] == backward["convolution"] == backward["convolution_backward"] == 0
        assert forward[f"product over {pixels}"] == 1
        assert backward[f"product over {pixels}"] == (cls is VideoMAEForPreTraining)  # the pixel head's own
        assert not {name: forward[name] for name in SYNCHRONISING if forward[name]}
        assert projection.weight.grad.abs().max() > 0

    def test_the_counter_would_see_them(self, make_model, make_clips):
        plain = make_model(VideoMAEForPreTraining)  # indexes with boolean masks, embeds with grad
        mask = torch.zeros(2, 48, dtype=torch.bool)
        mask[:, ::2] = True
        forward, backward = run_counting(plain, make_clips(plain), bool_masked_pos=mask)
        assert forward["boolean index"] > 0
        assert backward["convolution_backward"] == 1

    @pytest.mark.parametrize("path", PATHS[1:])
    def test_the_other_path_convolves_with_grad(self, make_model, make_clips, path):
        model = path(et.patch_videomae(make_model(VideoMAEForVideoClassification)))
        forward, backward = run_counting(model, make_clips(model), labels=torch.tensor([1, 4]))
        assert (forward["convolution"], backward["convolution_backward"]) == (1, 1)

    def test_frozen_projection_and_no_grad(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
        model.videomae.embeddings.requires_grad_(False)
        forward, backward = run_counting(model, make_clips(model), labels=torch.tensor([1, 4]))
        counts = (forward["product over 1536"], backward["product over 1536"], backward["convolution_backward"])
        assert counts == (1, 0, 0)
        with torch.inference_mode():
            assert model(make_clips(model)).logits.shape == (2, 5)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("cls", CLASSES[:2])
    def test_no_synchronisation_on_a_gpu(self, make_model, make_clips, cls, settings):
        model = et.patch_videomae(make_model(cls, image_size=64), **settings).train().cuda()
        labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4]).cuda()}
        clips = make_clips(model, frames=12 if "frame_sampler" in settings else None).cuda()
        model(clips, **labels).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(clips, **labels).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
