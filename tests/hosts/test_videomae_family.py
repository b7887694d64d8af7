"""Patched models of the VideoMAE family's own classes, against the unpatched reference modules run by hand."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from family_models import (
    FineTuningModel,
    MMEPreTrainingModel,
    MVDPreTrainingModel,
    PatchEmbed,
    PreTrainingModel,
    randomize,
)
from host_case import structure
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64
FAMILIES = ["videomae", "videomaev2", "mme", "mvd", "everest"]
FINE_TUNING = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    *(pytest.param(family, {"use_mean_pooling": False}, id=f"{family}-first-token") for family in FAMILIES),
    pytest.param("videomae", {"use_learnable_pos_emb": True}, id="videomae-learnable"),
    pytest.param("videomae", {"init_values": 0.1}, id="videomae-layer-scale"),
    pytest.param("videomae", {"qkv_bias": False}, id="videomae-no-qkv-bias"),
    pytest.param("videomae", {"tubelet_size": 1, "num_frames": 4}, id="videomae-tubelet1"),
    pytest.param("videomae", {"in_chans": 1, "patch_size": 8, "img_size": (24, 16)}, id="videomae-grey"),
    pytest.param("videomae", {"num_classes": 0}, id="videomae-headless"),
    pytest.param("videomaev2", {"cos_attn": True}, id="videomaev2-cosine"),
    pytest.param("mvd", {"use_cls_token": True}, id="mvd-class-token"),
    pytest.param("mvd", {"use_cls_token": True, "use_mean_pooling": False}, id="mvd-class-token-first"),
]
PRE_TRAINING = ["videomae", "videomaev2", "everest"]
DROPOUTS = {"drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}


def build(family: str = "videomae", **options: Any) -> Any:
    return randomize(FineTuningModel(family, **options))


def build_pretraining(family: str = "videomae", **options: Any) -> Any:
    return randomize(PreTrainingModel(family, **options))


def patch_embed_of(model: Any) -> Any:
    return (model.encoder if hasattr(model, "encoder") else model).patch_embed


def grid_of(model: Any) -> tuple[int, int, int]:
    patches = patch_embed_of(model)
    h, w = (side // patch for side, patch in zip(patches.img_size, patches.patch_size, strict=True))
    return patches.num_patches // (h * w), h, w


def clips_for(model: Any, batch: int = 2, frames: int | None = None, seed: int = 1) -> Tensor:
    """(B, C, T, H, W) of the model's dtype."""
    patches = patch_embed_of(model)
    frames = frames or grid_of(model)[0] * patches.tubelet_size
    shape = (batch, patches.proj.in_channels, frames, *patches.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(patches.proj.weight.dtype)


def logits_by_hand(plain: Any, clips: Tensor, chosen: Tensor) -> Tensor:
    """The unpatched model on the chosen tokens alone; MME's shuffle is the same at every call."""
    tokens = plain.patch_embed(clips)
    tokens = tokens + plain.pos_embed.detach().to(tokens.dtype)
    torch.manual_seed(11)
    features = plain.run_tokens(torch.stack([clip[row] for clip, row in zip(tokens, chosen, strict=True)]))
    return plain.run_head(features)


def run(model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(11)
    return model(*args, **kwargs)


def mask_of(index: Tensor, total: int) -> Tensor:
    """(B, total) bool, False at the indices."""
    mask = torch.ones(index.shape[0], total, dtype=torch.bool)
    for row, chosen in zip(mask, index.tolist(), strict=True):
        row[chosen] = False
    return mask


def target_mask_of(selection: et.TokenSelection) -> Tensor:
    """(B, N) bool, True at the targets."""
    return ~mask_of(selection.target, math.prod(selection.grid))


def run_by_hand(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """The unpatched pre-training model's prediction of the targets from the visible tokens."""
    return plain.run_masked(clips, mask_of(selection.visible, math.prod(selection.grid)), target_mask_of(selection))


def random_selection(model: Any, visible: int, kept: int | None = None, batch: int = 2) -> et.TokenSelection:
    """Random tokens, made without the library's own selecting."""
    generator = torch.Generator().manual_seed(3)
    grid = grid_of(model)
    order = torch.stack([torch.randperm(math.prod(grid), generator=generator) for _ in range(batch)])
    target = None if kept is None else order[:, visible:kept].sort(1).values
    return et.TokenSelection(order[:, :visible].sort(1).values, target, grid)


def drawn_frames(clips: Tensor, steps: Tensor, tubelet: int = 2) -> Tensor:
    """The clips of the drawn candidate steps (B, t), by plain loops."""
    frames = [[tubelet * step + i for step in row for i in range(tubelet)] for row in steps.tolist()]
    return torch.stack([clip[:, row] for clip, row in zip(clips, frames, strict=True)])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a reference gradient of zero proves nothing"
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class TestFineTuning:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("family", "options"), FINE_TUNING)
    def test_keeping_everything(self, same_to_rounding, family, options, training):
        plain = build(family, **options).double().train(training)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        torch.testing.assert_close(run(patched, clips), run(plain, clips), **EXACT)
        expected = run(plain.forward_features, clips)
        torch.testing.assert_close(run(patched.forward_features, clips), expected, **EXACT)

    @pytest.mark.parametrize(("family", "options"), FINE_TUNING)
    def test_gradients(self, family, options):
        plain = build(family, **options).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))
        clips = clips_for(plain)
        chosen = et.select_tokens(patched, clips).visible
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        weight = torch.randn(2, 5 if options.get("num_classes") != 0 else 32, dtype=torch.float64)
        (logits_by_hand(plain, pixels[0], chosen) * weight).sum().backward()
        (run(patched, pixels[1]) * weight).sum().backward()
        assert_same_gradients(patched, plain, **EXACT)
        without = {name for name, parameter in patched.named_parameters() if parameter.grad is None}
        assert without == ({"pos_embed"} if options.get("use_learnable_pos_emb") else set())
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **EXACT)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_their_dropouts_act_on_the_selected_tokens(self, family):
        plain = build(family, head_drop_rate=0.4, **DROPOUTS).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain, batch=4)
        chosen = et.select_tokens(patched, clips).visible
        expected = logits_by_hand(plain, clips, chosen)
        torch.testing.assert_close(run(patched, clips), expected, **EXACT)
        assert not torch.allclose(logits_by_hand(plain.eval(), clips, chosen), expected)

    def test_their_methods_work(self):
        model = et.patch_videomae(build())
        assert model.get_num_layers() == 2
        assert model.no_weight_decay() == {"pos_embed", "cls_token"}
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        assert model(clips_for(model)).shape == (2, 7)

    @pytest.mark.parametrize("what", ["normalised pixels", "norm", "scale", "dropout"])
    def test_a_patch_embed_that_does_more_than_project_trains_right(self, what):
        class Own(PatchEmbed):
            def forward(self, x: Tensor) -> Tensor:
                if what == "normalised pixels":
                    return super().forward((x - 0.45) / 0.225)
                return super().forward(x) * self.more if what == "scale" else self.more(super().forward(x))

        more = {
            "norm": nn.LayerNorm(32, dtype=torch.float64),
            "scale": nn.Parameter(torch.ones(32, dtype=torch.float64)),  # changes nothing before it is trained
            "dropout": nn.Dropout(0.5),  # changes nothing in eval
        }
        plain = build().double()
        plain.patch_embed.__class__ = Own
        plain.patch_embed.more = more.get(what)
        patched = et.patch_videomae(copy.deepcopy(plain.eval())).train()
        clips, selection = clips_for(plain), random_selection(plain, visible=20)
        torch.manual_seed(5)
        (expected := logits_by_hand(plain.train(), clips, selection.visible)).sum().backward()
        torch.manual_seed(5)
        (actual := patched(clips, token_selection=selection)).sum().backward()
        torch.testing.assert_close(actual, expected, **EXACT)
        assert_same_gradients(patched, plain, **EXACT)


