"""Batches of nearly equally many tokens, and the counts that they go by."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_videos import write_frames
from tiny_videomae import build_model
from token_budget import TokenBudgetSampler, read_counts, write_counts
from torch.utils.data import DataLoader
from transformers import VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.video import load_clip


def counts_of(videos: int, seed: int, skew: float = 1.0) -> list[int]:
    """109 to 1006 of 1568 tokens, as videos of Kinetics keep; skewed towards few or many."""
    draw = random.Random(seed)
    return [round(109 + 897 * draw.random() ** skew) for _ in range(videos)]


class TestSampler:
    @given(
        videos=st.integers(300, 3000),
        seed=st.integers(0, 1000),
        skew=st.sampled_from([0.4, 1.0, 2.5]),
        tokens=st.sampled_from([4096, 5000, 8192]),
        ranks=st.sampled_from([1, 2, 4]),
        epoch=st.integers(0, 3),
    )
    def test_batches_are_full_and_ranks_alike(self, videos, seed, skew, tokens, ranks, epoch):
        counts, samplers = counts_of(videos, seed, skew), []
        for rank in range(ranks):
            samplers.append(TokenBudgetSampler(counts, tokens, seed=seed, rank=rank, ranks=ranks))
            samplers[-1].set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        sizes = [[sum(counts[video] for video in batch) for batch in own] for own in batches]
        assert len({len(own) for own in batches}) == 1, "a rank would wait for the others"
        assert [len(sampler) for sampler in samplers] == [len(own) for own in batches]
        assert max(max(own) for own in sizes) <= tokens
        assert sum(map(sum, sizes)) >= 0.97 * tokens * sum(map(len, sizes))
        assert max(map(sum, sizes)) <= 1.02 * min(map(sum, sizes))
        drawn = Counter(video for own in batches for batch in own for video in batch)
        assert max(drawn.values()) == 1
        # left out is less than a step of all ranks, and a batch that couldn't be filled
        left_out = sum(count for video, count in enumerate(counts) if video not in drawn)
        assert left_out < (ranks + 1) * tokens

    def test_the_order_follows_from_seed_and_epoch(self):
        counts = counts_of(500, 0)

        def batches(seed: int, epoch: int) -> list[list[int]]:
            sampler = TokenBudgetSampler(counts, 4096, seed=seed)
            sampler.set_epoch(epoch)
            assert list(sampler) == list(sampler)
            return list(sampler)

        made = [batches(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert made == [batches(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert all(one != other for i, one in enumerate(made) for other in made[:i])

    def test_no_size_comes_late(self):
        """Small and large videos are drawn all over the epoch, though the last place of a batch asks for a size."""
        counts = counts_of(4000, 0)
        batches = list(TokenBudgetSampler(counts, 4096))
        drawn = [counts[video] for batch in batches for video in batch]
        quarters = [drawn[i * len(drawn) // 4 : (i + 1) * len(drawn) // 4] for i in range(4)]
        means = [sum(quarter) / len(quarter) for quarter in quarters]
        assert max(means) / min(means) < 1.1

    def test_a_loader_takes_it(self):
        sampler = TokenBudgetSampler([3, 1, 2, 2, 4], 4)
        loader = DataLoader(torch.arange(5), batch_sampler=sampler)
        assert [batch.tolist() for batch in loader] == list(sampler)
        assert sorted(video for batch in sampler for video in batch) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], 8), "got none"),
            (([3, 9], 8), "counts of 1 to 8 tokens, what a batch may have, got 3 to 9"),
            (([0, 3], 8), "got 0 to 3"),
            (([3, 3], 8), "6 tokens of 2 videos fill no batch of 8 for 1 ranks"),
        ],
    )
    def test_bad_settings(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TokenBudgetSampler(*arguments)
        with pytest.raises(ValueError, match="rank in 0…1, got 2"):
            TokenBudgetSampler([3, 3], 3, rank=2, ranks=2)
        with pytest.raises(ValueError, match="a pool of at least 1 video, got 0"):
            TokenBudgetSampler([10] * 100, 50, pool=0)  # would make empty batches for ever


def test_counts_are_those_of_each_videos_middle(tmp_path, capsys):
    """A saved model's budget, of videos of noise in a growing part of the picture."""
    generator = np.random.default_rng(0)
    for number in range(3):
        frames = np.full((40, 48, 48, 3), 90, np.uint8)
        frames[:, : 16 * number + 16] = generator.integers(0, 255, (40, 16 * number + 16, 48, 3), np.uint8)
        write_frames(tmp_path / f"{number}.mp4", frames)
    listed = tmp_path / "train.csv"
    listed.write_text("2.mp4 0\n0.mp4 1\n1.mp4 0\n")
    model = build_model(VideoMAEForVideoClassification, image_size=48)
    et.patch_videomae(model, et.RunLengthSelector(0.5)).save_pretrained(tmp_path / "model")
    summary = prepare.count_tokens_of(listed, tmp_path, str(tmp_path / "model"), stride=2)
    expected = []
    for number in (2, 0, 1):
        clip = load_clip(tmp_path / f"{number}.mp4", num_frames=8, stride=2, size=48)
        expected += et.select_tokens(model, clip).lengths.tolist()
    assert expected == [36, 18, 27]  # the first step's 9, and the rows of noise of three more
    assert read_counts(tmp_path / "train.tokens", 3) == expected
    assert summary == f"{tmp_path / 'train.tokens'}: 18 to 36 tokens a clip, 27 on average"
    et.patch_videomae(model, et.ReRoSelector(0.5)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="keeps equally many tokens of every clip"):
        prepare.count_tokens_of(listed, tmp_path, str(tmp_path / "other"), stride=2)


def test_files_of_counts(tmp_path):
    file = Path(tmp_path, "train.tokens")
    write_counts([5, 17], file)
    assert read_counts(file, 2) == [5, 17]
    assert [each.name for each in tmp_path.iterdir()] == ["train.tokens"]
    for content, videos in (("5\n17\n", 3), ("5\n-1\n", 2), ("5\nx\n", 2)):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"a whole number for each of {videos} videos"):
            read_counts(file, videos)
