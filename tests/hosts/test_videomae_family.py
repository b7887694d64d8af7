"""Patched models of the VideoMAE family's own classes, against the unpatched reference modules run by hand."""

from __future__ import annotations

import copy
import inspect
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


def features_by_hand(plain: Any, clips: Tensor, chosen: Tensor) -> Tensor:
    """The unpatched model's features of the chosen tokens alone; MME's shuffle is the same at every call."""
    tokens = plain.patch_embed(clips)
    tokens = tokens + plain.pos_embed.detach().to(tokens.dtype)
    torch.manual_seed(11)
    return plain.run_tokens(torch.stack([clip[row] for clip, row in zip(tokens, chosen, strict=True)]))


def logits_by_hand(plain: Any, clips: Tensor, chosen: Tensor) -> Tensor:
    return plain.run_head(features_by_hand(plain, clips, chosen))


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


def pixels_of(model: Any, clips: Tensor, tokens: Tensor) -> Tensor:
    """Which values of the clips belong to the tokens (B, M): bool like `clips`, by plain loops."""
    (_, h, w), patches = grid_of(model), patch_embed_of(model)
    frames, patch = patches.tubelet_size, patches.patch_size[0]
    found = torch.zeros_like(clips, dtype=torch.bool)
    for clip, row in enumerate(tokens.tolist()):
        for token in row:
            i, y, x = frames * (token // (h * w)), patch * (token // w % h), patch * (token % w)
            found[clip, :, i : i + frames, y : y + patch, x : x + patch] = True
    return found


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
        same_to_rounding(run(patched, clips), run(plain, clips))
        same_to_rounding(run(patched.forward_features, clips), run(plain.forward_features, clips))
        same_to_rounding(run(patched.float(), clips.float()), run(plain.float(), clips.float()))

    @pytest.mark.parametrize("keep_ratio", [0.25, 0.6])
    @pytest.mark.parametrize(("family", "options"), FINE_TUNING)
    def test_selected_tokens_alone_are_run(self, family, options, keep_ratio):
        plain = build(family, **options).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(keep_ratio))
        clips = clips_for(plain)
        chosen = et.select_tokens(patched, clips).visible
        assert chosen.shape == (2, int(keep_ratio * math.prod(grid_of(plain))))
        expected = features_by_hand(plain, clips, chosen)
        assert not torch.allclose(expected, run(plain.forward_features, clips)), "dropping tokens must change something"
        torch.testing.assert_close(run(patched.forward_features, clips), expected, **EXACT)
        torch.testing.assert_close(run(patched, clips), logits_by_hand(plain, clips, chosen), **EXACT)

    @pytest.mark.parametrize(("family", "options"), FINE_TUNING)
    def test_a_given_selection_is_run(self, family, options):
        plain = build(family, **options).double()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips, selection = clips_for(plain), random_selection(plain, visible=5)
        expected = logits_by_hand(plain, clips, selection.visible)
        torch.testing.assert_close(run(patched, clips, token_selection=selection), expected, **EXACT)
        own = features_by_hand(plain, clips, et.select_tokens(patched, clips).visible)
        torch.testing.assert_close(run(patched.forward_features, clips), own, **EXACT)  # given once, not kept

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

    def test_the_most_changed_tokens_are_kept_by_default(self):
        plain = build()
        clips = clips_for(plain)
        tokens = plain.patch_embed(clips).unflatten(1, (4, 12))  # before the positions
        change = (tokens[:, 1:] - tokens[:, :-1]).norm(dim=-1)
        importance = torch.cat([change[:, :1], change], dim=1).flatten(1)
        et.patch_videomae(plain)
        assert plain.everest.selector.keep_ratio == 0.6
        selection = et.select_tokens(plain, clips)
        torch.testing.assert_close(selection.importance, importance)
        assert selection.grid == (4, 3, 4)
        assert selection.target is None
        assert selection.visible.shape == (2, 28)  # ⌊0.6 · 48⌋
        for row, kept in zip(importance, selection.visible.tolist(), strict=True):
            others = sorted(set(range(48)) - set(kept))
            assert row[kept].min() >= row[others].max()

    def test_selecting_runs_no_block(self):
        model = et.patch_videomae(build())
        model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("select_tokens ran the encoder"))
        et.select_tokens(model, clips_for(model))

    def test_the_settings_are_live(self):
        plain = build().double()
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = clips_for(plain)
        patched.everest.selector.keep_ratio = 1.0
        torch.testing.assert_close(patched(clips), plain(clips), **EXACT)
        patched.everest.selector = et.RandomSelector(0.5)
        torch.manual_seed(5)
        chosen = et.select_tokens(patched, clips).visible
        torch.manual_seed(5)
        torch.testing.assert_close(patched(clips), logits_by_hand(plain, clips, chosen), **EXACT)

    def test_their_methods_work(self):
        model = et.patch_videomae(build())
        assert model.get_num_layers() == 2
        assert model.no_weight_decay() == {"pos_embed", "cls_token"}
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        assert model(clips_for(model)).shape == (2, 7)

    def test_unselected_pixels_may_even_be_nan(self):
        model = et.patch_videomae(build())
        selection = random_selection(model, visible=8)
        clips = clips_for(model)
        expected = model(clips, token_selection=selection)
        broken = clips.masked_fill(~pixels_of(model, clips, selection.visible), math.nan)
        logits = model(broken, token_selection=selection)
        assert torch.equal(logits, expected)
        logits.sum().backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    @pytest.mark.parametrize("where", ["patch_embed", "patch_embed.proj"])
    def test_a_hook_that_changes_the_embedding_is_obeyed(self, where):
        plain = build().double()
        plain.get_submodule(where).register_forward_hook(lambda module, args, output: output * 3)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))
        clips = clips_for(plain)
        chosen = et.select_tokens(patched, clips).visible
        (expected := logits_by_hand(plain, clips, chosen)).sum().backward()
        (actual := patched(clips)).sum().backward()
        torch.testing.assert_close(actual, expected, **EXACT)
        assert_same_gradients(patched, plain, **EXACT)

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

    def test_arguments_by_name(self):
        model = et.patch_videomae(build())
        clips = clips_for(model)
        original = inspect.signature(FineTuningModel.forward).parameters
        assert torch.equal(model(**{list(original)[1]: clips}), model(clips))  # "x"


