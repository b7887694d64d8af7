"""Patching, copying and unpatching, of every host: what must not change, and what must come back to the bit."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from typing import Any

import pytest
import torch
from host_case import HostCase, assert_same_state, counted_by_torch, gradients, state_of, structure, unchanged, weighted
from host_contract import OTHER_SIZES, hosts, kinds
from timm.utils import ModelEmaV3
from torch import nn

import everest_tokens as et


class TestInvisibility:
    @kinds()
    @pytest.mark.parametrize("drop_path", [0.0, 0.3])
    def test_what_the_ecosystem_sees_stays(self, case, drop_path):
        plain = case.build(0)
        before = inspect.signature(plain.forward).parameters
        keywords = {name: each.annotation for name, each in before.items() if each.kind is each.VAR_KEYWORD}
        model = case.patch(copy.deepcopy(plain), drop_path=drop_path)
        kernel = f"{case.projection}.weight"
        for listed in ("named_parameters", "named_buffers"):
            own, now = list(getattr(plain, listed)()), list(getattr(model, listed)())
            assert [name for name, _ in now] == [name for name, _ in own]
            for (name, value), (_, after) in zip(own, now, strict=True):
                assert after.requires_grad == value.requires_grad
                assert type(after) is type(value)
                if not (case.image_model and name == kernel):  # which is inflated to tubelets
                    assert torch.equal(after, value), name
        assert list(model.state_dict()) == list(plain.state_dict())
        assert isinstance(model, type(plain))
        for name, module in model.named_modules():
            if "dropout." in name or (
                drop_path and name.endswith(("dropout", "drop_path", "drop_path1", "drop_path2"))
            ):
                continue
            if name != case.projection or not case.image_model:
                own = type(plain.get_submodule(name))
                assert isinstance(module, own), name
                assert (type(module).__name__, type(module).__qualname__) == (own.__name__, own.__qualname__)
        now = inspect.signature(model.forward).parameters
        handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in now.values())
        assert set(before) <= set(now) or (handed_on and next(iter(before)) in now)
        assert all(now[name].annotation == annotation for name, annotation in keywords.items())
        first = next(iter(before))
        clips = case.clips(dtype=torch.float32)
        torch.manual_seed(11)
        by_name = case.output(model(**{first: clips}))
        assert torch.equal(by_name, case.run(model, clips))

    @kinds()
    def test_the_model_is_given_back(self, case):
        model = case.build(0)
        assert case.patch(model) is model
        assert et.unpatch_videomae(model) is model
        assert all(module.training for module in case.patch(model.train(), drop_path=0.3).modules())
        assert not any(module.training for module in et.unpatch_videomae(model.eval()).modules())

    @kinds()
    def test_other_models_of_the_class_are_left_alone(self, case):
        first, second, other = (case.build(0) for _ in range(3))
        expected = case.own_output(other)
        for model in (first, second):
            case.patch(model)
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        patched = case.run(second, clips, selection)
        assert torch.equal(case.own_output(other), expected)
        et.unpatch_videomae(first)
        assert torch.equal(case.own_output(first), expected)
        assert torch.equal(case.run(second, clips, selection), patched)


def evaluate(case: HostCase, model: Any, frames: int | None = None, selection: Any = None) -> None:
    case.run(model, case.clips(frames=frames, dtype=torch.float32), selection)


def train(case: HostCase, model: Any, frames: int | None = None) -> None:
    """One step of every weight, in train mode, back in eval mode after it."""
    optimiser = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    weighted(case.run(model, case.clips(frames=frames, dtype=torch.float32))).backward()
    optimiser.step()
    optimiser.zero_grad()
    model.eval()


def fail_inside(
    case: HostCase, model: Any, frames: Any = None, selection: Any = None, error: Any = RuntimeError
) -> None:
    def fail(*_: Any) -> None:
        raise error

    hook = model.get_submodule(case.blocks)[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        evaluate(case, model, frames, selection)
    hook.remove()


class TestUnpatching:
    @kinds()
    @pytest.mark.parametrize(
        ("settings", "use"), [({}, None), ({"drop_path": 0.4}, evaluate)], ids=["unused", "drop path"]
    )
    def test_brings_everything_back(self, case, settings, use):
        self.check(case, settings, use)

    @hosts()
    def test_after_a_failure_brings_everything_back(self, case):
        self.check(case, {"frame_sampler": et.InfoFrameSampler(2.0)}, fail_inside)

    def check(self, case: HostCase, settings: dict[str, Any], use: Any) -> None:
        model = case.build(0)
        expected, before = case.own_output(model), structure(model)
        with unchanged(model):
            case.patch(model, **settings)
            assert structure(model) != before
            if use is not None:
                use(case, model, 2 * case.clip[case.time] if "frame_sampler" in settings else None)
            et.unpatch_videomae(model)
        assert torch.equal(case.own_output(model), expected)
        with pytest.raises(ValueError, match="not patched"):
            et.unpatch_videomae(model)
        with pytest.raises(ValueError, match="not patched"):
            et.select_tokens(model, case.clips())

    @hosts()
    def test_trained_weights_stay(self, case):
        model, before = case.build(0), structure(case.build(0))
        case.patch(model)
        untrained = state_of(model)
        train(case, model)
        trained = state_of(model)
        assert sum(not torch.equal(value, untrained[name]) for name, value in trained.items()) > len(trained) // 2
        et.unpatch_videomae(model)
        assert structure(model) == before
        if case.image_model:  # an image's kernel again: tubelets of one image frame after frame
            trained[f"{case.projection}.weight"] = trained[f"{case.projection}.weight"].sum(dim=2)
        assert_same_state(model, trained)
        plain = case.build(1)
        plain.load_state_dict(trained)
        assert torch.equal(case.own_output(model), case.own_output(plain))

    @kinds()
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_a_failure_inside_the_patched_model_works_too(self, case, error):
        model, clips, selection = case.patched(dtype=torch.float32), case.clips(dtype=torch.float32), case.selection()
        expected, own = case.run(model, clips, selection), case.run(model, clips)
        fail_inside(case, model, selection=case.selection(seed=4), error=error)
        assert torch.equal(case.run(model, clips), own)
        assert torch.equal(case.run(model, clips, selection), expected)
        with pytest.raises(TypeError):
            model(clips, token_selection="no selection")
        assert torch.equal(case.run(model, clips), own)

    @kinds()
    def test_other_hooks_stay(self, case):
        model, seen = case.build(0), []
        model.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        case.patch(model)
        model.get_submodule(case.blocks)[0].register_forward_hook(lambda module, args, output: seen.append("block"))
        evaluate(case, model)
        et.unpatch_videomae(model)
        case.own_output(model)
        assert seen == ["pre", "block"] * 2


class TestPatchingAgain:
    @kinds()
    def test_replaces_the_first(self, case):
        model, before = case.build(0), structure(case.build(0))
        case.patch(model, et.RandomSelector(0.75), drop_path=0.5)
        first = model.everest
        case.patch(model, 0.5)
        first.selector.keep_ratio = 1.0  # the old handle is dead
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        assert et.select_tokens(model, clips).kept.shape == (2, case.tokens // 2)
        fresh = case.patched(dtype=torch.float32).train()
        assert torch.equal(case.run(model.train(), clips, selection), case.run(fresh, clips, selection))
        et.unpatch_videomae(model.eval())
        assert structure(model) == before

    @kinds()
    @pytest.mark.parametrize("patched", [True, False])
    def test_a_failure_changes_nothing(self, case, patched):
        model = case.build(0)
        if patched:
            case.patch(model, 0.5, drop_path=0.2)
        policy = getattr(model, "everest", None)
        failures = [
            ({"keep_ratio": 3}, TypeError),
            ({"keep_ratio": nn.Linear(2, 2)}, TypeError),
            ({"drop_path": 1.0}, ValueError),
            ({"frame_sampler": 1.5}, TypeError),
            ({"frame_sampler": et.InfoFrameSampler(1.01)}, ValueError),
            ({"keep_ratio": 0.001}, ValueError),
            ({"mask_ratio": 0.5} if case.pretraining else {"visible": et.TubeSelector(0.5)}, ValueError),
        ]
        for settings, error in failures:
            with unchanged(model), pytest.raises(error):
                case.patch(model, **settings)
            assert getattr(model, "everest", None) is policy


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    @kinds()
    @pytest.mark.parametrize(
        ("duplicate", "settings"),
        [(copy.deepcopy, {}), (pickled, {"drop_path": 0.2}), (saved, {})],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_works_and_is_independent(self, case, duplicate, settings):
        plain, model = case.build(0), case.patch(case.build(0), **settings)
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        expected = case.run(model, clips, selection)
        twin = duplicate(model)
        assert type(twin) is type(model)
        assert torch.equal(case.run(twin, clips, selection), expected)
        twin.everest.selector.keep_ratio = 0.75
        assert et.select_tokens(twin, clips).kept.shape == (2, case.tokens * 3 // 4)
        assert et.select_tokens(model, clips).kept.shape == (2, case.tokens // 2)
        original = state_of(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        assert torch.equal(case.run(model, clips, selection), expected)
        twin.load_state_dict(original)
        et.unpatch_videomae(twin)
        assert structure(twin) == structure(plain)
        assert torch.equal(case.own_output(twin), case.own_output(plain))
        assert torch.equal(case.run(model, clips, selection), expected)
        et.unpatch_videomae(model)
        assert torch.equal(case.own_output(model), case.own_output(plain))

    @kinds()
    def test_a_state_dict_through_a_file(self, case, tmp_path):
        model = case.patched(dtype=torch.float32)
        train(case, model)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        state = torch.load(tmp_path / "weights.pth", weights_only=True)
        again = case.patched(seed=1, dtype=torch.float32)
        again.load_state_dict(state)
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        expected = case.run(model, clips, selection)
        assert torch.equal(case.run(again, clips, selection), expected)
        own = case.build(1)
        assert state.keys() == own.state_dict().keys()
        if case.image_model:  # tubelets are no patches
            with pytest.raises(RuntimeError, match=case.projection):
                own.load_state_dict(state)
            return
        own.load_state_dict(state)  # into the plain class
        assert torch.equal(case.run(case.patch(own), clips, selection), expected)

    @kinds()
    def test_averaged_weights(self, case):
        model = case.patched(dtype=torch.float32)
        ema = ModelEmaV3(model, decay=0.9)
        average = state_of(model)
        for _ in range(2):
            train(case, model)
            ema.update(model)
            average = {name: 0.9 * average[name] + 0.1 * value for name, value in model.state_dict().items()}
        expected = case.patched(seed=1, dtype=torch.float32)
        expected.load_state_dict(average)
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        case.close(case.run(ema.module, clips, selection), case.run(expected, clips, selection), 1e-4)
        ema.module.everest.selector.keep_ratio = 0.75
        assert model.everest.selector.keep_ratio == 0.5


class TestRecord:
    @kinds(lambda case: hasattr(case.build(0), "config"))
    def test_is_the_live_state_as_json_and_restores_it(self, case, tmp_path):
        model = case.patched(dtype=torch.float32)
        model.everest.selector.keep_ratio = 0.75
        model.everest.selector.distance = "cosine"
        recorded = json.loads(json.dumps(model.config.everest))
        assert recorded["selector"]["keep_ratio"] == 0.75
        assert recorded["task"] == ("pretraining" if case.pretraining else "encoder")
        model.save_pretrained(tmp_path)
        cls = type(case.build(0))
        plain, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(case.own_output(plain), case.own_output(case.build(0)))
        again = et.patch_videomae(plain)
        assert json.loads(json.dumps(again.config.everest)) == recorded
        clips = case.clips(dtype=torch.float32)
        assert torch.equal(et.select_tokens(again, clips).kept, et.select_tokens(model, clips).kept)
        et.unpatch_videomae(again)
        assert not hasattr(again.config, "everest")


class TestMetaDevice:
    @hosts()
    def test_patched_there_and_filled_later(self, case):
        """Deferred initialisation: tables that no state dict has stay on the CPU, as the unpatched model needs it."""
        expected = case.patched(dtype=torch.float32)
        model = case.patch(case.build(1).to("meta"))
        model.to_empty(device="cpu").load_state_dict(expected.state_dict())
        for name, buffer in expected.named_buffers():  # rotary tables: timm's own loading makes them anew
            model.get_buffer(name).copy_(buffer)
        clips, selection = case.clips(dtype=torch.float32), case.selection()
        assert torch.equal(case.run(model, clips, selection), case.run(expected, clips, selection))
        assert torch.equal(et.select_tokens(model, clips).kept, et.select_tokens(expected, clips).kept)


class TestCountFlops:
    @hosts(lambda case: case not in OTHER_SIZES, more=True)
    def test_is_what_torch_counts(self, case):
        model = case.patched(dtype=torch.float32)
        clips = case.clips(batch=1, dtype=torch.float32)
        count = et.count_flops(model)
        assert count.total == pytest.approx(counted_by_torch(model, clips), rel=0.005)
        assert (count.decoder > 0) == case.pretraining
        kernel, (t, h, w) = model.get_submodule(case.projection).weight, case.grid
        assert count.patch_embedding == case.tokens * kernel.numel()
        assert count.selection == (t - 1) * h * w * kernel.shape[0]  # l2: one product a channel of each pair

    @kinds()
    def test_a_frame_sampler_is_what_torch_counts(self, case):
        model = case.patched(dtype=torch.float32)
        model.everest.frame_sampler = et.InfoFrameSampler(2.0)
        clips = case.clips(batch=1, frames=2 * case.clip[case.time], dtype=torch.float32)
        assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, clips), rel=0.005)

    @hosts(lambda case: not case.pretraining)
    def test_unpatched(self, case):
        model, clips = case.build(0), case.clips(batch=1, dtype=torch.float32)
        clips = clips[:, :, 0] if case.image_model else clips
        assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, clips), rel=0.005)

    @kinds()
    def test_on_the_meta_device(self, case):
        model = case.build(0)
        unpatched, patched = et.count_flops(model), et.count_flops(case.patched(dtype=torch.float32))
        on_meta = model.to("meta")
        assert et.count_flops(on_meta) == unpatched
        assert et.count_flops(case.patch(on_meta)) == patched
        assert gradients(model) == {}
