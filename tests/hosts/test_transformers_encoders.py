"""What V-JEPA 2, ViViT and joint TimeSformer have of their own; all else is the host contract's."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from host_case import state_of, unchanged
from host_contract import CASES
from host_models import VJEPA2Model, build_encoder
from torch import nn
from transformers import TimesformerConfig, TimesformerModel, Trainer, TrainingArguments

import everest_tokens as et

vjepa2 = pytest.mark.skipif(VJEPA2Model is object, reason="transformers has V-JEPA 2 from 4.53 on")
CASE = {case.name: case for case in CASES}
CLASSIFIERS = [
    pytest.param("VJEPA2ForVideoClassification", marks=vjepa2),
    "VivitForVideoClassification",
    "TimesformerForVideoClassification",
]
BACKBONES = [pytest.param("VJEPA2EncoderOnly", marks=vjepa2), "VivitModel", "TimesformerModel"]


def clips(frames: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, frames, 3, 48, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(model: Any, **values: Any) -> list[Any]:
    """The same by place, as the installed version orders them."""
    own = [parameter.name for parameter in inspect.signature(model.forward).parameters.values()]
    return [values.get(name) for name in own[: 1 + max(map(own.index, values))]]


@vjepa2
class TestVJEPA2:
    def model(self, keep_ratio: float = 0.5, **options: Any) -> Any:
        return et.patch_videomae(build_encoder("VJEPA2Model", **options).double(), et.ReRoSelector(keep_ratio))

    @pytest.mark.parametrize("call", [nn.Module.__call__, lambda model, x: model.forward(x)], ids=["call", "forward"])
    def test_the_predictor_is_refused(self, call):
        with pytest.raises(ValueError, match="skip_predictor=True"):
            call(self.model(), clips())

    def test_what_runs_without_it(self):
        plain, model = build_encoder("VJEPA2Model").double(), self.model(1.0)
        expected = plain(clips(), skip_predictor=True).last_hidden_state
        torch.testing.assert_close(model(clips(), skip_predictor=True).last_hidden_state, expected)
        by_place = arguments(model, pixel_values_videos=clips(), skip_predictor=True)
        torch.testing.assert_close(model(*by_place).last_hidden_state, expected)
        if "skip_predictor" in inspect.getsource(type(plain).get_vision_features):  # not yet in transformers 4.53
            torch.testing.assert_close(model.get_vision_features(clips()), expected)
        assert et.unpatch_videomae(model)(clips()).predictor_output.last_hidden_state.shape == (2, 36, 32)

    @pytest.mark.parametrize("name", ["context_mask", "target_mask"])
    def test_masks_over_the_whole_clip_are_refused(self, name):
        mask = [torch.arange(5).expand(2, -1)]
        with pytest.raises(ValueError, match=name):
            self.model()(clips(), skip_predictor=True, **{name: mask})
        by_place = arguments(self.model(), pixel_values_videos=clips(), skip_predictor=True, **{name: mask})
        with pytest.raises(ValueError, match=name):
            self.model()(*by_place)

    def test_its_own_mask_leaves_the_encoders_work_as_it_is(self):
        """What docs/hosts.md says: the mask chooses among finished tokens."""
        plain, counted = build_encoder("VJEPA2Model").double(), []
        plain.encoder.layer[1].register_forward_hook(lambda module, args, output: counted.append(output[0].shape[1]))
        mask = [torch.arange(5).expand(2, -1)]
        assert (
            plain(clips(), context_mask=mask, target_mask=mask, skip_predictor=True).masked_hidden_state.shape[1] == 5
        )
        assert counted == [36]

    @pytest.mark.parametrize("frames", [4, 6, 12, 20])
    def test_any_number_of_tubelets_without_a_frame_sampler(self, frames):
        """Rotary positions go on where the configured 8 frames end."""
        case, plain = CASE["VJEPA2EncoderOnly"], build_encoder("VJEPA2EncoderOnly").double()
        model, own = case.patched(1.0), clips(frames)
        torch.testing.assert_close(case.run(model, own), case.output(plain(own)))
        model.everest.selector.keep_ratio = 0.5
        selection = et.select_tokens(model, own)
        assert selection.grid == (frames // 2, 3, 3)
        expected = dataclasses.replace(case, grid=selection.grid).masked_keys(plain, own, selection)
        case.close(case.run(model, own), expected)
        with pytest.raises(ValueError, match=f"8, 3, 48, 48.*{frames + 1}"):
            model(clips(frames + 1))

    def test_a_frame_sampler_takes_its_candidates_alone(self):
        model = CASE["VJEPA2EncoderOnly"].patched(frame_sampler=et.InfoFrameSampler(1.5))
        assert model(clips(12)).last_hidden_state.shape == (2, 18, 32)
        for frames in (8, 20):
            with pytest.raises(ValueError, match=f"12, 3, 48, 48.*{frames}"):
                model(clips(frames))

    def test_clips_come_to_the_weights_type_as_in_transformers(self):
        model = self.model().float()
        assert model(clips(), skip_predictor=True).last_hidden_state.dtype == torch.float32


class TestVivit:
    def test_other_sizes_and_masks_are_refused(self):
        model = CASE["VivitModel"].patched()
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            model(clips(), interpolate_pos_encoding=True)
        with pytest.raises(ValueError, match="attention_mask"):
            model(clips(), attention_mask=torch.ones(2, 37))


class TestTimesformer:
    @pytest.mark.parametrize("kind", ["divided_space_time", "space_only"])
    @pytest.mark.parametrize("name", ["TimesformerModel", "TimesformerForVideoClassification"])
    def test_other_attention_is_refused(self, kind, name):
        model = build_encoder(name, attention_type=kind)
        with unchanged(model), pytest.raises(TypeError, match=rf"{kind}.*frames × places"):
            et.patch_videomae(model)
        with pytest.raises(TypeError, match="frames × places"):
            et.count_flops(model)

    def test_tokens_come_place_by_place(self):
        """Worked by hand: grid (4, 3, 3), kept (step, place) (0, 4), (1, 0), (3, 0), (3, 4)."""
        case = CASE["TimesformerModel"]
        plain, model = case.plain(), case.patched()
        visible = torch.tensor([[4, 9, 27, 31]]).expand(2, -1)
        seen = []
        for each in (plain, model):
            each.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            each(
                clips(4), **({} if each is plain else {"token_selection": et.TokenSelection(visible, None, (4, 3, 3))})
            )
        # The model's own order is place · 4 + step, behind the class token.
        torch.testing.assert_close(seen[1], seen[0][:, [0, 1 + 1, 1 + 3, 1 + 16, 1 + 19]])


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param("VJEPA2EncoderOnly", "eager", marks=vjepa2),
        pytest.param("VJEPA2EncoderOnly", "sdpa", marks=vjepa2),
        ("VivitModel", "eager"),
        ("VivitModel", "sdpa"),
        ("TimesformerModel", "eager"),  # it has no other
    ],
)
def test_hidden_states_and_attentions_are_the_unpatched_models(name, attention):
    case = CASE[name]
    options = {} if name == "TimesformerModel" else {"attn_implementation": attention}
    plain, model = (build_encoder(name, **options).double() for _ in range(2))
    case.patch(model, 1.0)
    asked = {"output_attentions": attention == "eager", "output_hidden_states": True}
    expected, actual = plain(case.clips(), **asked), model(case.clips(), **asked)
    assert list(actual.keys()) == list(expected.keys())
    assert len(expected.hidden_states) == 3
    assert len(expected.attentions or ()) == 2 * (attention == "eager")
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states)
    if attention == "eager":
        torch.testing.assert_close(actual.attentions, expected.attentions)
    model.everest.selector.keep_ratio = 0.5
    part = model(case.clips(), **asked)
    assert [tuple(each.shape) for each in part.hidden_states] == [(2, case.prefix + 18, 32)] * 3
    if attention == "eager":
        assert {each.shape[-2:] for each in part.attentions} == {(case.prefix + 18, case.prefix + 18)}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_flops_are_told_apart(name):
    case = CASE[name]
    model = case.build(0)
    whole, half = et.count_flops(model), et.count_flops(case.patch(model, 0.5))
    assert whole.patch_embedding == half.patch_embedding == 36 * model.get_submodule(case.projection).weight.numel()
    assert 0.4 < half.encoder / whole.encoder < 0.6
    assert half.decoder == 0
    linear = 32 * 5  # the classifier's; V-JEPA 2 has an attentive pooler before it
    assert half.head > 18 * 32 * 32 if name.startswith("VJEPA2") else half.head == whole.head == linear


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_transformers_trainer_trains_and_saves_it(name, tmp_path):
    case = CASE[name]
    model = case.patch(case.build(0), 0.5)
    data = [
        {model.main_input_name: clip, "labels": index % 5}
        for index, clip in enumerate(case.clips(batch=8, dtype=torch.float32))
    ]
    before = state_of(model)
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "report_to": [], "use_cpu": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not torch.equal(before[f"{case.projection}.weight"], model.get_parameter(f"{case.projection}.weight"))
    assert {"eval_loss"} <= trainer.evaluate().keys()
    trainer.save_model(str(tmp_path / "saved"))
    attention = {} if name.startswith("Timesformer") else {"attn_implementation": "sdpa"}
    again = et.patch_videomae(type(model).from_pretrained(tmp_path / "saved", **attention))
    assert again.everest.selector.keep_ratio == 0.5
    own = case.clips(dtype=torch.float32)
    torch.testing.assert_close(case.run(again.eval(), own), case.run(model.eval(), own))


@pytest.mark.parametrize("name", BACKBONES)
def test_replaced_parts_are_refused(name):
    """A user's own embedding would silently be run over."""
    model = CASE[name].build(0)
    embeddings = getattr(model, "encoder", model) if name.startswith("VJEPA2") else model
    own = type(embeddings.embeddings)
    embeddings.embeddings.__class__ = type("MyEmbeddings", (own,), {"__module__": "mine"})
    with pytest.raises(TypeError, match="MyEmbeddings is not transformers' own"):
        et.patch_videomae(model)


def test_one_time_step_is_too_few():
    model = TimesformerModel(TimesformerConfig(num_frames=1, attention_type="joint_space_time", num_hidden_layers=1))
    with pytest.raises(ValueError, match="two time steps"):
        et.patch_videomae(model)
