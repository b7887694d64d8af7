"""torch.onnx.export of patched models, run by onnxruntime beside the eager model."""

from __future__ import annotations

import warnings

import pytest
import torch
from host_contract import hosts, kinds
from torch import nn
from versions import before

import everest_tokens as et

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class OfClips(nn.Module):
    """A patched model as a function of clips alone."""

    def __init__(self, case, model):
        super().__init__()
        self.case, self.model = case, model

    def forward(self, clips):
        return self.case.output(self.model(clips))


def exported(case, model, path, frames=None, dynamo=True):
    if dynamo and before("torch", "2.8"):
        pytest.skip("torch 2.7's newer exporter doesn't say that it runs: is_in_onnx_export() is False")
    clips = case.clips(dtype=torch.float32, frames=frames)
    batch = {"dynamic_shapes": {"clips": {0: torch.export.Dim("batch", min=1, max=64)}}}
    if not dynamo:
        batch = {"input_names": ["clips"], "dynamic_axes": {"clips": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(OfClips(case, model), (clips,), path, dynamo=dynamo, verbose=False, **batch)
    return onnxruntime.InferenceSession(path)


def agree(case, model, session, frames=None):
    """A static clip, whose tokens all tie, a clip whose second half is static, and moving ones, at other batches."""
    for size in (1, 3):
        clips = case.clips(batch=size, seed=size, dtype=torch.float32, frames=frames)
        clips[0] = clips[0].narrow(case.time, 0, 1)
        half = clips.shape[case.time + 1] // 2
        clips[-1].narrow(case.time, half, half).copy_(clips[-1].narrow(case.time, half, 1).clone())
        with torch.no_grad():
            expected = case.output(model(clips))
        (actual,) = session.run(None, {"clips": clips.numpy()})
        case.close(torch.from_numpy(actual), expected, 1e-4)


@kinds(lambda case: not case.pretraining)
def test_every_host_selects_in_the_graph(case, tmp_path):
    model = case.shallow()
    agree(case, model, exported(case, model, tmp_path / "model.onnx"))


@hosts(lambda case: case.name in ("VideoMAEForVideoClassification", "vit"))
def test_the_older_exporter(case, tmp_path):
    model = case.shallow()
    agree(case, model, exported(case, model, str(tmp_path / "model.onnx"), dynamo=False))


@hosts(lambda case: case.name == "VideoMAEForPreTraining")
def test_pre_training_with_a_selector_of_visible_tokens(case, tmp_path):
    model = case.shallow(visible=et.ReRoSelector(0.25), mask_ratio=0.75)
    agree(case, model, exported(case, model, tmp_path / "model.onnx"))


@hosts(lambda case: case.name == "VideoMAEForVideoClassification")
def test_with_a_frame_sampler(case, tmp_path):
    model = case.shallow(frame_sampler=et.InfoFrameSampler(1.5))
    frames = 3 * case.clip[case.time] // 2
    agree(case, model, exported(case, model, tmp_path / "model.onnx", frames), frames)