class TestPositions:
    @pytest.mark.parametrize("learnable", [True, False])
    @pytest.mark.parametrize("fails", [False, True])
    def test_the_attribute_is_the_full_table_outside_of_a_forward(self, learnable, fails):
        plain = build(use_learnable_pos_emb=learnable)
        patched = et.patch_videomae(copy.deepcopy(plain))

        def out_of_memory(*_: Any) -> None:
            raise RuntimeError("out of memory")

        if fails:
            patched.blocks[1].register_forward_pre_hook(out_of_memory)
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                patched(clips_for(plain))
            assert torch.equal(patched.pos_embed, plain.pos_embed)
            assert isinstance(patched.pos_embed, nn.Parameter) == learnable

    @pytest.mark.parametrize(
        ("learnable", "how"),
        [(True, "loaded"), (True, "in place"), (True, "replaced"), (False, "in place"), (False, "replaced")],
    )
    def test_a_table_changed_after_patching_is_used(self, learnable, how):
        plain = build(use_learnable_pos_emb=learnable).double()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain)
        before = patched(clips)
        other = torch.randn(1, 48, 32, dtype=torch.float64)
        if how == "loaded":
            patched.load_state_dict({**plain.state_dict(), "pos_embed": other})
        elif how == "in place":
            patched.pos_embed.data.copy_(other)
        else:
            patched.pos_embed = nn.Parameter(other) if learnable else other
        plain.pos_embed.data = other
        chosen = et.select_tokens(patched, clips).visible
        torch.testing.assert_close(patched(clips), logits_by_hand(plain, clips, chosen), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(patched(clips), before, rtol=1e-3, atol=1e-3)
        et.unpatch_videomae(patched)
        torch.testing.assert_close(patched(clips), plain(clips), rtol=1e-5, atol=1e-5)

    def test_learned_ones_stay_the_optimizers(self):
        model = build(use_learnable_pos_emb=True)
        before = dict(model.named_parameters())
        et.patch_videomae(model)
        model(clips_for(model)).sum().backward()
        assert [name for name, _ in model.named_parameters()] == list(before)
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        et.unpatch_videomae(model)
        assert [name for name, _ in model.named_parameters()] == list(before)
        assert all(parameter is before[name] for name, parameter in model.named_parameters())


class TestUnpatching:
    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_takes_back_fused_attention_and_drop_path(self, kind):
        model = kind(drop_path_rate=0.2).train()
        before = structure(model)
        et.patch_videomae(model, drop_path=0.5, fused_attention=True)
        clips = clips_for(model)
        expected = run(model.eval(), clips)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with Attentions() as attentions:
                torch.testing.assert_close(run(copied, clips), expected, rtol=0, atol=0)
            assert attentions.dropouts == [0.0] * len(attentions.dropouts) != []
            assert structure(et.unpatch_videomae(copied.train())) == before
        assert structure(et.unpatch_videomae(et.patch_videomae(model.train()))) == before


class TestEverestsOwnSelection:
    def test_is_off_while_patched(self):
        plain = build("everest", mcm=True, mcm_ratio=0.4).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        with_its_own = plain(clips)
        assert patched.mcm is False
        without = copy.deepcopy(plain)
        without.mcm = False
        torch.testing.assert_close(patched(clips), without(clips), **EXACT)
        assert not torch.allclose(with_its_own, without(clips))
        et.unpatch_videomae(patched)
        assert patched.mcm is True
        assert patched.mcm_ratio == 0.4
        torch.testing.assert_close(patched(clips), with_its_own, **EXACT)

    def test_drops_the_same_tokens(self):
        plain = build("everest", mcm=True, mcm_ratio=0.4).double()  # drops 40 %
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain)
        torch.testing.assert_close(patched(clips), plain(clips), **EXACT)

    def test_is_off_while_patched_in_pretraining(self):
        model = build_pretraining("everest", mcm=True)
        clips, mask = clips_for(model), torch.ones(2, 48, dtype=torch.bool)
        expected = run(model, clips, mask)
        et.patch_videomae(model, et.ReRoSelector(1.0))
        assert model(clips)[0].shape[1] == 44
        et.unpatch_videomae(model)
        assert model.encoder.mcm is True
        torch.testing.assert_close(run(model, clips, mask), expected, rtol=0, atol=0)

    def test_stays_off_where_it_was_off(self):
        model = et.unpatch_videomae(et.patch_videomae(build("everest")))
        assert model.mcm is False


