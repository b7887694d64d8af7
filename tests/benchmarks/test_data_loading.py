"""benchmarks/data_loading.py: its figures by hand, and that both ways make the same clip."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "data_loading.py"
    spec = importlib.util.spec_from_file_location("data_loading", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_clips_per_second_by_hand(benchmark):
    made = benchmark.summary([0.5, 0.25, 1.0, 2.0, 0.1], clips=2)  # 4, 8, 2, 1 and 20 clips a second
    assert made == {"clips_per_second": 4, "quartiles": [2, 8], "seconds": [0.5, 0.25, 1.0, 2.0, 0.1]}


def test_ratios_by_hand(benchmark, monkeypatch):
    seconds = {"usual": [3.0, 8.0, 3.0], "everest": [2.0, 2.0, 3.0]}  # 1.5, 4 and 1 times as long
    monkeypatch.setattr(benchmark, "paired_seconds", lambda *args, **kwargs: seconds)
    result = benchmark.measure(benchmark.default_videos(), 16, 4, 3, None)
    assert result["ratio"] == 1.5
    assert result["ratio_quartiles"] == [1, 4]
    assert result["everest"]["clips_per_second"] == 1  # two videos a round
    assert result["videos"] == ["bikes.mp4", "bigbuckbunny.mp4"]


def test_both_ways_make_the_same_clip(benchmark):
    """The same frames, crop and flip; of a frame that isn't decoded at a reduced size, nearly the same pixels."""
    pytest.importorskip("decord")
    steps = benchmark.Rounds(benchmark.default_videos()[:1], benchmark.Sampling(4, 4))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for epoch in range(3):
        steps.clips.set_epoch(epoch)
        ours = (steps.clips[0]["pixel_values"][0].float() / 255 - mean) / std
        generator = benchmark.item_generator(0, epoch, 0)
        usual = benchmark.usual_clip(steps.videos[0], steps.sampling, steps.scales, generator)
        assert ours.shape == usual.shape == (4, 3, 224, 224)
        assert usual.dtype == torch.float32
        assert (ours - usual).abs().mean() < 0.03


def test_what_is_timed_makes_a_clip_of_every_video(benchmark, monkeypatch):
    steps = benchmark.Rounds(benchmark.default_videos(), benchmark.Sampling(2, 1))
    made = []
    monkeypatch.setattr(
        benchmark, "usual_clip", lambda video, *args: made.append((video.name, args[-1].initial_seed()))
    )
    steps.usual()
    steps.usual()
    seeds = [benchmark.item_generator(0, epoch, i).initial_seed() for epoch in range(2) for i in range(2)]
    assert made == list(zip(["bikes.mp4", "bigbuckbunny.mp4"] * 2, seeds, strict=True))
    epochs = []
    monkeypatch.setattr(steps.clips, "set_epoch", epochs.append)
    steps.everest()
    steps.everest()
    assert epochs == [0, 1]
