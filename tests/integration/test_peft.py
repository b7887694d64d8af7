"""LoRA around patched models of every host, patched before and after wrapping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_case import HostCase, structure, weighted
from host_contract import kinds
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

RANK, ALPHA = 2, 6


def lora(model: Any, modules: tuple[str, ...], **options: Any) -> PeftModel:
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(modules), **options))
    wrapped = wrapped.to(next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # B starts at zero, and A then has no gradient
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def adapted(case: HostCase, modules: tuple[str, ...], order: str, dtype: Any = torch.float64, **options: Any) -> Any:
    if order == "patch first":
        return lora(case.patched(dtype=dtype), modules, **options)
    wrapped = lora(case.build(0).to(dtype), modules, **options)
    assert case.patch(wrapped) is wrapped
    return wrapped


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def factors(wrapped: PeftModel, module: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The adapter's A (rank, in…) and B (out, rank, …) of the module of this name."""
    layer = wrapped.get_base_model().get_submodule(module)
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    return a, b


@torch.no_grad()
def merged_by_hand(case: HostCase, wrapped: PeftModel, modules: tuple[str, ...]) -> Any:
    """A patched model without adapters whose weights have them: W + α/r·B·A."""
    merged = case.patched()
    for module in modules:
        a, b = factors(wrapped, module)
        weight = merged.get_submodule(module).weight
        weight += ALPHA / RANK * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return merged


class TestAdapters:
    @pytest.mark.parametrize("projected", [False, True], ids=["blocks", "projection too"])
    @pytest.mark.parametrize("order", ["patch first", "wrap first"])
    @kinds()
    def test_are_the_merged_weights(self, case, order, projected):
        """Outputs, and the adapters' gradients by the chain rule of W + α/r·B·A."""
        modules = (*case.adapted, case.projection) if projected else case.adapted
        if case.image_model and projected and order == "wrap first":  # an adapter of patches is none of tubelets
            wrapped = lora(case.build(0), modules)
            before, output = structure(wrapped), case.own_output(wrapped)
            with pytest.raises(TypeError, match=case.projection):
                case.patch(wrapped)
            assert structure(wrapped) == before
            assert torch.equal(case.own_output(wrapped), output)
            return
        model = adapted(case, modules, order)
        assert all("lora_" in name for name in trained(model))
        merged, clips, selection = merged_by_hand(case, model, modules), case.clips(), case.selection()
        expected, actual = case.run(merged, clips, selection), case.run(model, clips, selection)
        case.close(actual, expected, 1e-9)
        assert not torch.allclose(actual, case.run(case.patched(), clips, selection), rtol=1e-2)
        weighted(expected).backward()
        weighted(actual).backward()
        for module in modules:
            a, b = factors(model, module)
            gradient = ALPHA / RANK * merged.get_submodule(module).weight.grad.flatten(1)
            case.close(a.grad.flatten(1), b.detach().flatten(1).T @ gradient, 1e-9)
            case.close(b.grad.flatten(1), gradient @ a.detach().flatten(1).T, 1e-9)
        # ... and selecting sees an adapted projection
        case.close(case.run(model, clips), case.run(merged, clips), 1e-9)
        chosen, plain = et.select_tokens(model, clips), et.select_tokens(case.patched(), clips)
        assert torch.equal(chosen.kept, et.select_tokens(merged, clips).kept)
        assert torch.allclose(chosen.importance, plain.importance) != projected

    @pytest.mark.parametrize(("order", "projected"), [("patch first", True), ("wrap first", False)])
    @kinds()
    def test_train_alone_and_load_again(self, case, order, projected, tmp_path):
        modules = (*case.adapted, case.projection) if projected else case.adapted
        model = adapted(case, modules, order, torch.float32).train()
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        before, losses = {name: value.clone() for name, value in model.state_dict().items()}, []
        optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        for _ in range(3):
            loss = case.run(model, clips, selection).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in trained(model)), name
        expected = case.run(model.eval(), clips, selection)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(case.patched(dtype=torch.float32), tmp_path).eval()
        case.close(case.run(again, clips, selection), expected)
        case.close(case.run(again.merge_and_unload(), clips, selection), expected, 1e-4)


