"""What a patched model computes, of every host, against references that know nothing of the library."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from typing import Any

import pytest
import torch
from host_case import HostCase, gradients, weighted
from host_contract import hosts, kinds
from torch import Tensor

import everest_tokens as et
from everest_tokens.camera import as_seen_later


def assert_same(
    case: HostCase, plain: Any, model: Any, reference: Any, selection: et.TokenSelection, rounding: float = 0.0
) -> None:
    """Outputs, and every gradient of weights and pixels, are those of `reference` to rounding."""
    pixels = [case.clips().requires_grad_() for _ in range(2)]
    expected, actual = reference(plain, pixels[0], selection), case.run(model, pixels[1], selection)
    case.close(actual, expected, max(1e-12, rounding))
    weighted(expected).backward()
    weighted(actual).backward()
    case.close_gradients(model, plain)
    case.close(pixels[1].grad, pixels[0].grad, max(1e-9, rounding))


class TestKeepingEverything:
    @hosts()
    def test_is_the_unpatched_model_in_float32(self, case):
        self.check(case, torch.float32)

    @hosts(more=True)
    def test_is_the_unpatched_model(self, case):
        self.check(case, torch.float64)

    def check(self, case: HostCase, dtype: torch.dtype) -> None:
        plain, model = case.plain(dtype=dtype), case.patch(case.build(0).to(dtype), 1.0)
        clips = case.clips(dtype=dtype)
        selection = et.select_tokens(model, clips)
        assert selection.kept.shape == (2, case.tokens)
        case.close(case.run(model, clips, selection), case.expected_of_all(plain, clips, selection))
        if dtype == torch.float64:
            assert_same(case, plain.train(), model.train(), case.expected_of_all, selection, case.rounding)


class TestGivenSelection:
    @hosts(more=True)
    def test_is_the_reference_on_those_tokens(self, case):
        plain, model, clips = case.plain(), case.patch(case.build(0).double()), case.clips()
        expected = case.expected(plain, clips, case.selection())
        case.close(case.run(model, clips, case.selection()), expected)
        others = case.expected(plain, clips, case.selection(seed=4))
        assert not torch.allclose(others, expected), "which tokens are chosen must count"
        assert_same(case, plain.train(), model.train(), case.expected, case.selection(), case.rounding)

    @hosts(lambda case: not case.pretraining)
    def test_is_the_all_token_run_with_the_other_keys_masked(self, case):
        assert_same(case, case.whole(case.build(0).double()), case.patched(), case.masked_keys, case.selection())

    @kinds()
    def test_is_run_once_and_not_kept(self, case):
        model, clips = case.patched(), case.clips()

        def features() -> Any:
            torch.manual_seed(11)
            return model.forward_features(clips) if hasattr(model, "forward_features") else None

        own, own_features = case.run(model, clips), features()
        given = case.run(model, clips, case.selection())
        assert given.shape != own.shape or not torch.allclose(given, own)
        torch.testing.assert_close(features(), own_features, rtol=0, atol=0)
        assert torch.equal(case.run(model, clips), own)

    @kinds()
    @pytest.mark.parametrize("hooked", [False, True])
    def test_other_tokens_have_no_influence(self, case, hooked):
        model, clips, selection = case.patched(), case.clips(), case.selection()
        if hooked:  # their embeddings are then part of the graph: far away, but not NaN
            model.get_submodule(case.projection).register_forward_hook(lambda module, args, output: None)
        kept, visible = case.pixels(clips, selection.kept), case.pixels(clips, selection.visible)
        expected = case.run(model, clips, selection)
        weighted(expected).backward()
        wanted = gradients(model)
        broken = torch.where(kept, clips, clips + 1000.0 if hooked else math.nan).requires_grad_()
        model.zero_grad()
        actual = case.run(model, broken, selection)
        assert torch.equal(actual, expected)
        weighted(actual).backward()
        case.close_gradients(model, wanted, 1e-9 if hooked else 1e-12)
        assert (broken.grad[~visible] == 0).all()
        assert (broken.grad[visible] != 0).float().mean() > 0.99

    @kinds()
    @pytest.mark.parametrize("where", ["projection", "embedding", "every module"])
    def test_hooks_on_the_embedding_are_obeyed(self, case, where, request):
        """A hook forbids shortcuts around the projection's own forward; the numbers are the same."""
        clips, selection, calls = case.clips(), case.selection(), []
        model, hooked, scaled = (case.patched() for _ in range(3))
        projection = hooked.get_submodule(case.projection)
        hooks = {
            "projection": projection.register_forward_hook,
            "embedding": hooked.get_submodule(case.projection.rpartition(".")[0]).register_forward_hook,
            "every module": torch.nn.modules.module.register_module_forward_hook,
        }

        def triple(module: Any, args: Any, output: Any) -> Any:
            if where == "every module" and module is not projection:
                return None
            calls.append(1)
            return 3 * output

        request.addfinalizer(hooks[where](triple).remove)
        with torch.no_grad():
            for parameter in scaled.get_submodule(case.projection).parameters():
                parameter *= 3
        expected, actual = case.run(scaled, clips, selection), case.run(hooked, clips, selection)
        assert calls
        case.close(actual, expected)
        weighted(expected).backward()
        weighted(actual).backward()
        wanted = gradients(scaled)
        for name in wanted:
            if name.startswith(case.projection):
                wanted[name] *= 3
        case.close_gradients(hooked, wanted)
        if where != "embedding":  # selecting sees it
            own = [et.select_tokens(each, clips).importance for each in (hooked, scaled, model)]
            torch.testing.assert_close(own[0], own[1])
            assert not torch.allclose(own[0], own[2])

    @kinds()
    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_a_frozen_half_of_the_projection(self, case, frozen):
        plain, model = case.plain(), case.patched()
        for each in (plain, model):
            each.get_parameter(f"{case.projection}.{frozen}").requires_grad_(False)
        selection, clips = case.selection(), case.clips()
        weighted(case.expected(plain, clips, selection)).backward()
        weighted(case.run(model, clips, selection)).backward()
        assert f"{case.projection}.{frozen}" not in gradients(model)
        case.close_gradients(model, plain)


