"""What is said before a run, against models that really run; and a sampler that makes labels equally frequent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import plan as plan_module
import pytest
import torch
from balance import BalancedSampler
from clips import Sampling, TrainingClips
from plan import Timing, memory, plan, spoken
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification
from video_list import Entry

import everest_tokens as et
from everest_tokens.demo import _saved_bytes


def small(cls: type, **patch: Any) -> Any:
    config = VideoMAEConfig(
        image_size=64, num_frames=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384,
        decoder_hidden_size=48, decoder_num_attention_heads=3, decoder_intermediate_size=192,
    )  # fmt: skip
    return et.patch_videomae(cls(config), **patch).train()


class TestMemory:
    @pytest.mark.parametrize(
        ("cls", "frames", "patch"),
        [
            (VideoMAEForVideoClassification, 8, {}),
            (VideoMAEForPreTraining, 8, {}),
            (VideoMAEForVideoClassification, 12, {"frame_sampler": et.InfoFrameSampler(1.5)}),
        ],
    )
    def test_it_is_what_a_step_saves_and_what_an_optimiser_holds(self, cls, frames, patch):
        model = small(cls, **patch)
        weights, of_a_clip = memory(model)
        pixels = {"pixel_values": torch.randn(4, frames, 3, 64, 64)}
        assert of_a_clip == pytest.approx(_saved_bytes(model, pixels) / 4, rel=0.1)
        optimizer = torch.optim.AdamW(model.parameters())
        outputs = model(**pixels)
        (outputs.loss if cls is VideoMAEForPreTraining else outputs.logits.sum()).backward()
        optimizer.step()
        held = list(model.parameters()) + [p.grad for p in model.parameters() if p.grad is not None]
        held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert weights == pytest.approx(sum(value.nbytes for value in held), rel=0.02)

    def test_frozen_weights_need_less(self):
        model = small(VideoMAEForVideoClassification)
        for parameter in model.videomae.parameters():
            parameter.requires_grad_(False)
        frozen, whole = memory(model), memory(small(VideoMAEForVideoClassification))
        assert frozen[0] < whole[0] / 3
        assert frozen[1] < whole[1] / 3


class TestPlan:
    def test_it_says_what_will_happen(self):
        text = plan(
            small(VideoMAEForVideoClassification), clips=12, held_out=4, labels=["a", "b"],
            skipped=Counter({"hidden": 2, "other files": 1}), batch=4, at_once=2, epochs=3, steps=9,
        )  # fmt: skip
        assert "12 to train on, 4 held out; left out: 2 hidden, 1 other files" in text
        assert "2: a, b" in text
        assert "9 of 4 clips, 3 epochs" in text
        assert "8 frames of 64²: 38 of 64 tokens kept" in text  # ⌊0.6 · 4·4·4⌋

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.25, "0.25 s"),
            (40, "40 s"),
            (89, "89 s"),
            (90, "1.5 min"),
            (1200, "20 min"),
            (5400, "1.5 h"),
            (72000, "20 h"),
        ],
    )
    def test_times_as_one_says_them(self, seconds, text):
        assert spoken(seconds) == text

    def test_timing_is_of_the_steps_after_the_first(self, monkeypatch, caplog):
        clock = iter([100.0, 120.0])
        monkeypatch.setattr(plan_module.time, "perf_counter", lambda: next(clock))
        state = type("State", (), {"max_steps": 60, "num_train_epochs": 3, "is_local_process_zero": True})
        timing = Timing()
        with caplog.at_level("INFO"):
            for state.global_step in range(1, 61):
                timing.on_step_end(None, state, None)
        assert caplog.messages == ["2 s a step: an epoch takes about 40 s, what is left of the run 1.6 min"]


class TestBalancedSampler:
    def clips(self) -> TrainingClips:
        entries = [Entry(Path(f"{i}.mp4"), label) for i, label in enumerate([0] * 90 + [1] * 9 + [2])]
        return TrainingClips(entries, Sampling(2, 1), lambda clip, generator: clip)

    def test_all_labels_are_as_frequent(self):
        clips = self.clips()
        drawn = Counter(clips.entries[i % 100].label for i in BalancedSampler(clips, 3000))
        assert sum(drawn.values()) == 3000
        for label in range(3):  # 1000 ± 4.5 standard deviations
            assert drawn[label] == pytest.approx(1000, abs=4.5 * (3000 * 2 / 9) ** 0.5)

    def test_seed_and_epoch_decide(self):
        clips = self.clips()
        sampler, other = BalancedSampler(clips, 50), BalancedSampler(self.clips(), 50)
        assert list(sampler) == list(sampler) == list(other)
        first = list(sampler)
        clips.set_epoch(1)
        assert list(sampler) != first

    def test_a_video_that_is_drawn_again_is_numbered_on(self):
        of_video: dict[int, list[int]] = {}
        for i in BalancedSampler(self.clips(), 600):
            of_video.setdefault(i % 100, []).append(i // 100)
        assert len(of_video[99]) > 100  # the only one of its label
        assert all(numbers == list(range(len(numbers))) for numbers in of_video.values())
