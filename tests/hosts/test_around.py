"""What others build around a patched model, and into it: either it works with live settings, or nothing has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from family_models import FineTuningModel, PreTrainingModel
from host_case import unchanged
from host_contract import kinds
from peft import LoraConfig, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et


def family(**options: Any) -> FineTuningModel:
    return FineTuningModel("mme" if "mask_ratio" in options else "videomae", img_size=32, num_classes=5, **options)


class TestCopiesThatPeftMakes:
    @pytest.fixture
    def wrapped(self, make_model):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), et.ReRoSelector(0.5))
        return get_peft_model(model, LoraConfig(target_modules=["classifier"], modules_to_save=["videomae"])).eval()

    def test_live_settings_reach_them(self, wrapped, make_clips):
        model = wrapped.get_base_model()
        clips = make_clips(model)
        for ratio, kept in ((0.25, 12), (0.75, 36)):
            model.everest.selector.keep_ratio = ratio
            assert model.config.everest["selector"]["keep_ratio"] == ratio
            assert wrapped(pixel_values=clips, output_hidden_states=True).hidden_states[0].shape[1] == kept
            selection = et.select_tokens(wrapped, clips)
            assert selection.kept.shape == (2, kept)
            again = wrapped(pixel_values=clips, token_selection=selection).logits
            assert torch.equal(wrapped(pixel_values=clips).logits, again)

    def test_they_are_counted_and_given_back(self, wrapped, make_model, make_clips):
        plain = make_model(VideoMAEForVideoClassification)
        clips, whole, half = make_clips(plain), et.count_flops(plain), et.count_flops(wrapped)
        assert half.patch_embedding == whole.patch_embedding == 48 * 32 * 2 * 16 * 16 * 3
        assert half.encoder < 0.5 * whole.encoder
        et.unpatch_videomae(wrapped)
        torch.testing.assert_close(wrapped(pixel_values=clips).logits, plain(clips).logits)
        assert not [name for name, module in wrapped.named_modules() if hasattr(module, "_everest_bases")]
        et.patch_videomae(wrapped, et.ReRoSelector(0.5))
        assert et.select_tokens(wrapped, clips).kept.shape == (2, 24)

    def test_a_part_that_is_copied_alone_follows_its_model(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), et.ReRoSelector(0.5))
        model.videomae = copy.deepcopy(model.videomae)
        model.everest.selector.keep_ratio = 0.25
        clips = make_clips(model)
        assert model(clips, output_hidden_states=True).hidden_states[0].shape[1] == 12


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FSDP.state_dict_type:FutureWarning")
@pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
def test_fsdp1_moves(make_model, make_clips, cls, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = et.patch_videomae(make_model(cls))
        clips = make_clips(model)
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        torch.manual_seed(1)
        expected = sharded(clips)[0]
        for move in (lambda: sharded.to("cpu"), sharded.float, sharded.cpu):
            move()
            torch.manual_seed(1)
            assert torch.equal(sharded(clips)[0], expected)
    finally:
        dist.destroy_process_group()


class TestPartsOfAModel:
    def test_a_model_of_ones_own_around_a_backbone(self, make_model, make_clips):
        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.videomae, self.head = make_model(VideoMAEModel), nn.Linear(32, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.videomae(x).last_hidden_state.mean(1))

        model = Classifier()
        clips = make_clips(model.videomae)
        with unchanged(model), pytest.raises(TypeError, match=r"Classifier .*patch_videomae\(model\.videomae\)"):
            et.patch_videomae(model)
        et.patch_videomae(model.videomae, et.ReRoSelector(0.5))
        assert model(clips).shape == (2, 5)

    def test_neither_a_part_nor_a_whole_around_one_is_patched_twice(self, make_model):
        whole, around = make_model(VideoMAEForVideoClassification), make_model(VideoMAEForVideoClassification)
        et.patch_videomae(whole)
        et.patch_videomae(around.videomae)
        for model, what in ((whole.videomae, "the model that it is part of"), (around, "part videomae")):
            with unchanged(model), pytest.raises(TypeError, match=what):
                et.patch_videomae(model)
        with pytest.raises(ValueError, match="not patched"):
            et.unpatch_videomae(whole.videomae)


class TestAllOrNothing:
    @kinds()
    @pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
    def test_a_patch_that_fails_at_its_end(self, case, patched):
        model = case.build(0)
        if patched:
            case.patch(model, 0.5)
        block, parameters = model.get_submodule(case.blocks)[1], list(model.parameters())

        class Failing(type(block)):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                raise RuntimeError("on purpose")

        block.__class__ = Failing
        with unchanged(model), pytest.raises(TypeError, match="on purpose"):
            case.patch(model, et.RandomSelector(0.25), drop_path=0.1, mask_ratio=0.9)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        if patched:
            assert model.everest.selector.keep_ratio == 0.5

    def test_a_forward_that_folds_its_tokens_into_a_grid(self):
        class Folding(FineTuningModel):
            def run_tokens(self, x: Tensor) -> Tensor:
                return super().run_tokens(x.unflatten(1, (-1, 4)).mean(2))  # four places a step

        model = Folding("videomae", img_size=32, num_classes=5)
        with (
            unchanged(model),
            pytest.raises(TypeError, match="Folding runs over all tokens of a clip alone: over half of them"),
        ):
            et.patch_videomae(model)

    def test_a_forward_that_needs_more_than_clips(self):
        class Detector(FineTuningModel):
            def forward(self, clips: Tensor, boxes: Tensor) -> Tensor:
                return self.run_head(self.forward_features(clips)) + boxes

        model = Detector("videomae", img_size=32, num_classes=5)
        with unchanged(model), pytest.raises(TypeError, match=r"Detector doesn't run over one clip.*boxes"):
            et.patch_videomae(model)

    def test_a_pretraining_objective_of_its_own(self):
        class Adaptive(PreTrainingModel):
            def forward(self, x: Tensor, mask: Tensor, decode_mask: Tensor, reward: Tensor) -> Any:
                return super().forward(x, mask, decode_mask)

        with pytest.raises(TypeError, match=r"forward needs x, mask, decode_mask, reward: its objective"):
            et.patch_videomae(Adaptive("videomae", img_size=32))

    def test_an_encoder_that_chooses_its_tokens(self):
        model = PreTrainingModel("videomae", img_size=32)
        own = type(model.encoder)

        class Choosing(own):  # type: ignore[valid-type, misc]
            def forward(self, x: Tensor) -> Any:
                return super().forward(x, torch.rand(len(x), 4) > 0.5)

        model.encoder.__class__ = Choosing
        with pytest.raises(TypeError, match=r"encoder\.forward takes no mask"):
            et.patch_videomae(model)

    def test_a_model_whose_code_wants_values_is_tried_with_them(self):
        class Reading(FineTuningModel):
            def run_head(self, x: Tensor) -> Tensor:
                assert x.sum().item() == x.sum().item()
                return super().run_head(x)

        model = Reading("videomae", img_size=32, num_classes=5).train()
        state = torch.get_rng_state()
        et.patch_videomae(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())

    @kinds()
    def test_a_patched_model_is_freed_at_once(self, case):
        gc.disable()
        try:
            model = case.patch(case.build(0))
            twin = pickle.loads(pickle.dumps(model))
            assert twin.everest.root is twin
            dead = [weakref.ref(parameter) for each in (model, twin) for parameter in each.parameters()]
            del model, twin
            assert not [one for one in dead if one() is not None]
        finally:
            gc.enable()


class TestTokensDroppedTwice:
    def test_mmes_own_mask_ratio(self):
        model = FineTuningModel("mme", img_size=32, num_classes=5)
        model.mask_ratio = 0.5
        with unchanged(model), pytest.raises(ValueError, match=r"mask_ratio is 0\.5.*set it to 0"):
            et.patch_videomae(model)
        model.mask_ratio = 0.0
        et.patch_videomae(model)


class TestHooksOfTheUser:
    def test_patching_doesnt_run_them(self):
        heard: list[str] = []
        model = family()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: heard.append(name))
        et.patch_videomae(model)
        assert not heard
        model(torch.randn(1, 3, 8, 32, 32))
        assert "patch_embed.proj" in heard


class TestWhatCannotBeTraced:
    def test_scripting(self, make_model):
        for model in (et.patch_videomae(make_model(VideoMAEForPreTraining)), et.patch_videomae(family())):
            with pytest.raises(TypeError, match=r"torch\.jit\.trace or torch\.export"):
                torch.jit.script(model)

    def test_symbolic_tracing(self):
        model = et.patch_videomae(family())
        with pytest.raises(TypeError, match=r"torch\.fx can't trace .* torch\.export"):
            torch.fx.symbolic_trace(model)

    def test_a_timm_embedding_outside_a_forward(self):
        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
        clips = torch.randn(1, 3, 16, 32, 32)
        et.patch_videomae(model)
        for call in (lambda: model.patch_embed(clips), lambda: model._pos_embed(torch.randn(1, 4, 32))):
            with pytest.raises(RuntimeError, match="forward_features or forward_intermediates"):
                call()
        assert model.forward_features(clips).shape[0] == 1


class TestCustomSelectors:
    @pytest.mark.parametrize(
        ("chosen", "message"),
        [([0, 0, 3], "without repeats"), ([0, 3, 48], r"0…47 .* got 0…48"), ([-1, 3, 5], r"got -1…5")],
    )
    def test_positions_that_are_none(self, make_model, make_clips, chosen, message):
        def selector(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
            return torch.tensor(chosen, device=tokens.device).expand(tokens.shape[0], -1)

        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), selector)
        with pytest.raises(ValueError, match=message):
            model(make_clips(model))


def test_an_offloaded_model_is_patched_first_and_dispatched_then(make_model, make_clips, tmp_path):
    model = make_model(VideoMAEForVideoClassification)
    clips = make_clips(model)
    places = {"videomae": "disk", "fc_norm": "cpu", "classifier": "cpu"}
    plain = accelerate.dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path / "c")
    if not torch.allclose(plain(clips).logits, model(clips).logits):
        pytest.skip("these transformers and accelerate lose an unpatched VideoMAE's numbers by offloading it")
    expected = et.patch_videomae(copy.deepcopy(model), et.ReRoSelector(0.5))(clips).logits
    patched = et.patch_videomae(copy.deepcopy(model), et.ReRoSelector(0.5))
    dispatched = accelerate.dispatch_model(patched, places, main_device="cpu", offload_dir=tmp_path / "a")
    torch.testing.assert_close(dispatched(clips).logits, expected)
    other = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "b")
    with pytest.raises(TypeError, match=r"without device_map, call patch_videomae, then accelerate's dispatch_model"):
        et.patch_videomae(other)