class TestSelecting:
    @hosts()
    def test_the_most_changed_tokens_before_positions(self, case):
        model, clips = case.patched(0.5), case.clips()
        selection, importance = et.select_tokens(model, clips), case.importance(model, clips)
        assert selection.importance.dtype == torch.float32
        torch.testing.assert_close(selection.importance, importance)
        order = importance.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(selection.kept, order[:, : case.tokens // 2].sort(dim=1).values)
        assert selection.grid == case.grid
        assert (selection.target is None) != case.pretraining

    @hosts()
    def test_forward_runs_what_select_tokens_says(self, case):
        plain, model, clips = case.plain(), case.patched(0.5), case.clips()
        for training in (True, False):
            torch.manual_seed(11)
            selection = et.select_tokens(model.train(training), clips)
            if case.pretraining:
                assert selection.visible.shape == (2, case.tokens // 4)
            case.close(case.run(model, clips), case.expected(plain.train(training), clips, selection))

    @kinds()
    def test_a_random_selector(self, case):
        model, clips = case.patched(et.RandomSelector(0.5)).train(), case.clips()

        def select(seed: int) -> list[list[int]]:
            selection = et.select_tokens(model, clips, generator=torch.Generator().manual_seed(seed))
            return [*selection.kept.tolist(), *selection.visible.tolist()]

        before = torch.get_rng_state()
        first = [select(seed) for seed in range(4)]
        assert first == [select(seed) for seed in range(4)]
        assert len({str(each) for each in first}) > 1
        assert torch.equal(torch.get_rng_state(), before)  # the global generator isn't touched
        torch.manual_seed(11)
        selection = et.select_tokens(model, clips)
        assert torch.get_rng_state().tolist() != before.tolist()
        case.close(case.run(model, clips), case.expected(case.plain().train(), clips, selection))

    @kinds()
    def test_runs_no_encoder_and_leaves_no_graph(self, case):
        model = case.patched()
        block = model.get_submodule(case.blocks)[0]
        block.register_forward_pre_hook(lambda module, args: pytest.fail("the encoder ran"))
        selection = et.select_tokens(model, case.clips().requires_grad_())
        assert not selection.importance.requires_grad
        assert torch.is_grad_enabled()

    @kinds()
    def test_live_settings(self, case):
        plain, model, clips = case.plain(), case.patched(0.5), case.clips()
        for ratio in (0.75, 1.0, 0.25 if not case.pretraining else 0.5):
            model.everest.selector.keep_ratio = ratio
            torch.manual_seed(11)
            selection = et.select_tokens(model, clips)
            assert selection.kept.shape == (2, int(ratio * case.tokens))
            case.close(case.run(model, clips), case.expected(plain, clips, selection))
        model.everest.selector.descending = False
        selection = et.select_tokens(model, clips)
        assert selection.importance.gather(1, selection.kept).max() < case.importance(model, clips).max()
        model.everest.selector = et.TubeSelector(0.5)
        tubes = et.select_tokens(model, clips)
        case.close(case.run(model, clips, tubes), case.expected(plain, clips, tubes))
        places = tubes.kept % (case.grid[1] * case.grid[2])
        assert torch.equal(places.unflatten(1, (case.grid[0], -1))[:, 0], places.unflatten(1, (case.grid[0], -1))[:, 1])


def drawn(case: HostCase, clips: Tensor, steps: Tensor) -> Tensor:
    """The frames of the drawn candidate steps (B, t), by plain loops."""
    frames = [[case.tubelet * step + i for step in row for i in range(case.tubelet)] for row in steps.tolist()]
    rows = [clip.index_select(case.time, torch.tensor(row)) for clip, row in zip(clips, frames, strict=True)]
    return torch.stack(rows)


class TestFrameSampler:
    @hosts()
    def test_runs_the_drawn_steps_at_positions_from_0(self, case):
        plain, model = case.plain().train(), case.patched(frame_sampler=et.InfoFrameSampler(2.0)).train()
        clips = case.clips(frames=2 * case.clip[case.time]).requires_grad_()
        selection = et.select_tokens(model, clips)
        assert selection.steps.shape == (2, case.grid[0])
        assert (selection.steps.diff(dim=1) > 0).all()
        short = drawn(case, clips.detach(), selection.steps).requires_grad_()
        alone = et.TokenSelection(selection.visible, selection.target, selection.grid)
        expected, actual = case.expected(plain, short, alone), case.run(model, clips, selection)
        case.close(actual, expected)
        weighted(expected).backward()
        weighted(actual).backward()
        case.close_gradients(model, plain)
        case.close(drawn(case, clips.grad, selection.steps), short.grad, max(1e-9, case.rounding))
        assert clips.grad.count_nonzero() == short.grad.count_nonzero()  # and no gradient elsewhere
        torch.manual_seed(11)
        own = et.select_tokens(model, clips)
        case.close(case.run(model, clips), case.run(model, clips, own))  # its own forward draws the same
        for training in (True, False):
            model.train(training)
            steps = {tuple(et.select_tokens(model, clips).steps.flatten().tolist()) for _ in range(8)}
            assert (len(steps) > 1) == training  # in eval the most probable

    @kinds()
    def test_other_numbers_of_frames(self, case):
        model, own = case.patched(frame_sampler=et.InfoFrameSampler(2.0)), case.clip[case.time]
        for wrong in (own, 2 * own - 1, 3 * own):
            with pytest.raises(ValueError, match=rf"\b{2 * own}\b.*\b{wrong}\b"):
                model(case.clips(frames=wrong))
        model.everest.frame_sampler = None
        case.run(model, case.clips())
        wrong = 2 * own + 1 if case.any_length else 2 * own
        with pytest.raises(ValueError, match=rf"\b{own}\b.*\b{wrong}\b"):
            model(case.clips(frames=wrong))


class Watching:
    """A selector of one's own that asks what the camera saw, and keeps the first half."""

    camera = "compensate"

    def __init__(self) -> None:
        self.compared: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tokens: Tensor, grid: tuple[int, int, int], previous: Tensor) -> Tensor:
        self.compared.append((tokens, previous))
        return torch.arange(tokens.shape[1] // 2).expand(len(tokens), -1)


def panning(case: HostCase, frames: int | None = None) -> Tensor:
    """Clips of smooth noise that moves on by a pixel a frame."""
    clips = case.clips(frames=frames).movedim(1 + case.time, 1)  # (B, T, C, H, W)
    still = torch.nn.functional.avg_pool2d(clips[:, 0], 3, stride=1, padding=1)
    moving = torch.stack([still.roll(frame, dims=-1) for frame in range(clips.shape[1])], dim=1)
    return moving.movedim(1, 1 + case.time).contiguous()


def moved(case: HostCase, clips: Tensor) -> Tensor:
    """`as_seen_later` of the clips as the model takes them."""
    return as_seen_later(clips.movedim(1 + case.time, 1), case.tubelet).movedim(1, 1 + case.time).contiguous()


class TestCamera:
    @hosts()
    def test_tokens_are_compared_with_the_embedding_of_the_moved_clip(self, case):
        model, clips = case.patched(watching := Watching()), panning(case).requires_grad_()
        plain_before = torch.cat([clips.detach().narrow(1 + case.time, 0, case.tubelet)] * 2, dim=1 + case.time)
        seen = moved(case, clips.detach())
        assert not torch.equal(seen.narrow(1 + case.time, 0, 2 * case.tubelet), plain_before)
        watching.compared.clear()
        case.run(model, clips)
        case.run(model, seen)
        (tokens, previous), (expected, _) = watching.compared
        assert (tokens.requires_grad, previous.requires_grad) == (False, False)
        case.close(previous, expected)

    @kinds()
    def test_with_a_frame_sampler_between_the_drawn_steps(self, case):
        model = case.patched(watching := Watching(), frame_sampler=et.InfoFrameSampler(2.0))
        clips = panning(case, frames=2 * case.clip[case.time])
        watching.compared.clear()
        steps = et.select_tokens(model, clips).steps
        model.everest.frame_sampler = None
        et.select_tokens(model, moved(case, drawn(case, clips, steps)))
        (_, of_candidates), (_, previous), (expected, _) = watching.compared
        assert of_candidates.shape[1] == 2 * case.tokens
        case.close(previous, expected)

    @kinds()
    def test_a_resting_camera_changes_nothing(self, case):
        model, clips = case.patched(0.5), case.clips()
        before = et.select_tokens(model, clips, generator=torch.Generator().manual_seed(1))
        model.everest.selector.camera = "compensate"
        after = et.select_tokens(model, clips, generator=torch.Generator().manual_seed(1))
        assert torch.equal(before.visible, after.visible)
        torch.testing.assert_close(after.importance, before.importance)
        static = clips.narrow(1 + case.time, 0, 1).expand_as(clips)
        assert et.select_tokens(model, static).importance.count_nonzero() == 0

    @kinds()
    @pytest.mark.parametrize("anchor", [None, "middle"])
    def test_forward_runs_what_select_tokens_says(self, case, anchor):
        selector = et.ReRoSelector(0.75, camera="compensate", anchor=anchor)
        plain, model, clips = case.plain(), case.patched(selector), panning(case)
        torch.manual_seed(11)
        selection = et.select_tokens(model, clips)
        case.close(case.run(model, clips), case.expected(plain, clips, selection))
        if anchor:
            area = case.grid[1] * case.grid[2]
            assert selection.frame_counts[:, case.grid[0] // 2].tolist() == [area, area]


class TestUnusualBatches:
    @kinds()
    def test_a_static_clip_has_one_answer(self, case):
        """Ties go to the lower index."""
        model = case.patched(0.5)
        still = case.clips().index_select(1 + case.time, torch.zeros(case.clip[case.time], dtype=torch.int64))
        selection = et.select_tokens(model, still)
        assert (selection.importance == 0).all()
        assert selection.kept.tolist() == [list(range(case.tokens // 2))] * 2
        case.close(case.run(model, still, selection), case.expected(case.plain(), still, selection))

    @kinds()
    def test_each_clip_is_computed_by_itself(self, case):
        model, clips, selection = case.patched(), case.clips(batch=3), case.selection(batch=3)
        together = case.run(model, clips, selection)
        for row in range(3):
            one = torch.utils._pytree.tree_map_only(Tensor, lambda index, row=row: index[row : row + 1], selection)
            alone = case.run(model, clips[row : row + 1], one)
            if not case.pretraining:
                case.close(alone, together[row : row + 1])
            case.close(alone, case.expected(case.plain(), clips[row : row + 1], one))

    @hosts()
    def test_no_clip(self, case):
        """An empty result where the unpatched model gives one, else a ValueError in words."""
        model, clips = case.patched(), case.clips(batch=0)
        one = case.run(model, case.clips(batch=1))
        assert et.select_tokens(model, clips).kept.shape == (0, case.tokens // 2)
        try:
            case.own_output(case.build(0), batch=0)
        except RuntimeError:
            with contextlib.suppress(ValueError):
                assert case.run(model, clips).shape == (0, *one.shape[1:])
        else:
            assert case.run(model, clips).shape == (0, *one.shape[1:])


def shapes(case: HostCase) -> list[tuple[int, ...]]:
    """Batches that are wrong in one axis each."""
    clip = case.clip
    axes = clip[:2] if case.any_size else clip
    wrong = [
        (2, *clip[:axis], size + (1 if case.any_length else 2), *clip[axis + 1 :]) for axis, size in enumerate(axes)
    ]
    wrong += [(2, clip[1], clip[0], *clip[2:]), (2, *clip[: case.time], 0, *clip[case.time + 1 :]), clip, (1, 2, *clip)]
    return wrong if case.any_size or clip[2] == clip[3] else [*wrong, (2, *clip[:2], clip[3], clip[2])]


class TestWrongInput:
    @kinds()
    def test_shapes_are_named(self, case):
        model = case.patched(dtype=torch.float32)
        expected = ", ".join(map(str, case.clip))
        for shape in shapes(case):
            for call in (model, lambda clips: et.select_tokens(model, clips)):
                with pytest.raises(ValueError) as error:  # noqa: PT011
                    call(torch.zeros(shape))
                message = str(error.value)
                assert str(tuple(shape)) in message
                assert expected in message or "(B, C, T, H, W)" in message  # timm's: of images
        assert case.run(model, case.clips(dtype=torch.float32)).isfinite().all()

    @kinds()
    def test_pixels_are_floats_in_a_tensor(self, case):
        model = case.patched()
        for call in (model, lambda clips: et.select_tokens(model, clips)):
            for dtype in (torch.uint8, torch.int64, torch.bool):
                with pytest.raises(ValueError, match=f"float.*{dtype}"):
                    call(case.clips().to(dtype))
            with pytest.raises(TypeError, match="list"):
                call([1, 2])

    @kinds()
    def test_selections(self, case):
        model, clips, good = case.patched(), case.clips(), case.selection()
        for given in (good.kept, [1, 2], {"visible": 1}, 0.3):
            with pytest.raises(TypeError, match="TokenSelection"):
                model(clips, token_selection=given)
        t, h, w = case.grid
        first = None if good.target is None else good.target[:1]
        steps = torch.arange(t).expand(2, t)
        bad = [
            (et.TokenSelection(good.visible[:1], first, good.grid), r"\b1 clips"),
            (et.TokenSelection(good.visible, good.target, (h, t, w)), rf"\({h}, {t}, {w}\).*\({t}, {h}, {w}\)"),
            (et.TokenSelection(good.visible.int(), good.target, good.grid), "int32"),
            (et.TokenSelection(good.visible[0], good.target, good.grid), "clips|int64"),
            (et.TokenSelection(good.visible, good.target, good.grid, steps=steps), "steps"),
        ]
        if case.pretraining:
            bad.append((et.TokenSelection(good.visible, None, good.grid), "target"))
        for selection, message in bad:
            with pytest.raises(ValueError, match=message):
                model(clips, token_selection=selection)
        model.everest.frame_sampler = et.InfoFrameSampler(2.0)
        with pytest.raises(ValueError, match="steps"):
            model(case.clips(frames=2 * case.clip[case.time]), token_selection=good)
        model.everest.frame_sampler = None
        case.close(case.run(model, clips, good), case.expected(case.plain(), clips, good))

    @kinds()
    def test_a_misspelt_argument(self, case):
        """Not swallowed with the masks that are ignored; transformers' own **kwargs do swallow it."""
        model = case.patched()
        own = inspect.signature(type(case.build(0)).forward).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            pytest.skip("its own forward takes anything")
        with pytest.raises(TypeError, match="selection"):
            model(case.clips(), selection=case.selection())


class TestDropPath:
    @kinds()
    def test_is_for_training_alone_and_drops_whole_branches(self, case):
        clips, selection = case.clips(batch=8), case.selection(batch=8)
        plain, model = case.patched(), case.patched(drop_path=0.5)
        assert torch.equal(case.run(model, clips, selection), case.run(plain, clips, selection))
        assert list(model.state_dict()) == list(plain.state_dict())
        model.train()
        first, second = (model_output(case, model, clips, selection, seed) for seed in (1, 2))
        assert not torch.allclose(first, second)
        assert torch.equal(first, model_output(case, model, clips, selection, 1))
        copied = copy.deepcopy(model).eval()
        assert torch.equal(case.run(copied, clips, selection), case.run(plain, clips, selection))

    @kinds()
    def test_bad_rates(self, case):
        model = case.build(0)
        for rate in (-0.1, 1.0, True, "0.1"):
            with pytest.raises(ValueError, match="drop_path"):
                case.patch(model, drop_path=rate)


def model_output(case: HostCase, model: Any, clips: Tensor, selection: et.TokenSelection, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return case.output(model(clips, token_selection=selection))