class TestPreTraining:
    @pytest.mark.parametrize("family", PRE_TRAINING)
    @pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qkv_bias": False}, {"tubelet_size": 1}])
    def test_keeping_everything_is_the_reference_with_the_same_mask(self, family, options):
        plain = build_pretraining(family, **options).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.RandomSelector(1.0), visible=et.TubeSelector(0.25))
        clips = clips_for(plain)
        total = math.prod(grid_of(plain))
        selection = et.select_tokens(patched, clips)
        hidden = mask_of(selection.visible, total)
        tubes = hidden.unflatten(1, (-1, 12))
        assert (tubes == tubes[:, :1]).all()
        assert (~tubes).sum(2).eq(3).all()  # 0.25 of 12 places
        pixels = [clips.clone().requires_grad_() for _ in range(2)]
        expected = plain(pixels[0], hidden)
        expected = expected[0] if family == "everest" else expected
        actual, (visible_mask, target_mask) = patched(pixels[1], token_selection=selection)
        torch.testing.assert_close(actual, expected, **EXACT)
        assert visible_mask.dtype == target_mask.dtype == torch.bool
        assert torch.equal(visible_mask, hidden)
        assert torch.equal(target_mask, ~hidden)
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (actual * weight).sum().backward()
        assert_same_gradients(patched, plain, **EXACT)
        torch.testing.assert_close(pixels[1].grad, pixels[0].grad, **EXACT)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_targets_alone_are_predicted_by_default(self, family):
        plain = build_pretraining(family).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain)
        assert patched.everest.selector.keep_ratio == 0.3
        assert patched.everest.mask_ratio == 0.9
        assert patched.everest.visible is None
        torch.manual_seed(11)
        selection = et.select_tokens(patched, clips)
        assert selection.visible.shape == (2, 4)  # ⌊0.1 · 48⌋
        assert selection.target.shape == (2, 10)  # ⌊0.3 · 48⌋ = 14 are kept
        prediction, masks = run(patched, clips)  # the same seed draws the same tokens
        assert torch.equal(masks[0], mask_of(selection.visible, 48))
        assert torch.equal(masks[1], mask_of(selection.target, 48))
        expected = run_by_hand(plain, clips, selection)
        torch.testing.assert_close(prediction, expected, **EXACT)
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (prediction * weight).sum().backward()
        assert_same_gradients(patched, plain, **EXACT)

    @pytest.mark.parametrize("options", [{"cos_attn": True}, {"in_chans": 3, "patch_size": 8, "img_size": (24, 16)}])
    def test_other_shapes(self, options):
        plain = build_pretraining("videomaev2", **options).double()
        patched = et.patch_videomae(copy.deepcopy(plain), mask_ratio=0.8)
        clips, selection = clips_for(plain), random_selection(plain, visible=3, kept=9)
        prediction, _ = patched(clips, token_selection=selection)
        torch.testing.assert_close(prediction, run_by_hand(plain, clips, selection), **EXACT)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_a_mask_is_ignored(self, family):
        model = et.patch_videomae(build_pretraining(family))
        clips = clips_for(model)
        expected = run(model, clips)
        mask = torch.ones(2, 48, dtype=torch.bool)  # would leave nothing visible
        calls = [((mask,), {}), ((), {"mask": mask})]
        if family == "videomaev2":
            calls += [((mask, mask), {}), ((mask,), {"decode_mask": mask}), ((mask, None), {})]
        for args, kwargs in calls:
            torch.testing.assert_close(run(model, clips, *args, **kwargs), expected, rtol=0, atol=0)

    def test_v2s_dual_masking(self):
        plain = build_pretraining("videomaev2", img_size=(32, 64)).double()  # grid (4, 2, 4)
        patched = et.patch_videomae(copy.deepcopy(plain), et.RunningCellSelector(0.5), visible=et.TubeSelector(0.25))
        clips = clips_for(plain)
        selection = et.select_tokens(patched, clips)
        assert selection.visible.shape == (2, 8)
        assert selection.target.shape == (2, 12)  # 16 kept, of which every tube has its place half of the time
        prediction, _ = patched(clips, token_selection=selection)
        hidden = mask_of(selection.visible, 32)
        expected = plain(clips, hidden, decode_mask=mask_of(selection.target, 32))  # V2's own: False is decoded
        torch.testing.assert_close(prediction, expected, **EXACT)

    def test_everests_training_loop_runs_as_it_is(self):
        plain = build_pretraining("everest", mcm=True).double().train()
        model = et.patch_videomae(copy.deepcopy(plain))
        videos = clips_for(plain)
        bool_masked_pos = torch.ones(2, 48, dtype=torch.bool)
        videos_patch = rearrange(videos, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=2, p=16, q=16)

        # the loop's own five lines
        outputs, (visible_mask, target_mask) = model(videos, bool_masked_pos)
        B, _, C = videos_patch.shape
        labels = videos_patch[~target_mask].reshape(B, -1, C)
        loss = F.mse_loss(outputs, labels)
        loss.backward()

        assert labels.shape == (2, 10, 1536)
        plain.encoder.mcm = False
        prediction = plain.run_masked(videos, visible_mask, ~target_mask)
        total = 0.0
        for clip in range(2):
            tokens = [token for token in range(48) if not target_mask[clip, token]]
            assert all(visible_mask[clip, token] for token in tokens)
            for place, token in enumerate(tokens):  # ascending
                i, y, x = token // 12, token // 4 % 3, token % 4
                block = videos[clip, :, 2 * i : 2 * i + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                difference = prediction[clip, place] - block.permute(1, 2, 3, 0).flatten()
                total = total + difference.square().sum()
        expected = total / labels.numel()
        torch.testing.assert_close(loss, expected, **EXACT)
        expected.backward()
        assert_same_gradients(model, plain, **EXACT)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_their_dropouts(self, family):
        plain = build_pretraining(family, **DROPOUTS).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips, selection = clips_for(plain), random_selection(plain, visible=4, kept=14)
        torch.manual_seed(11)
        expected = run_by_hand(plain, clips, selection)
        prediction, _ = run(patched, clips, token_selection=selection)
        torch.testing.assert_close(prediction, expected, **EXACT)
        assert not torch.allclose(run_by_hand(plain.eval(), clips, selection), expected)

    def test_position_tables_changed_after_patching_are_used(self):
        plain = build_pretraining().double()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips, selection = clips_for(plain), random_selection(plain, visible=4, kept=14)
        for model in (plain, patched):
            generator = torch.Generator().manual_seed(8)
            model.pos_embed = torch.randn(1, 48, 24, generator=generator)
            model.encoder.pos_embed = torch.randn(1, 48, 32, generator=generator)
        prediction, _ = patched(clips, token_selection=selection)
        torch.testing.assert_close(prediction, run_by_hand(plain, clips, selection), **EXACT)


class TestFrameSampler:
    def test_eval_takes_the_fullest_steps(self):
        model = et.patch_videomae(build(), et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5))
        clips = clips_for(model, batch=1, frames=12)
        clips[:, :, :2] *= 3  # step 1 differs much from step 0, steps 2 and 3 repeat it
        clips[:, :, 4:] = clips[:, :, 2:4].repeat(1, 1, 4, 1, 1)
        clips[:, :, 8:10] += 1  # a small change
        clips[:, :, 10:] += 3  # a larger one
        # 36 of 72 are kept: all 12 of steps 0, 1 and 5; the others tie at none and go to the earliest
        assert all(et.select_tokens(model, clips).steps[0].tolist() == [0, 1, 2, 5] for _ in range(5))
        logits = [model(clips) for _ in range(3)]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
        model.train()
        assert len({tuple(et.select_tokens(model, clips_for(model, 1, 12)).steps[0].tolist()) for _ in range(12)}) > 1

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining_masks_are_over_the_candidates_tokens(self, family):
        plain = build_pretraining(family).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5))
        clips = clips_for(plain, frames=12)
        torch.manual_seed(11)
        selection = et.select_tokens(patched, clips)
        prediction, masks = run(patched, clips)
        for mask, chosen in zip(masks, (selection.visible, selection.target), strict=True):
            assert mask.shape == (2, 72)
            for clip, row in enumerate(chosen.tolist()):
                there = [12 * int(selection.steps[clip, token // 12]) + token % 12 for token in row]
                assert (~mask[clip]).nonzero().flatten().tolist() == sorted(there)
        expected = run_by_hand(plain, drawn_frames(clips, selection.steps), selection)
        torch.testing.assert_close(prediction, expected, **EXACT)
        # ... so that a training loop finds the pixels of the prediction in the clips that it passed in
        patches = rearrange(clips, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=2, p=16, q=16)
        labels = patches[~masks[1]].reshape(2, -1, 1536)
        short = rearrange(
            drawn_frames(clips, selection.steps), "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=2, p=16, q=16
        )
        assert torch.equal(labels, torch.stack([clip[row] for clip, row in zip(short, selection.target, strict=True)]))


class Attentions(TorchFunctionMode):
    """Records the dropout of each call of F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dropouts: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.dropouts.append(args[4] if len(args) > 4 else (kwargs or {}).get("dropout_p", 0.0))
        return func(*args, **(kwargs or {}))


class TestFusedAttention:
    @pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"init_values": 0.1}])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_fine_tuning_gives_the_same_numbers_and_gradients(self, family, options):
        plain = build(family, **options).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain), fused_attention=True)
        for model in (plain, patched):
            model.blocks[1].attn.scale = 0.7  # the model's own scale counts, not the head's width
        clips = clips_for(plain)
        chosen = et.select_tokens(patched, clips).visible
        with Attentions() as attentions:
            actual = run(patched, clips)
        assert attentions.dropouts == [0.0, 0.0]
        expected = logits_by_hand(plain, clips, chosen)
        torch.testing.assert_close(actual, expected, **EXACT)
        expected.sum().backward()
        actual.sum().backward()
        assert_same_gradients(patched, plain, **EXACT)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining_fuses_the_decoder_too(self, family):
        plain = build_pretraining(family, decoder_depth=3).double()
        patched = et.patch_videomae(copy.deepcopy(plain), fused_attention=True)
        clips, selection = clips_for(plain), random_selection(plain, visible=4, kept=14)
        with Attentions() as attentions:
            prediction, _ = patched(clips, token_selection=selection)
        assert len(attentions.dropouts) == 5
        torch.testing.assert_close(prediction, run_by_hand(plain, clips, selection), **EXACT)

    def test_attention_dropout_in_training_alone(self):
        plain = build(attn_drop_rate=0.3, drop_rate=0.1).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), fused_attention=True)
        clips = clips_for(plain)
        everything = torch.arange(48).expand(2, -1)
        for training, rate in ((True, 0.3), (False, 0.0)):
            for model in (plain, patched):
                model.train(training)
            # the unfused kernel draws what nn.Dropout draws
            with sdpa_kernel(SDPBackend.MATH), Attentions() as attentions:
                actual = run(patched, clips)
            assert attentions.dropouts == [rate, rate]
            torch.testing.assert_close(actual, logits_by_hand(plain, clips, everything), **EXACT)

    def test_not_unless_asked_and_not_after_unpatching(self):
        model = et.patch_videomae(build())
        clips = clips_for(model)
        for patch, fused in (
            (lambda model: model, 0),
            (lambda model: et.patch_videomae(model, fused_attention=True), 2),
            (et.unpatch_videomae, 0),
        ):
            patch(model)
            with Attentions() as attentions:
                model(clips)
            assert len(attentions.dropouts) == fused

    def test_cosine_attention_is_refused(self):
        for model in (build("videomaev2", cos_attn=True), build_pretraining("videomaev2", cos_attn=True)):
            before = structure(model)
            with pytest.raises(ValueError, match=r"fused_attention.*block 0.*scale"):
                et.patch_videomae(model, fused_attention=True)
            assert structure(model) == before

    def test_another_attention_is_refused(self):
        class TwoProjections(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x)

        model = build()
        model.blocks[1].attn = TwoProjections()
        before = structure(model)
        with pytest.raises(ValueError, match="fused_attention"):
            et.patch_videomae(model, fused_attention=True)
        assert structure(model) == before
        assert et.patch_videomae(model)(clips_for(model)).shape == (2, 5)  # unfused, any attention will do

    def test_other_hosts_refuse_it(self, make_model):
        with pytest.raises(ValueError, match="fused_attention"):
            et.patch_videomae(make_model(VideoMAEForVideoClassification), fused_attention=True)


class TestDropPath:
    @pytest.mark.parametrize("own", [0.0, 0.9])
    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_rates_rise_linearly_and_whole_branches_are_dropped(self, kind, own):
        depth, rate, batch = 3, 0.6, 400
        model = kind(depth=depth, drop_path_rate=own, img_size=32, num_frames=4).train()
        et.patch_videomae(model, et.ReRoSelector(1.0), mask_ratio=0.5, drop_path=rate)
        blocks = getattr(model, "encoder", model).blocks
        seen: list[tuple[int, Tensor, Tensor]] = []
        for index, block in enumerate(blocks):
            block.drop_path.register_forward_hook(
                lambda module, args, output, index=index: seen.append((index, args[0], output))
            )
        with torch.no_grad():
            model(clips_for(model, batch=batch))
        assert len(seen) == 2 * depth
        for index, branch, output in seen:
            expected = rate * index / (depth - 1)
            dropped = (output == 0).all(dim=2).all(dim=1)
            assert abs(dropped.float().mean().item() - expected) < 4 * math.sqrt(0.25 / batch), index
            assert index > 0 or not dropped.any()
            torch.testing.assert_close(output[~dropped], branch[~dropped] / (1 - expected))

    def test_the_models_own_is_kept_where_none_is_given_and_comes_back(self):
        model = build(drop_path_rate=0.4).train()
        own = [block.drop_path for block in model.blocks]
        et.patch_videomae(model)
        assert all(block.drop_path is before for block, before in zip(model.blocks, own, strict=True))
        et.patch_videomae(model, drop_path=0.8)
        et.unpatch_videomae(model)
        assert all(block.drop_path is before for block, before in zip(model.blocks, own, strict=True))
        assert model.blocks[1].drop_path.drop_prob == pytest.approx(0.4)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_models_own_comes_back_in_the_models_mode(self, training):
        model = et.patch_videomae(build(drop_path_rate=0.4).train(not training), drop_path=0.8)
        et.unpatch_videomae(model.train(training))
        assert {module.training for module in model.modules()} == {training}


def with_other_projection(projection: nn.Module) -> Any:
    model = build()
    model.patch_embed.proj = projection
    return model


class TestRefusals:
    @pytest.mark.parametrize(
        "model", [MMEPreTrainingModel(), MVDPreTrainingModel(), MVDPreTrainingModel(use_cls_token=True)]
    )
    def test_models_that_predict_other_things_than_pixels(self, model):
        before = structure(model)
        for function in (et.patch_videomae, et.count_flops):
            with pytest.raises(TypeError, match="pixels"):
                function(model)
        assert structure(model) == before

    @pytest.mark.parametrize(
        "model",
        [
            nn.Linear(3, 3),
            nn.Sequential(nn.Conv3d(3, 8, 2), nn.Flatten()),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False),
            build().blocks[0],
            build().patch_embed,
            build_pretraining().decoder,
            with_other_projection(nn.Conv2d(3, 32, 16, 16)),
            with_other_projection(nn.Linear(1536, 32)),
        ],
        ids=["linear", "sequential", "encoder", "block", "patch-embed", "decoder", "image-model", "linear-projection"],
    )
    def test_unrelated_modules(self, model):
        before = structure(model)
        with pytest.raises(TypeError, match="patch"):
            et.patch_videomae(model)
        assert structure(model) == before

    @pytest.mark.parametrize("patched", [False, True])
    def test_the_encoder_of_a_pretraining_model(self, patched):
        """Its own forward wants a mask, so it is no classifier to be patched by itself."""
        model = build_pretraining()
        if patched:
            et.patch_videomae(model)
        with pytest.raises(TypeError, match="cannot patch"):
            et.patch_videomae(model.encoder)

    def test_what_is_no_module(self):
        with pytest.raises(TypeError):
            et.patch_videomae("model")

    def test_one_time_step(self):
        model = build(num_frames=2)
        with pytest.raises(ValueError, match="two time steps"):
            et.patch_videomae(model)
        assert type(model) is FineTuningModel

    @pytest.mark.parametrize(
        "setting", [{"num_frames": 8}, {"tubelet_size": 1}, {"temporal_embedding": "none"}], ids=str
    )
    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_settings_of_image_models(self, kind, setting):
        model = kind()
        before = structure(model)
        with pytest.raises(ValueError, match=next(iter(setting))):
            et.patch_videomae(model, **setting)
        assert structure(model) == before

    def test_visible_for_a_classifier(self):
        with pytest.raises(ValueError, match="visible"):
            et.patch_videomae(build(), visible=et.TubeSelector(0.1))

    def test_nothing_to_predict(self):
        with pytest.raises(ValueError, match="target"):
            et.patch_videomae(build_pretraining(), et.ReRoSelector(0.1), mask_ratio=0.9)


def counted_by_torch(model: Any, *args: Any) -> float:
    """Half of what FlopCounterMode counts: for it a multiply–accumulate is two."""
    # unfused, because older versions don't count the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args)
    return counter.get_total_flops() / 2


class TestCountFlops:
    @pytest.mark.parametrize("family", ["videomae", "mvd"])
    def test_fused_attention_counts_alike(self, family):
        model = FineTuningModel(family, embed_dim=48, mlp_ratio=3.0, num_classes=7, use_mean_pooling=False).eval()
        counts = [et.count_flops(et.patch_videomae(model, fused_attention=fused)) for fused in (False, True)]
        assert counts[0] == counts[1]
        assert counts[1].total == pytest.approx(counted_by_torch(model, clips_for(model, batch=1)), rel=0.005)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_unpatched_pretraining_is_counted_with_videomaes_tubes(self, family):
        model = PreTrainingModel(family, embed_dim=48, mlp_ratio=3.0, decoder_depth=3).eval()
        tubes = torch.arange(48)[None] % 12 >= 2  # VideoMAE's hide ⌊0.9 · 12⌋ places
        counted = counted_by_torch(model, clips_for(model, batch=1), tubes)
        assert et.count_flops(model).total == pytest.approx(counted, rel=0.005)


SMALL: dict[str, Any] = {"img_size": 32, "depth": 1}  # grid (4, 2, 2)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """The aot_eager backend traces all that inductor would compile."""

    def test_fused_attention_frame_sampler_and_drop_path(self):
        model = build(**SMALL, attn_drop_rate=0.1).train()
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5), fused_attention=True, drop_path=0.3)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        clips = clips_for(model, frames=12)
        logits = [compiled(clips) for _ in range(3)]
        logits[-1].sum().backward()
        assert len(gradients(model)) == len(list(model.parameters()))
        assert len({each.sum().item() for each in logits}) > 1
        assert counters["stats"]["unique_graphs"] == 1
