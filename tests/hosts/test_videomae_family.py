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
from host_case import gradients, mask_of, structure, unchanged
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64
FAMILIES = ["videomae", "videomaev2", "mme", "mvd", "everest"]
PRE_TRAINING = ["videomae", "videomaev2", "everest"]


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


def run_by_hand(plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
    """The unpatched pre-training model's prediction of the targets from the visible tokens."""
    total = math.prod(selection.grid)
    return plain.run_masked(clips, mask_of(selection.visible, total), ~mask_of(selection.target, total))


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


def patches_of(clips: Tensor) -> Tensor:
    """What the repositories' loops call videos_patch, (B, N, 2·16²·3)."""
    return rearrange(clips, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=2, p=16, q=16)


def assert_same_gradients(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a reference gradient of zero proves nothing"
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class TestFineTuning:
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
    def test_the_attribute_is_the_full_table_outside_of_a_forward(self, learnable):
        plain = build(use_learnable_pos_emb=learnable)
        patched = et.patch_videomae(copy.deepcopy(plain))

        def out_of_memory(*_: Any) -> None:
            raise RuntimeError("out of memory")

        for failure in (contextlib.nullcontext(), pytest.raises(RuntimeError)):
            with failure:
                patched(clips_for(plain))
            assert torch.equal(patched.pos_embed, plain.pos_embed)
            assert isinstance(patched.pos_embed, nn.Parameter) == learnable
            patched.blocks[1].register_forward_pre_hook(out_of_memory)

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
        for change in (et.patch_videomae, et.unpatch_videomae):
            change(model)
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
        plain = build("everest", mcm=True, mcm_ratio=0.4).double()  # drops 40 %
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain)
        with_its_own = plain(clips)
        torch.testing.assert_close(patched(clips), with_its_own, **EXACT)  # the same tokens
        assert patched.mcm is False
        patched.everest.selector.keep_ratio = 1.0
        without = copy.deepcopy(plain)
        without.mcm = False
        torch.testing.assert_close(patched(clips), without(clips), **EXACT)
        assert not torch.allclose(with_its_own, without(clips))
        et.unpatch_videomae(patched)
        assert (patched.mcm, patched.mcm_ratio) == (True, 0.4)
        torch.testing.assert_close(patched(clips), with_its_own, **EXACT)

    def test_is_off_while_patched_in_pretraining(self):
        model = build_pretraining("everest", mcm=True)
        clips, mask = clips_for(model), torch.ones(2, 48, dtype=torch.bool)
        expected = run(model, clips, mask)
        et.patch_videomae(model, et.ReRoSelector(1.0))
        assert model(clips)[0].shape[1] == 44
        assert et.unpatch_videomae(model).encoder.mcm is True
        torch.testing.assert_close(run(model, clips, mask), expected, rtol=0, atol=0)
        assert et.unpatch_videomae(et.patch_videomae(build("everest"))).mcm is False  # where it was off


class TestPreTraining:
    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_videomaes_own_masking_is_the_model_with_the_same_mask(self, family):
        plain = build_pretraining(family).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.RandomSelector(1.0), visible=et.TubeSelector(0.5))
        clips = clips_for(plain)
        selection = et.select_tokens(patched, clips)
        hidden = mask_of(selection.visible, 48)
        tubes = hidden.unflatten(1, (4, 12))
        assert (tubes == tubes[:, :1]).all()
        assert (~tubes).sum(2).eq(6).all()
        expected = plain(clips, hidden)
        actual, (visible_mask, target_mask) = patched(clips, token_selection=selection)
        torch.testing.assert_close(actual, expected[0] if family == "everest" else expected, **EXACT)
        assert visible_mask.dtype == target_mask.dtype == torch.bool
        assert torch.equal(visible_mask, hidden)
        assert torch.equal(target_mask, ~hidden)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_the_masks_that_come_out_are_the_defaults(self, family):
        patched = et.patch_videomae(build_pretraining(family))
        clips = clips_for(patched)
        policy = patched.everest
        assert (policy.selector.keep_ratio, policy.mask_ratio, policy.visible) == (0.3, 0.9, None)
        torch.manual_seed(11)
        selection = et.select_tokens(patched, clips)
        assert selection.visible.shape == (2, 4)  # ⌊0.1 · 48⌋
        assert selection.target.shape == (2, 10)  # ⌊0.3 · 48⌋ = 14 are kept
        _, masks = run(patched, clips)  # the same seed draws the same tokens
        assert torch.equal(masks[0], mask_of(selection.visible, 48))
        assert torch.equal(masks[1], mask_of(selection.target, 48))

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
        videos_patch = patches_of(videos)

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
        labels = patches_of(clips)[~masks[1]].reshape(2, -1, 1536)
        short = patches_of(drawn_frames(clips, selection.steps))
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
    @pytest.mark.parametrize(
        ("family", "options"),
        [*((family, {}) for family in FAMILIES), ("videomae", {"qkv_bias": False}), ("mvd", {"init_values": 0.1})],
    )
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
            with unchanged(model), pytest.raises(ValueError, match=r"fused_attention.*block 0.*scale"):
                et.patch_videomae(model, fused_attention=True)

    def test_another_attention_is_refused(self):
        class TwoProjections(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x)

        model = build()
        model.blocks[1].attn = TwoProjections()
        with unchanged(model), pytest.raises(ValueError, match="fused_attention"):
            et.patch_videomae(model, fused_attention=True)
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

    @pytest.mark.parametrize("training", [True, False])
    def test_the_models_own_is_kept_where_none_is_given_and_comes_back(self, training):
        model = build(drop_path_rate=0.4).train(not training)
        own = [block.drop_path for block in model.blocks]
        et.patch_videomae(model)
        assert all(block.drop_path is before for block, before in zip(model.blocks, own, strict=True))
        et.unpatch_videomae(et.patch_videomae(model, drop_path=0.8).train(training))
        assert all(block.drop_path is before for block, before in zip(model.blocks, own, strict=True))
        assert model.blocks[1].drop_path.drop_prob == pytest.approx(0.4)
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
        for function in (et.patch_videomae, et.count_flops):
            with unchanged(model), pytest.raises(TypeError, match="pixels"):
                function(model)

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
        with unchanged(model), pytest.raises(TypeError, match="patch"):
            et.patch_videomae(model)

    @pytest.mark.parametrize("patched", [False, True])
    def test_the_encoder_of_a_pretraining_model(self, patched):
        """Its own forward wants a mask, so it is no classifier to be patched by itself."""
        model = build_pretraining()
        if patched:
            et.patch_videomae(model)
        with pytest.raises(TypeError, match="cannot patch"):
            et.patch_videomae(model.encoder)

    @pytest.mark.parametrize(
        ("model", "setting", "message"),
        [
            (build(num_frames=2), {}, "two time steps"),
            (build(), {"visible": et.TubeSelector(0.1)}, "visible"),
            (build_pretraining(), {"selector": et.ReRoSelector(0.1)}, "target"),  # nothing to predict
            *(
                (model, setting, next(iter(setting)))  # those of image models
                for setting in ({"num_frames": 8}, {"tubelet_size": 1}, {"temporal_embedding": "none"})
                for model in (build(), build_pretraining())
            ),
        ],
    )
    def test_settings(self, model, setting, message):
        with unchanged(model), pytest.raises(ValueError, match=message):
            et.patch_videomae(model, **setting)


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


def test_fused_attention_frame_sampler_and_drop_path_make_one_graph():
    torch._dynamo.reset()
    counters.clear()
    model = build(img_size=32, depth=1, attn_drop_rate=0.1).train()
    et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5), fused_attention=True, drop_path=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    clips = clips_for(model, frames=12)
    logits = [compiled(clips) for _ in range(3)]
    logits[-1].sum().backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    assert len({each.sum().item() for each in logits}) > 1
    assert counters["stats"]["unique_graphs"] == 1
