"""LoRA around patched models, patched before and after wrapping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et

CLASSES = [VideoMAEForPreTraining, VideoMAEForVideoClassification]
TARGETS = {"attention": ["query", "value"], "projection": ["query", "value", "projection"]}


def lora(model: Any, targets: str) -> PeftModel:
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS[targets], modules_to_save=["classifier"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # B starts at zero, and A then has no gradient
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def wrap_and_patch(model: Any, targets: str, order: str, *settings: Any, **more: Any) -> PeftModel:
    if order == "patch first":
        return lora(et.patch_videomae(model, *settings, **more), targets)
    wrapped = lora(model, targets)
    assert et.patch_videomae(wrapped, *settings, **more) is wrapped
    return wrapped


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
@pytest.mark.parametrize("targets", TARGETS)
class TestGradients:
    def test_classifier_is_the_unpatched_one_at_keep_ratio_1(self, make_model, make_clips, targets, order):
        plain = make_model(VideoMAEForVideoClassification).double()
        reference = lora(copy.deepcopy(plain), targets).double()
        model = wrap_and_patch(copy.deepcopy(plain), targets, order, et.ReRoSelector(1.0)).double()
        clips, labels = make_clips(plain), torch.tensor([1, 4])
        expected, actual = reference(clips, labels=labels), model(clips, labels=labels)
        torch.testing.assert_close(actual.logits, expected.logits)
        expected.loss.backward()
        actual.loss.backward()
        assert trained(model).keys() == trained(reference).keys()
        assert any("projection.lora" in name for name in trained(model)) == (targets == "projection")
        for name, parameter in trained(reference).items():
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(trained(model)[name].grad, parameter.grad, msg=name)

    def test_pretraining_is_the_unpatched_one_at_keep_ratio_1(self, make_model, make_clips, targets, order):
        plain = make_model(VideoMAEForPreTraining).double()
        reference = lora(copy.deepcopy(plain), targets).double()
        model = wrap_and_patch(copy.deepcopy(plain), targets, order, et.ReRoSelector(1.0), mask_ratio=0.75).double()
        clips = make_clips(plain)
        selection = et.select_tokens(model, clips)
        mask = torch.ones(2, 48, dtype=torch.bool).scatter(1, selection.visible, False)
        reference(pixel_values=clips, bool_masked_pos=mask).loss.backward()
        model(pixel_values=clips, token_selection=selection).loss.backward()
        for name, parameter in trained(reference).items():
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(trained(model)[name].grad, parameter.grad, msg=name)


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("cls", CLASSES)
class TestTraining:
    def test_trains_the_adapters_alone(self, make_model, make_clips, cls, targets, order):
        model = wrap_and_patch(make_model(cls), targets, order).train()
        clips, labels = make_clips(model.get_base_model()), {}
        if cls is VideoMAEForVideoClassification:
            labels = {"labels": torch.tensor([1, 4])}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        selection = et.select_tokens(model, clips)
        losses = []
        for _ in range(5):
            loss = model(pixel_values=clips, token_selection=selection, **labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in trained(model)), name


class TestWrapper:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_everything_looks_through_it(self, make_model, make_clips, cls):
        model = wrap_and_patch(make_model(cls), "projection", "wrap first", et.ReRoSelector(0.5), mask_ratio=0.75)
        base = model.get_base_model()
        clips = make_clips(base)
        assert et.select_tokens(model, clips).kept.shape == (2, 24)
        assert base.config.everest["selector"]["keep_ratio"] == 0.5
        assert et.count_flops(model) == et.count_flops(base)
        model.get_base_model().everest.selector.keep_ratio = 0.75
        assert et.select_tokens(model, clips).kept.shape == (2, 36)
        et.unpatch_videomae(model)
        assert type(base) is cls
        assert not hasattr(base.config, "everest")

    @pytest.mark.parametrize("targets", TARGETS)
    def test_adapters_load_on_a_repatched_base(self, make_model, make_clips, tmp_path, targets):
        base = et.patch_videomae(make_model(VideoMAEForVideoClassification), et.ReRoSelector(0.5))
        base.save_pretrained(tmp_path / "base")
        model = lora(base, targets).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(tmp_path / "base"))
        again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        clips = make_clips(base)
        torch.testing.assert_close(again(clips).logits, model(clips).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(clips).logits, model(clips).logits, rtol=1e-4, atol=1e-4)
        assert et.select_tokens(merged, clips).kept.shape == (2, 24)
        assert torch.equal(et.select_tokens(merged, clips).kept, et.select_tokens(model, clips).kept)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    def test_with_gradient_checkpointing(self, make_model, make_clips):
        gradients = []
        for checkpointing in (False, True):
            model = wrap_and_patch(make_model(VideoMAEForVideoClassification), "attention", "patch first").train()
            if checkpointing:
                base = model.get_base_model()
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
                base.enable_input_require_grads()  # a hook: the embedding is then called with grad
            model(make_clips(model.get_base_model()), labels=torch.tensor([1, 4])).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_selection_sees_the_adapted_embedding(self, make_model, make_clips):
        model = wrap_and_patch(make_model(VideoMAEForVideoClassification), "projection", "wrap first")
        clips = make_clips(model.get_base_model())
        adapted = et.select_tokens(model, clips).importance
        with model.disable_adapter():
            plain = et.select_tokens(model, clips).importance
        assert not torch.allclose(adapted, plain)
