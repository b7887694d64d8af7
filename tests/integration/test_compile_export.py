"""torch.compile and torch.export of patched models. The aot_eager backend traces all that inductor would compile."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et

SMALL = {
    "num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1,
    "image_size": 32,  # grid (4, 2, 2): 16 tokens
    "problem_type": "single_label_classification",  # transformers' loss sets it at the first step, which recompiles
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class TestCompile:
    @pytest.mark.parametrize(
        ("cls", "settings"),
        [
            (VideoMAEForPreTraining, {"selector": et.RunningCellSelector(0.5), "visible": et.TubeSelector(0.25)}),
            (VideoMAEForVideoClassification, {"selector": et.ReRoSelector(0.5, distance="cka")}),
        ],
    )
    def test_other_settings_make_one_graph(self, make_model, make_clips, cls, settings):
        model = et.patch_videomae(make_model(cls, **SMALL), **settings).train()
        clips, labels = make_clips(model), {"labels": torch.arange(2)}
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        given = labels if cls is VideoMAEForVideoClassification else {}
        losses = {compiled(clips, **given).loss.item() for _ in range(6)}
        assert counters["stats"]["unique_graphs"] == 1
        assert (len(losses) > 1) == (cls is VideoMAEForPreTraining)  # still random in the graph

    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_hidden_states_come_out(self, make_model, make_clips, cls):
        model = et.patch_videomae(make_model(cls, **SMALL), et.ReRoSelector(0.5), mask_ratio=0.75)
        clips = make_clips(model)
        selection = et.select_tokens(model, clips)
        # transformers cannot install its capturing hooks inside a graph, patched or not: run once in eager
        expected = model(clips, token_selection=selection, output_hidden_states=True)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        actual = compiled(clips, token_selection=selection, output_hidden_states=True)
        assert actual.hidden_states[0].shape[1] == selection.visible.shape[1]
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states)

    def test_other_live_settings_take_effect(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining, **SMALL), et.ReRoSelector(1.0))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips = make_clips(model)
        model.everest.mask_ratio = 0.5
        assert compiled(clips).logits.shape[1] == 8
        model.everest.visible = et.TubeSelector(0.25)
        assert compiled(clips).logits.shape[1] == 12
        model.everest.visible, model.everest.selector = None, et.RandomSelector(0.75)
        model.everest.frame_sampler = et.InfoFrameSampler(2.0)
        assert compiled(make_clips(model, frames=16)).logits.shape[1] == 4

    def test_a_selectors_own_settings_are_live_too(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEModel, **SMALL), et.ReRoSelector(0.5))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips, selector, answers = make_clips(model), model.everest.selector, []
        for settings, kept in (
            ({}, 8),
            ({"distance": "cosine", "descending": False}, 8),
            ({"anchor": "first", "keep_tokens": 11}, 11),
            ({"anchor": "middle", "keep_tokens": 5}, 5),
        ):
            for name, value in settings.items():
                setattr(selector, name, value)
            answers.append(compiled(clips).last_hidden_state)
            assert answers[-1].shape[1] == kept
            torch.testing.assert_close(answers[-1], model(clips).last_hidden_state)
        assert not torch.allclose(answers[0], answers[1])

    @pytest.mark.parametrize(("through", "used"), [("wrapper", True), ("model", False), ("in place", True)])
    def test_patching_after_compiling(self, make_model, make_clips, through, used):
        model = make_model(VideoMAEForVideoClassification, **SMALL)
        clips, plain = make_clips(model), copy.deepcopy(model)
        if through == "in place":
            model.compile(fullgraph=True, backend="eager")
            compiled = model
        else:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
        if used:
            torch.testing.assert_close(compiled(clips).logits, plain(clips).logits)
        given = compiled if through == "wrapper" else model
        assert et.patch_videomae(given, et.ReRoSelector(0.5)) is given
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))
        torch.testing.assert_close(compiled(clips).logits, patched(clips).logits)
        assert not torch.allclose(patched(clips).logits, plain(clips).logits)
        assert torch.equal(et.select_tokens(given, clips).kept, et.select_tokens(patched, clips).kept)
        et.unpatch_videomae(given)
        torch.testing.assert_close(compiled(clips).logits, plain(clips).logits)

    def test_a_mask_is_ignored_without_a_warning(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining, **SMALL), et.ReRoSelector(0.5))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="bool_masked_pos")
            out = compiled(make_clips(model), bool_masked_pos=torch.ones(2, 16, dtype=torch.bool))
        assert out.logits.shape[1] == 7


class TestExport:
    def test_frame_sampler(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification, **SMALL)
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5))
        clips = make_clips(model, batch=3, frames=12)
        shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (), {"pixel_values": clips[:2]}, dynamic_shapes=shapes, strict=False)
        torch.testing.assert_close(program.module()(pixel_values=clips)[0], model(clips).logits)

    def test_camera(self, make_model, make_clips):
        model = et.patch_videomae(
            make_model(VideoMAEForVideoClassification, **SMALL), et.ReRoSelector(0.5, camera="compensate")
        )
        still = torch.nn.functional.avg_pool2d(make_clips(model, batch=3)[:, 0], 3, stride=1, padding=1)
        frames = model.config.num_frames
        clips = torch.stack([still.roll(frame, dims=-1) for frame in range(frames)], dim=1)
        shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (), {"pixel_values": clips[:2]}, dynamic_shapes=shapes, strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        torch.testing.assert_close(loaded(pixel_values=clips)[0], model(clips).logits)
        selector = model.everest.selector
        ignored = et.select_tokens(model, clips)
        selector.camera = "ignore"
        assert not torch.equal(et.select_tokens(model, clips).importance, ignored.importance)