class TestWrapper:
    @kinds()
    def test_everything_looks_through_it(self, case):
        model, clips = adapted(case, case.adapted, "wrap first"), case.clips()
        base, plain = model.get_base_model(), lora(case.build(0).double(), case.adapted)
        base.everest.selector.keep_ratio = 0.75
        assert et.select_tokens(model, clips).kept.shape == (2, case.tokens * 3 // 4)
        assert et.count_flops(model) == et.count_flops(base)
        assert et.unpatch_videomae(model) is model
        assert structure(model) == structure(plain)
        assert torch.equal(case.own_output(model), case.own_output(plain))

    @kinds(lambda case: case.image_model)
    def test_an_adapted_kernel_of_tubelets_is_not_unpatched(self, case):
        model = lora(case.patched(), (case.projection,))
        merged, clips, selection = merged_by_hand(case, model, (case.projection,)), case.clips(), case.selection()
        with pytest.raises(TypeError, match="unload the adapter first"):
            et.unpatch_videomae(model)
        case.close(case.run(model, clips, selection), case.run(merged, clips, selection), 1e-9)
        unloaded = et.unpatch_videomae(model.merge_and_unload())
        kernel = merged.get_parameter(f"{case.projection}.weight").sum(dim=2)
        case.close(unloaded.get_parameter(f"{case.projection}.weight"), kernel)

    @kinds()
    @pytest.mark.parametrize("projected", [False, True])
    def test_flops_are_what_torch_counts(self, case, projected):
        """Not more than what runs, and not less."""
        model, clips = case.patched(dtype=torch.float32), case.clips(batch=1, dtype=torch.float32)
        modules = (case.projection,) if projected else case.adapted

        def added(count: Callable[[Any], int]) -> int:
            return count(lora(copy.deepcopy(model), modules)) - count(model)

        def run(each: Any) -> int:
            each.requires_grad_(False)  # the counter stumbles over parameters as arguments
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                case.run(each, clips)
            return counter.get_total_flops()

        assert run(model) > 0
        assert added(run) > 0
        assert 2 * added(lambda each: et.count_flops(each).total) == added(run)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_with_gradient_checkpointing(self, make_model, make_clips, reentrant):
        """PEFT then asks the embedding's output for a gradient by a hook, also where it is frozen."""
        found = []
        for checkpointing in (False, True):
            base = et.patch_videomae(make_model(VideoMAEForVideoClassification).double(), et.ReRoSelector(0.5))
            model = lora(base, ("query", "value")).train()
            if checkpointing:
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                base.enable_input_require_grads()
            model(make_clips(base), labels=torch.tensor([1, 4])).loss.backward()
            found.append({name: parameter.grad for name, parameter in trained(model).items()})
        for name, gradient in found[0].items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)

    def test_a_trained_head_beside_the_frozen_one(self, make_model, make_clips, tmp_path):
        """modules_to_save keeps both; the frozen one doesn't run and isn't counted."""
        base = et.patch_videomae(make_model(VideoMAEForVideoClassification), et.ReRoSelector(0.5))
        base.save_pretrained(tmp_path / "base")
        counted = et.count_flops(base).head
        model = lora(base, ("query", "value"), modules_to_save=["classifier"]).eval()
        assert et.count_flops(model).head == counted
        model.save_pretrained(tmp_path / "adapter")
        again = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(tmp_path / "base"))
        again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        clips = make_clips(base)
        torch.testing.assert_close(again(clips).logits, model(clips).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(clips).logits, model(clips).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(et.select_tokens(merged, clips).kept, et.select_tokens(model, clips).kept)
