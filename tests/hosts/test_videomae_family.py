"""What the VideoMAE family's own classes have of their own; numbers and gradients are the host contract's."""

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
from host_case import counted_by_torch, gradients, mask_of, structure, unchanged, weighted
from host_models import fine_tuning, pretraining
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

PRE_TRAINING = ["videomae", "videomaev2", "everest"]


def build(family: str = "videomae", **options: Any) -> Any:
    return randomize(FineTuningModel(family, **options))


def build_pretraining(family: str = "videomae", **options: Any) -> Any:
    return randomize(PreTrainingModel(family, **options))


def clips(batch: int = 2, frames: int = 8, size: tuple[int, int] = (48, 64), dtype: Any = torch.float64) -> Tensor:
    return torch.randn(batch, 3, frames, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def patches_of(clips: Tensor) -> Tensor:
    """What the repositories' loops call videos_patch, (B, N, 2·16²·3)."""
    return rearrange(clips, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=2, p=16, q=16)


def run(model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(11)
    return model(*args, **kwargs)


class TestFineTuning:
    def test_their_methods_work(self):
        model = et.patch_videomae(build())
        assert model.get_num_layers() == 2
        assert model.no_weight_decay() == {"pos_embed", "cls_token"}
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        assert model(clips(dtype=torch.float32)).shape == (2, 7)

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
        case = fine_tuning("videomae")
        plain = case.plain()
        plain.patch_embed.__class__ = Own
        plain.patch_embed.more = more.get(what)
        patched = et.patch_videomae(copy.deepcopy(plain.eval())).train()
        expected = case.expected(plain.train(), clips(), case.selection())
        actual = case.run(patched, clips(), case.selection())
        case.close(actual, expected)
        weighted(expected).backward()
        weighted(actual).backward()
        case.close_gradients(patched, plain)


class TestPositions:
    @pytest.mark.parametrize("learnable", [True, False])
    def test_the_attribute_is_the_full_table_outside_of_a_forward(self, learnable):
        plain = build(use_learnable_pos_emb=learnable)
        patched = et.patch_videomae(copy.deepcopy(plain))

        def out_of_memory(*_: Any) -> None:
            raise RuntimeError("out of memory")

        for failure in (contextlib.nullcontext(), pytest.raises(RuntimeError)):
            with failure:
                patched(clips(dtype=torch.float32))
            assert torch.equal(patched.pos_embed, plain.pos_embed)
            assert isinstance(patched.pos_embed, nn.Parameter) == learnable
            patched.blocks[1].register_forward_pre_hook(out_of_memory)

    @pytest.mark.parametrize(
        ("learnable", "how"),
        [(True, "loaded"), (True, "in place"), (True, "replaced"), (False, "in place"), (False, "replaced")],
    )
    def test_a_table_changed_after_patching_is_used(self, learnable, how):
        case = fine_tuning("videomae", use_learnable_pos_emb=learnable)
        plain, patched = case.plain(), case.patch(case.plain())
        before, other = patched(clips()), torch.randn(1, 48, 32, dtype=torch.float64)
        if how == "loaded":
            patched.load_state_dict({**plain.state_dict(), "pos_embed": other})
        elif how == "in place":
            patched.pos_embed.data.copy_(other)
        else:
            patched.pos_embed = nn.Parameter(other) if learnable else other
        plain.pos_embed.data = other
        selection = et.select_tokens(patched, clips())
        case.close(patched(clips()), case.expected(plain, clips(), selection), 1e-6)
        assert not torch.allclose(patched(clips()), before, rtol=1e-3, atol=1e-3)
        case.close(et.unpatch_videomae(patched)(clips()), plain(clips()), 1e-6)

    def test_those_of_pretraining_too(self):
        case = pretraining("videomae")
        plain, patched = case.plain(), case.patch(case.plain())
        for model in (plain, patched):
            generator = torch.Generator().manual_seed(8)
            model.pos_embed = torch.randn(1, 48, 24, generator=generator)
            model.encoder.pos_embed = torch.randn(1, 48, 32, generator=generator)
        actual = case.run(patched, clips(), case.selection())
        case.close(actual, case.expected(plain, clips(), case.selection()))

    def test_learned_ones_stay_the_optimizers(self):
        model = build(use_learnable_pos_emb=True)
        before = dict(model.named_parameters())
        for change in (et.patch_videomae, et.unpatch_videomae):
            change(model)
            assert [name for name, _ in model.named_parameters()] == list(before)
            assert all(parameter is before[name] for name, parameter in model.named_parameters())


class TestEverestsOwnSelection:
    def test_is_off_while_patched(self):
        case = fine_tuning("everest", mcm=True, mcm_ratio=0.4)  # drops 40 %
        plain, patched = case.plain(), et.patch_videomae(case.plain())
        with_its_own = plain(clips())
        case.close(patched(clips()), with_its_own)  # the same tokens
        assert patched.mcm is False
        patched.everest.selector.keep_ratio = 1.0
        plain.mcm = False
        case.close(patched(clips()), plain(clips()))
        assert not torch.allclose(with_its_own, plain(clips()))
        et.unpatch_videomae(patched)
        assert (patched.mcm, patched.mcm_ratio) == (True, 0.4)
        case.close(patched(clips()), with_its_own)

    def test_is_off_while_patched_in_pretraining(self):
        model, mask = build_pretraining("everest", mcm=True).double(), torch.ones(2, 48, dtype=torch.bool)
        expected = run(model, clips(), mask)
        et.patch_videomae(model, et.ReRoSelector(1.0))
        assert model(clips())[0].shape[1] == 44
        assert et.unpatch_videomae(model).encoder.mcm is True
        torch.testing.assert_close(run(model, clips(), mask), expected, rtol=0, atol=0)
        assert et.unpatch_videomae(et.patch_videomae(build("everest"))).mcm is False  # where it was off


class TestPreTraining:
    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_videomaes_own_masking_is_the_model_with_the_same_mask(self, family):
        case = pretraining(family)
        plain, patched = case.plain(), case.plain()
        et.patch_videomae(patched, et.RandomSelector(1.0), visible=et.TubeSelector(0.5))
        selection = et.select_tokens(patched, clips())
        hidden = mask_of(selection.visible, 48)
        tubes = hidden.unflatten(1, (4, 12))
        assert (tubes == tubes[:, :1]).all()
        assert (~tubes).sum(2).eq(6).all()
        actual, (visible_mask, target_mask) = patched(clips(), token_selection=selection)
        case.close(actual, case.output(plain(clips(), hidden)))
        assert visible_mask.dtype == target_mask.dtype == torch.bool
        assert torch.equal(visible_mask, hidden)
        assert torch.equal(target_mask, ~hidden)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_the_defaults_and_their_masks(self, family):
        patched = et.patch_videomae(build_pretraining(family).double())
        policy = patched.everest
        assert (policy.selector.keep_ratio, policy.mask_ratio, policy.visible) == (0.3, 0.9, None)
        torch.manual_seed(11)
        selection = et.select_tokens(patched, clips())
        assert selection.visible.shape == (2, 4)  # ⌊0.1 · 48⌋
        assert selection.target.shape == (2, 10)  # ⌊0.3 · 48⌋ = 14 are kept
        _, masks = run(patched, clips())  # the same seed draws the same tokens
        assert torch.equal(masks[0], mask_of(selection.visible, 48))
        assert torch.equal(masks[1], mask_of(selection.target, 48))

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_a_mask_is_ignored(self, family):
        model = et.patch_videomae(build_pretraining(family).double())
        expected = run(model, clips())
        mask = torch.ones(2, 48, dtype=torch.bool)  # would leave nothing visible
        calls: list[Any] = [((mask,), {}), ((), {"mask": mask})]
        if family == "videomaev2":
            calls += [((mask, mask), {}), ((mask,), {"decode_mask": mask}), ((mask, None), {})]
        for args, kwargs in calls:
            torch.testing.assert_close(run(model, clips(), *args, **kwargs), expected, rtol=0, atol=0)

    def test_v2s_dual_masking(self):
        plain, videos = build_pretraining("videomaev2", img_size=(32, 64)).double(), clips(size=(32, 64))
        patched = et.patch_videomae(copy.deepcopy(plain), et.RunningCellSelector(0.5), visible=et.TubeSelector(0.25))
        selection = et.select_tokens(patched, videos)  # grid (4, 2, 4)
        assert selection.visible.shape == (2, 8)
        assert selection.target.shape == (2, 12)  # 16 kept, of which every tube has its place half of the time
        prediction, _ = patched(videos, token_selection=selection)
        hidden = mask_of(selection.visible, 32)
        expected = plain(videos, hidden, decode_mask=mask_of(selection.target, 32))  # V2's own: False is decoded
        torch.testing.assert_close(prediction, expected)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_everests_training_loop_runs_as_it_is(self, family):
        """... and those of the others with its two lines."""
        case = pretraining(family, **({"mcm": True} if family == "everest" else {}))
        plain, model = case.plain().train(), et.patch_videomae(case.plain()).train()
        videos, bool_masked_pos = clips(), torch.ones(2, 48, dtype=torch.bool)
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
        case.close(loss, expected)
        expected.backward()
        case.close_gradients(model, plain)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_masks_are_over_the_candidates_tokens_with_a_frame_sampler(self, family):
        """... so that a training loop finds the pixels of the prediction in the clips that it passed in."""
        patched = et.patch_videomae(build_pretraining(family).double(), frame_sampler=et.InfoFrameSampler(1.5)).train()
        videos = clips(frames=12)
        torch.manual_seed(11)
        selection = et.select_tokens(patched, videos)
        _, masks = run(patched, videos)
        for mask, chosen in zip(masks, (selection.visible, selection.target), strict=True):
            assert mask.shape == (2, 72)
            for clip, row in enumerate(chosen.tolist()):
                there = [12 * int(selection.steps[clip, token // 12]) + token % 12 for token in row]
                assert (~mask[clip]).nonzero().flatten().tolist() == sorted(there)


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
    @pytest.mark.parametrize(("case", "attentions"), [(fine_tuning("videomae"), 2), (pretraining("everest"), 4)])
    def test_runs_where_asked_and_not_after_unpatching(self, case, attentions):
        model = case.build(0)
        for patch, fused in (
            (case.patch, 0),
            (lambda model: case.patch(model, fused_attention=True), attentions),  # the decoder's too
        ):
            patch(model)
            with Attentions() as counted:
                model(clips(dtype=torch.float32))
            assert len(counted.dropouts) == fused
        et.unpatch_videomae(model)
        with Attentions() as counted:
            case.own_output(model)
        assert not counted.dropouts

    def test_the_models_own_scale_counts(self):
        case = fine_tuning("videomae")
        plain, patched = case.plain(), case.patch(case.plain(), fused_attention=True)
        for model in (plain, patched):
            model.blocks[1].attn.scale = 0.7  # not the head's width
        case.close(case.run(patched, clips(), case.selection()), case.expected(plain, clips(), case.selection()))

    def test_attention_dropout_in_training_alone(self):
        case = fine_tuning("videomae", attn_drop_rate=0.3, drop_rate=0.1)
        plain, patched = case.plain(), case.patch(case.plain(), fused_attention=True)
        for training, rate in ((True, 0.3), (False, 0.0)):
            # the unfused kernel draws what nn.Dropout draws
            with sdpa_kernel(SDPBackend.MATH), Attentions() as attentions:
                actual = case.run(patched.train(training), clips(), case.selection())
            assert attentions.dropouts == [rate, rate]
            case.close(actual, case.expected(plain.train(training), clips(), case.selection()))

    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_is_copied_and_taken_back_with_drop_path(self, kind):
        model = kind(drop_path_rate=0.2).train()
        before = structure(model)
        et.patch_videomae(model, drop_path=0.5, fused_attention=True)
        videos = clips(dtype=torch.float32)
        expected = run(model.eval(), videos)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with Attentions() as attentions:
                torch.testing.assert_close(run(copied, videos), expected, rtol=0, atol=0)
            assert attentions.dropouts == [0.0] * len(attentions.dropouts) != []
            assert structure(et.unpatch_videomae(copied.train())) == before
        assert structure(et.unpatch_videomae(et.patch_videomae(model.train()))) == before

    def test_another_attention_is_refused(self, make_model):
        class TwoProjections(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x)

        model = build()
        model.blocks[1].attn = TwoProjections()
        for refused, message in (
            (build("videomaev2", cos_attn=True), "fused_attention.*block 0.*scale"),
            (build_pretraining("videomaev2", cos_attn=True), "fused_attention.*block 0.*scale"),
            (make_model(VideoMAEForVideoClassification), "fused_attention"),  # another host
            (model, "fused_attention"),
        ):
            with unchanged(refused), pytest.raises(ValueError, match=message):
                et.patch_videomae(refused, fused_attention=True)
        assert et.patch_videomae(model)(clips(dtype=torch.float32)).shape == (2, 5)  # unfused, any attention will do

    @pytest.mark.parametrize("family", ["videomae", "mvd"])
    def test_counts_alike(self, family):
        model = FineTuningModel(family, embed_dim=48, mlp_ratio=3.0, num_classes=7, use_mean_pooling=False).eval()
        counts = [et.count_flops(et.patch_videomae(model, fused_attention=fused)) for fused in (False, True)]
        assert counts[0] == counts[1]
        assert counts[1].total == pytest.approx(counted_by_torch(model, clips(1, dtype=torch.float32)), rel=0.005)

    def test_with_a_frame_sampler_and_drop_path_makes_one_graph(self):
        torch._dynamo.reset()
        counters.clear()
        model = build(img_size=32, depth=1, attn_drop_rate=0.1).train()
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5), fused_attention=True, drop_path=0.3)
        compiled, videos = torch.compile(model, fullgraph=True, backend="eager"), clips(2, 12, (32, 32), torch.float32)
        logits = [compiled(videos) for _ in range(3)]
        logits[-1].sum().backward()
        assert len(gradients(model)) == len(list(model.parameters()))
        assert len({each.sum().item() for each in logits}) > 1
        assert counters["stats"]["unique_graphs"] == 1


class TestDropPath:
    @pytest.mark.parametrize("own", [0.0, 0.9])
    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_rates_rise_linearly_and_whole_branches_are_dropped(self, kind, own):
        depth, rate, batch = 3, 0.6, 400
        model = kind(depth=depth, drop_path_rate=own, img_size=32, num_frames=4).train()
        et.patch_videomae(model, et.ReRoSelector(1.0), mask_ratio=0.5, drop_path=rate)
        seen: list[tuple[int, Tensor, Tensor]] = []
        for index, block in enumerate(getattr(model, "encoder", model).blocks):
            block.drop_path.register_forward_hook(
                lambda module, args, output, index=index: seen.append((index, args[0], output))
            )
        with torch.no_grad():
            model(clips(batch, 4, (32, 32), torch.float32))
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
            build_pretraining().encoder,  # its own forward wants a mask, so it is no classifier
            et.patch_videomae(build_pretraining()).encoder,
            with_other_projection(nn.Conv2d(3, 32, 16, 16)),
            with_other_projection(nn.Linear(1536, 32)),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_unrelated_modules(self, model):
        with unchanged(model), pytest.raises(TypeError, match="patch"):
            et.patch_videomae(model)

    @pytest.mark.parametrize(
        ("model", "setting", "message"),
        [
            (build(num_frames=2), {}, "two time steps"),
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


@pytest.mark.parametrize("family", PRE_TRAINING)
def test_unpatched_pretraining_is_counted_with_videomaes_tubes(family):
    model = PreTrainingModel(family, embed_dim=48, mlp_ratio=3.0, decoder_depth=3).eval()
    tubes = torch.arange(48)[None] % 12 >= 2  # VideoMAE's hide ⌊0.9 · 12⌋ places
    counted = counted_by_torch(model, clips(1, dtype=torch.float32), tubes)
    assert et.count_flops(model).total == pytest.approx(counted, rel=0.005)