class TestPositions:
    @pytest.mark.parametrize("learnable", [True, False])
    def test_the_attribute_is_the_full_table_outside_of_a_forward(self, learnable):
        plain = build(use_learnable_pos_emb=learnable)
        patched = et.patch_videomae(copy.deepcopy(plain))
        inside = []
        patched.pos_drop.register_forward_hook(lambda *_: inside.append(patched.pos_embed))
        clips = clips_for(plain)
        for _ in range(2):
            chosen = et.select_tokens(patched, clips).visible
            patched(clips)
            assert torch.equal(patched.pos_embed, plain.pos_embed)
            assert isinstance(patched.pos_embed, nn.Parameter) == learnable
        assert [table.shape for table in inside] == [(2, 28, 32)] * 2
        assert torch.equal(inside[0], torch.stack([plain.pos_embed[0, row] for row in chosen]))
        assert patched.state_dict().keys() == plain.state_dict().keys()

    @pytest.mark.parametrize("learnable", [True, False])
    def test_an_error_inside_leaves_the_full_table(self, learnable):
        plain = build(use_learnable_pos_emb=learnable).double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)

        def out_of_memory(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = patched.blocks[1].register_forward_pre_hook(out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            patched(clips)
        hook.remove()
        assert torch.equal(patched.pos_embed, plain.pos_embed)
        assert isinstance(patched.pos_embed, nn.Parameter) == learnable
        torch.testing.assert_close(patched(clips), plain(clips), **EXACT)
        assert patched.state_dict().keys() == plain.state_dict().keys()

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


def description(model: Any) -> dict[str, Any]:
    """What unpatching must give back: each module's class, its attributes' names and its hooks' number."""
    return {
        name: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


SETTINGS = [
    pytest.param({}, id="default"),
    pytest.param({"drop_path": 0.5, "fused_attention": True}, id="drop-path-fused"),
    pytest.param({"frame_sampler": et.InfoFrameSampler(1.5)}, id="frame-sampler"),
]


class TestPatchingAndUnpatching:
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_fine_tuning(self, family, settings):
        model = build(family)
        clips, keys, before = clips_for(model), list(model.state_dict()), description(model)
        expected = run(model, clips)
        assert et.patch_videomae(model, **settings) is model
        assert list(model.state_dict()) == keys
        assert isinstance(model, FineTuningModel)
        assert type(model).__name__ == "FineTuningModel"
        frames = 12 if "frame_sampler" in settings else 8
        assert not torch.equal(run(model, clips_for(model, frames=frames)), expected)
        assert et.unpatch_videomae(model) is model
        assert type(model) is FineTuningModel
        assert description(model) == before
        assert torch.equal(run(model, clips), expected)
        with pytest.raises(ValueError, match="not patched"):
            et.unpatch_videomae(model)

    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining(self, family, settings):
        model = build_pretraining(family)
        clips, keys, before = clips_for(model), list(model.state_dict()), description(model)
        mask = mask_of(random_selection(model, visible=8).visible, 48)
        expected = model(clips, mask)
        expected = expected[0] if family == "everest" else expected
        et.patch_videomae(model, **settings)
        assert list(model.state_dict()) == keys
        assert isinstance(model, PreTrainingModel)
        assert type(model).__name__ == "PreTrainingModel"
        assert model.everest.task == "pretraining"
        model(clips_for(model, frames=12 if "frame_sampler" in settings else 8))
        et.unpatch_videomae(model)
        assert type(model) is PreTrainingModel
        assert description(model) == before
        actual = model(clips, mask)
        if family == "everest":
            actual, masks = actual
            assert masks == (None, None)
        assert torch.equal(actual, expected)

    def test_other_models_of_the_class_are_left_alone(self):
        models = [build() for _ in range(3)]
        clips = clips_for(models[0])
        expected = models[0](clips)
        for model in models[:2]:
            et.patch_videomae(model, et.ReRoSelector(0.5))
        patched = models[1](clips)
        assert torch.equal(models[2](clips), expected)
        et.unpatch_videomae(models[0])
        assert torch.equal(models[0](clips), expected)
        assert torch.equal(models[1](clips), patched)
        assert not torch.equal(patched, expected)

    def test_patching_again_replaces_the_patch(self):
        model = build(drop_path_rate=0.2).train()
        before = description(model)
        et.patch_videomae(model, et.ReRoSelector(0.5), drop_path=0.5, fused_attention=True)
        et.patch_videomae(model, et.ReRoSelector(0.25))
        assert et.select_tokens(model, clips_for(model)).visible.shape == (2, 12)
        with Attentions() as attentions:
            model(clips_for(model))
        assert attentions.dropouts == []
        et.unpatch_videomae(model)
        assert description(model) == before
        assert [block.drop_path.drop_prob for block in model.blocks[1:]] == pytest.approx([0.2])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_copies_are_patched_and_independent(self, family, settings, copied):
        plain = build(family)
        model = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5), **settings)
        clips = clips_for(model, frames=12 if "frame_sampler" in settings else 8)
        expected = run(model, clips)
        other = copied(model)
        assert torch.equal(run(other, clips), expected)
        assert isinstance(other, FineTuningModel)
        other.everest.selector.keep_ratio = 0.25
        with torch.no_grad():
            other.head.bias.add_(100)
        assert torch.equal(run(model, clips), expected)
        assert et.select_tokens(other, clips).visible.shape == (2, 12)
        with torch.no_grad():
            other.head.bias.copy_(plain.head.bias)
        et.unpatch_videomae(other)
        assert type(other) is FineTuningModel
        assert torch.equal(run(other, clips_for(plain)), run(plain, clips_for(plain)))
        assert torch.equal(run(model, clips), expected)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_copies_of_pretraining_models(self, family, copied):
        model = et.patch_videomae(build_pretraining(family))
        clips = clips_for(model)
        expected = run(model, clips)
        other = copied(model)
        actual = run(other, clips)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        et.unpatch_videomae(other)
        assert type(other) is PreTrainingModel
        torch.testing.assert_close(run(model, clips), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("first", ["eval", "inference"])
    def test_training_after_an_evaluation(self, first):
        plain = build()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        with torch.inference_mode() if first == "inference" else torch.no_grad():
            patched(clips)
        for model in (plain, patched):
            model(clips).sum().backward()
        assert_same_gradients(patched, plain)


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
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_keeping_everything(self, same_to_rounding, family, dtype):
        plain = build_pretraining(family).to(dtype)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        prediction, (hidden, _) = run(patched, clips)
        expected = plain(clips, hidden)
        same_to_rounding(prediction, expected[0] if family == "everest" else expected)

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

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_arguments_by_name(self, family):
        model = et.patch_videomae(build_pretraining(family))
        clips, mask = clips_for(model), torch.ones(2, 48, dtype=torch.bool)
        torch.testing.assert_close(run(model, x=clips, mask=mask), run(model, clips), rtol=0, atol=0)

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

    def test_unselected_pixels_may_even_be_nan(self):
        model = et.patch_videomae(build_pretraining())
        selection = random_selection(model, visible=4, kept=14)
        clips = clips_for(model)
        expected, _ = model(clips, token_selection=selection)
        broken = clips.masked_fill(~pixels_of(model, clips, selection.visible), math.nan)
        prediction, _ = model(broken, token_selection=selection)
        assert torch.equal(prediction, expected)
        prediction.sum().backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

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


class TestMetaDevice:
    """Their tables are plain tensors, which stay on the CPU with their values when a model is built on meta."""

    def test_fine_tuning(self):
        plain = build()
        model = et.patch_videomae(copy.deepcopy(plain).to("meta"), et.ReRoSelector(0.5))
        model.to_empty(device="cpu").load_state_dict(plain.state_dict())
        clips = clips_for(plain)
        assert torch.equal(model(clips), et.patch_videomae(plain, et.ReRoSelector(0.5))(clips))

    def test_pretraining(self):
        plain = build_pretraining()
        model = et.patch_videomae(copy.deepcopy(plain).to("meta"))
        model.to_empty(device="cpu").load_state_dict(plain.state_dict())
        clips = clips_for(plain)
        torch.testing.assert_close(run(model, clips), run(et.patch_videomae(plain), clips), rtol=0, atol=0)


class TestFrameSampler:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_fine_tuning_runs_the_drawn_steps_at_positions_from_0(self, family, training):
        plain = build(family).double().train(training)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(1.5))
        clips = clips_for(plain, frames=12)
        torch.manual_seed(11)
        selection = et.select_tokens(patched, clips)
        assert selection.steps.shape == (2, 4)
        short = drawn_frames(clips, selection.steps)
        expected = logits_by_hand(plain, short, selection.visible)
        torch.testing.assert_close(run(patched, clips, token_selection=selection), expected, **EXACT)
        if family != "mme":  # whose shuffle would draw from another place of the random sequence
            torch.testing.assert_close(run(patched, clips), expected, **EXACT)

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

    @pytest.mark.parametrize("model", [build(), build_pretraining()], ids=["fine-tuning", "pre-training"])
    @pytest.mark.parametrize("frames", [8, 10, 14])
    def test_other_numbers_of_frames(self, model, frames):
        model = et.patch_videomae(copy.deepcopy(model), frame_sampler=et.InfoFrameSampler(1.5))
        with pytest.raises(ValueError, match=rf"\b12\b.*\b{frames}\b"):
            model(clips_for(model, frames=frames))


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
        with Attentions() as attentions:
            model(clips)
            et.patch_videomae(model, fused_attention=True)
            assert attentions.dropouts == []
            model(clips)
            assert len(attentions.dropouts) == 2
            et.unpatch_videomae(model)(clips)
            assert len(attentions.dropouts) == 2

    def test_cosine_attention_is_refused(self):
        for model in (build("videomaev2", cos_attn=True), build_pretraining("videomaev2", cos_attn=True)):
            before = description(model)
            with pytest.raises(ValueError, match=r"fused_attention.*block 0.*scale"):
                et.patch_videomae(model, fused_attention=True)
            assert description(model) == before

    def test_another_attention_is_refused(self):
        class TwoProjections(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)

            def forward(self, x: Tensor) -> Tensor:
                return self.q(x)

        model = build()
        model.blocks[1].attn = TwoProjections()
        before = description(model)
        with pytest.raises(ValueError, match="fused_attention"):
            et.patch_videomae(model, fused_attention=True)
        assert description(model) == before
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

    def test_eval_is_unchanged(self):
        plain = build().double()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0), drop_path=0.9)
        torch.testing.assert_close(patched(clips_for(plain)), plain(clips_for(plain)), **EXACT)
        assert patched.state_dict().keys() == plain.state_dict().keys()

    @pytest.mark.parametrize("rate", [-0.1, 1.0, True, "0.1"])
    def test_bad_rates(self, rate):
        with pytest.raises(ValueError, match="drop_path"):
            et.patch_videomae(build(), drop_path=rate)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("family", ["videomae", "videomaev2", "mvd", "everest"])
    def test_fine_tuning(self, family, fused):
        plain = build(family, checkpointed=True).double().train()
        patched = et.patch_videomae(copy.deepcopy(plain), drop_path=0.5, fused_attention=fused)
        without = copy.deepcopy(patched)
        setattr(without, "with_cp" if family == "videomaev2" else "use_checkpoint", False)
        clips, runs = clips_for(plain, batch=4), []
        patched.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.append("patched"))
        without.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.append("without"))
        for model in (patched, without):
            run(model, clips).sum().backward()
        assert (runs.count("patched"), runs.count("without")) == (2, 1)
        assert_same_gradients(patched, without, **EXACT)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining(self, family):
        flag = "with_cp" if family == "videomaev2" else "use_checkpoint"
        patched = et.patch_videomae(build_pretraining(family, checkpointed=True).double().train(), drop_path=0.5)
        without = copy.deepcopy(patched)
        setattr(without.encoder, flag, False)
        setattr(without.decoder, flag, False)
        clips, runs = clips_for(patched, batch=4), []
        for stack in (patched.encoder, patched.decoder):
            stack.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.append("patched"))
        for model in (patched, without):
            run(model, clips)[0].square().sum().backward()
        assert runs == ["patched"] * 4
        assert_same_gradients(patched, without, **EXACT)


