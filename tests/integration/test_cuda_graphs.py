"""torch.compile(mode="reduce-overhead"): patched models are recorded as CUDA graphs, and replays see each new clip."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et

STEPS = 5  # one compiles and warms up, one records, the others replay


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def patched_pair(make_model: Any, cls: Any, device: str, **settings: Any) -> tuple[Any, Any, Any]:
    """The eager model, the compiled one and the compiled one's own module, with the same weights in float32."""
    model = et.patch_videomae(make_model(cls, image_size=64), **settings).to(device)
    twin = copy.deepcopy(model)
    return model, torch.compile(twin, fullgraph=True, dynamic=False, mode="reduce-overhead"), twin


def check_inference(make_model: Any, make_clips: Any, device: str) -> None:
    model, compiled, _ = patched_pair(make_model, VideoMAEForVideoClassification, device)
    for seed in range(STEPS):
        clips = make_clips(model, seed=seed).to(device)
        with torch.inference_mode():
            torch.compiler.cudagraph_mark_step_begin()
            actual = compiled(clips).logits.clone()  # a replay overwrites what the last one gave
            torch.testing.assert_close(actual, model(clips).logits, rtol=1e-3, atol=1e-4)


def check_training(make_model: Any, make_clips: Any, cls: Any, device: str) -> None:
    # Nothing random: the most changed of the kept tokens are the visible ones.
    settings = {"visible": et.ReRoSelector(0.2)} if cls is VideoMAEForPreTraining else {}
    labels = {} if cls is VideoMAEForPreTraining else {"labels": torch.tensor([1, 4], device=device)}
    model, compiled, twin = patched_pair(make_model, cls, device, **settings)
    model.train()
    compiled.train()
    model.config.problem_type = twin.config.problem_type = "single_label_classification"  # else set at the first step
    for seed in range(STEPS):
        clips = make_clips(model, seed=seed).to(device)
        torch.compiler.cudagraph_mark_step_begin()
        loss, expected = compiled(clips, **labels).loss, model(clips, **labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        loss.backward()
        expected.backward()
        for (name, reference), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert reference.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-2, atol=1e-3, msg=name)
        for module in (model, twin):
            module.zero_grad(set_to_none=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestReduceOverhead:
    def test_inference(self, make_model, make_clips):
        check_inference(make_model, make_clips, "cuda")
        assert counters["inductor"]["cudagraph_skips"] == 0

    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_training(self, make_model, make_clips, cls):
        check_training(make_model, make_clips, cls, "cuda")
        assert counters["inductor"]["cudagraph_skips"] == 0