class TestPrecision:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_autocast(self, family):
        plain = build(family)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        outputs = []
        for model in (plain, patched):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(run(model, clips))
            outputs[-1].float().square().sum().backward()
        assert torch.equal(*outputs)
        assert outputs[1].dtype == outputs[0].dtype
        for name, gradient in gradients(plain).items():
            assert gradients(patched)[name].dtype == torch.float32
            difference = (gradients(patched)[name] - gradient).norm() / gradient.norm()
            assert difference < 0.03, name

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_autocast_in_pretraining(self, family):
        plain = build_pretraining(family)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction, (hidden, _) = run(patched, clips)
            expected = plain(clips, hidden)
        expected = expected[0] if family == "everest" else expected
        assert prediction.dtype == expected.dtype
        assert torch.equal(prediction, expected)
        for output in (prediction, expected):
            output.float().square().sum().backward()
        for name, gradient in gradients(plain).items():
            difference = (gradients(patched)[name] - gradient).norm() / gradient.norm()
            assert difference < 0.03, name

    def test_selecting_first_costs_no_gradient_under_autocast(self):
        model = et.patch_videomae(build())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            selection = et.select_tokens(model, clips_for(model))  # casts the projection's weight under no_grad
            model(clips_for(model))
            model(clips_for(model), token_selection=selection).float().sum().backward()
        assert len(gradients(model)) == len(list(model.parameters()))

    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_weights_of_half_precision(self, kind):
        plain = kind().bfloat16()
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        clips = clips_for(plain)
        assert clips.dtype == torch.bfloat16
        if kind is build:
            assert torch.equal(patched(clips), plain(clips))
        else:
            prediction, (hidden, _) = patched(clips)
            assert torch.equal(prediction, plain(clips, hidden))

    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_moving_after_patching(self, kind):
        model = et.patch_videomae(kind())
        clips = clips_for(model)
        expected = run(model, clips)
        actual = run(model.double(), clips.double())
        if kind is build_pretraining:
            expected, actual = expected[0], actual[0]
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=1e-3)


BATCHES = [
    pytest.param((2, 3, 6, 48, 64), r"\b8\b.*\(2, 3, 6, 48, 64\)", id="frames"),
    pytest.param((2, 3, 8, 64, 48), r"\b48, 64\b.*\(2, 3, 8, 64, 48\)", id="rows-and-columns-swapped"),
    pytest.param((2, 3, 8, 48, 80), r"\b64\b.*\(2, 3, 8, 48, 80\)", id="width"),
    pytest.param((2, 1, 8, 48, 64), r"\b3\b.*\(2, 1, 8, 48, 64\)", id="channels"),
    pytest.param((2, 8, 3, 48, 64), r"\b3, 8\b.*\(2, 8, 3, 48, 64\)", id="transformers-order"),
    pytest.param((3, 8, 48, 64), r"\(3, 8, 48, 64\)", id="no-batch"),
]


class TestWrongInput:
    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_a_misspelt_argument(self, kind):
        model = et.patch_videomae(kind())
        with pytest.raises(TypeError, match="selection"):  # not swallowed with the ignored masks
            model(clips_for(model), selection=random_selection(model, visible=4, kept=14))

    @pytest.mark.parametrize(("shape", "message"), BATCHES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_shapes(self, family, shape, message):
        model = et.patch_videomae(build(family))
        for call in (model, model.forward_features, lambda clips: et.select_tokens(model, clips)):
            with pytest.raises(ValueError, match=message):
                call(torch.randn(shape))

    @pytest.mark.parametrize(("shape", "message"), BATCHES)
    def test_shapes_in_pretraining(self, shape, message):
        model = et.patch_videomae(build_pretraining())
        with pytest.raises(ValueError, match=message):
            model(torch.randn(shape))

    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_kinds(self, kind):
        model = et.patch_videomae(kind())
        with pytest.raises(ValueError, match="uint8"):
            model(torch.zeros(2, 3, 8, 48, 64, dtype=torch.uint8))
        with pytest.raises(TypeError, match="list"):
            model([torch.zeros(3, 8, 48, 64)] * 2)

    @pytest.mark.parametrize("kind", [build, build_pretraining])
    def test_selections(self, kind):
        model = et.patch_videomae(kind())
        clips, good = clips_for(model), random_selection(model, visible=4, kept=14)
        with pytest.raises(TypeError, match="Tensor"):
            model(clips, token_selection=good.visible)
        bad = [
            (et.TokenSelection(good.visible[:1], good.target[:1], good.grid), r"\b1 clips"),
            (et.TokenSelection(good.visible, good.target, (4, 4, 3)), r"\(4, 4, 3\)"),
            (et.TokenSelection(good.visible.int(), good.target, good.grid), "int32"),
            (et.TokenSelection(good.visible, good.target, good.grid, steps=torch.arange(4).expand(2, 4)), "steps"),
        ]
        if kind is build_pretraining:
            bad.append((et.TokenSelection(good.visible, None, good.grid), "targets"))
        for selection, message in bad:
            with pytest.raises(ValueError, match=message):
                model(clips, token_selection=selection)


def with_other_projection(projection: nn.Module) -> Any:
    model = build()
    model.patch_embed.proj = projection
    return model


class TestRefusals:
    @pytest.mark.parametrize(
        "model", [MMEPreTrainingModel(), MVDPreTrainingModel(), MVDPreTrainingModel(use_cls_token=True)]
    )
    def test_models_that_predict_other_things_than_pixels(self, model):
        before = description(model)
        for function in (et.patch_videomae, et.count_flops):
            with pytest.raises(TypeError, match="pixels"):
                function(model)
        assert description(model) == before

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
        before = description(model)
        with pytest.raises(TypeError, match="patch"):
            et.patch_videomae(model)
        assert description(model) == before

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
        before = description(model)
        with pytest.raises(ValueError, match=next(iter(setting))):
            et.patch_videomae(model, **setting)
        assert description(model) == before

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
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            *((family, {}) for family in FAMILIES),
            ("mvd", {"use_cls_token": True}),
            ("videomae", {"num_frames": 16, "use_mean_pooling": False}),
            ("videomaev2", {"cos_attn": True}),
        ],
        ids=str,
    )
    def test_fine_tuning(self, family, options):
        model = FineTuningModel(family, embed_dim=48, mlp_ratio=3.0, num_classes=7, **options).eval()
        clips = clips_for(model, batch=1)
        counts = []
        fused = {"fused_attention": "cos_attn" not in options}
        for settings in (None, {}, {"selector": et.RandomSelector(0.25)}, fused):
            if settings is not None:
                et.patch_videomae(model, **settings)
            counts.append(counted_by_torch(model, clips))
            assert et.count_flops(model).total == pytest.approx(counts[-1], rel=0.005)
        assert counts[2] < counts[1] < counts[0]

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining(self, family):
        model = PreTrainingModel(family, embed_dim=48, mlp_ratio=3.0, decoder_depth=3).eval()
        clips = clips_for(model, batch=1)
        tubes = torch.arange(48)[None] % 12 >= 2  # VideoMAE's hide ⌊0.9 · 12⌋ places
        assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, clips, tubes), rel=0.005)
        for settings in ({}, {"selector": et.RandomSelector(1.0), "visible": et.TubeSelector(0.25)}):
            et.patch_videomae(model, **settings)
            assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, clips), rel=0.005)

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = FineTuningModel()
        on_cpu = et.count_flops(build())
        assert et.count_flops(model) == on_cpu
        assert et.count_flops(et.patch_videomae(model)) == et.count_flops(et.patch_videomae(build()))

    def test_frame_sampler(self):
        model = et.patch_videomae(build(), frame_sampler=et.InfoFrameSampler(1.5))
        clips = clips_for(model, batch=1, frames=12)
        assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, clips), rel=0.005)


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

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            *((family, {}) for family in FAMILIES),
            ("videomae", {"use_learnable_pos_emb": True}),
            ("mvd", {"use_cls_token": True}),
            ("videomae", {"checkpointed": True}),
        ],
        ids=str,
    )
    def test_fine_tuning_trains_in_one_graph(self, family, options):
        model = et.patch_videomae(build(family, **SMALL, **options), et.ReRoSelector(0.5)).train()
        twin = copy.deepcopy(model)
        clips = clips_for(model)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        expected, actual = model(clips), compiled(clips)
        torch.testing.assert_close(actual, expected)
        for output in (expected, actual):
            output.square().sum().backward()
        assert_same_gradients(twin, model, rtol=1e-4, atol=1e-4)
        compiled(clips_for(model, seed=2))
        assert counters["stats"]["unique_graphs"] == 1
        assert twin.pos_embed.shape == (1, 16, 32)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining_trains_in_one_graph(self, family):
        model = build_pretraining(family, **SMALL, decoder_depth=1).train()
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        twin = copy.deepcopy(model)
        clips = clips_for(model)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        selection = et.select_tokens(model, clips)
        (expected, expected_masks), (actual, masks) = (
            each(clips, token_selection=selection) for each in (model, compiled)
        )
        torch.testing.assert_close(actual, expected)
        assert all(map(torch.equal, masks, expected_masks))
        for output in (expected, actual):
            output.square().sum().backward()
        assert_same_gradients(twin, model, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", PRE_TRAINING)
    def test_pretraining_selects_in_the_graph(self, family):
        model = build_pretraining(family, **SMALL, decoder_depth=1)
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips, mask = clips_for(model, batch=1), torch.ones(1, 16, dtype=torch.bool)
        picks = []
        for _ in range(6):
            prediction, (hidden, target_mask) = compiled(clips, mask)
            assert prediction.shape == (1, 4, 1536)
            assert (~hidden).sum() == 4
            kept = (~hidden | ~target_mask).nonzero()[:, 1].tolist()
            assert kept == et.select_tokens(model, clips).kept[0].tolist()
            picks.append(tuple(hidden[0].tolist()))
        assert len(set(picks)) > 1  # still random in the graph
        assert counters["stats"]["unique_graphs"] == 1

    def test_each_new_keep_ratio_compiles_once(self):
        model = et.patch_videomae(build(**SMALL), et.ReRoSelector(0.5))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips, graphs = clips_for(model), []
        for keep_ratio in (0.5, 0.5, 0.75, 1.0, 0.5, 0.75):
            model.everest.selector.keep_ratio = keep_ratio
            torch.testing.assert_close(compiled(clips), model(clips))
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [1, 1, 2, 3, 3, 3]

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

    def test_patching_after_compiling(self):
        model = build(**SMALL)
        clips, plain = clips_for(model), copy.deepcopy(model)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(clips), plain(clips))
        assert et.patch_videomae(compiled, et.ReRoSelector(0.5)) is compiled
        expected = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))(clips)
        torch.testing.assert_close(compiled(clips), expected)
        et.unpatch_videomae(compiled)
        torch.testing.assert_close(compiled(clips), plain(clips))
