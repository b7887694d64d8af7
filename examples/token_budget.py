"""Batches of nearly equally many tokens, for models whose clips each keep their own number (`EnergyBudget`).

How many tokens a clip keeps is counted once, `python examples/prepare.py … --count_tokens MODEL`, and read again:

    counts = read_counts("lists/train.tokens", len(entries))
    sampler = TokenBudgetSampler(counts, tokens=8 * 512, seed=0)
    loader = DataLoader(clips, batch_sampler=sampler, collate_fn=collate)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from clips import collate, item_generator
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import everest_tokens as et
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of videos whose tokens sum up to `tokens` or a little less.

    Videos come in a random order until the rest of a batch is smaller than the largest; then the one of a pool of the
    next videos that fits best. What doesn't fill a batch for every rank at the end of an epoch is left out, and other
    videos are in the next. The batches of an epoch follow from (seed, epoch) alone; in each step the rank with the
    fewest tokens so far gets the fullest batch.

    Args:
        counts: tokens of each video.
        tokens: the most that a batch has.
        seed: of the order.
        rank, ranks: this process and how many there are.
        pool: how many videos of the order are looked at for the last places of a batch.

    Raises:
        ValueError: no counts, one below 1 or above `tokens`, a rank that isn't one of `ranks`, a pool below 1, or too
            few videos for a batch of every rank.
    """

    def __init__(
        self, counts: Sequence[int], tokens: int, *, seed: int = 0, rank: int = 0, ranks: int = 1, pool: int = 256
    ) -> None:
        if not counts or min(counts) < 1 or max(counts) > tokens:
            spread = f"{min(counts)} to {max(counts)}" if counts else "none"
            raise ValueError(f"expected counts of 1 to {tokens} tokens, what a batch may have, got {spread}")
        if not 0 <= rank < ranks:
            raise ValueError(f"expected a rank in 0…{ranks - 1}, got {rank}")
        if pool < 1:
            raise ValueError(f"expected a pool of at least 1 video, got {pool}")
        self.counts, self.tokens, self.seed, self.rank, self.ranks, self.pool = counts, tokens, seed, rank, ranks, pool
        self.epoch = 0
        self._made: tuple[int, list[list[int]]] = (-1, [])
        if not len(self):
            raise ValueError(
                f"{sum(counts)} tokens of {len(counts)} videos fill no batch of {tokens} for {ranks} ranks"
            )

    def set_epoch(self, epoch: int) -> None:
        """Change the order. accelerate's data loaders call this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._of_rank())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._of_rank())

    def _of_rank(self) -> list[list[int]]:
        if self._made[0] != self.epoch:
            batches, totals, own = list(self._batches()), [0] * self.ranks, []
            for start in range(0, len(batches) - self.ranks + 1, self.ranks):
                step = sorted(batches[start : start + self.ranks], key=self._size, reverse=True)
                for rank, batch in zip(sorted(range(self.ranks), key=totals.__getitem__), step, strict=True):
                    totals[rank] += self._size(batch)
                    if rank == self.rank:
                        own.append(batch)
            self._made = (self.epoch, own)
        return self._made[1]

    def _size(self, batch: list[int]) -> int:
        return sum(self.counts[video] for video in batch)

    def _batches(self) -> Iterator[list[int]]:
        """All ranks' batches of the epoch."""
        order = torch.randperm(len(self.counts), generator=item_generator(self.seed, self.epoch)).tolist()
        left, largest, coming = sum(self.counts), max(self.counts), iter(order)
        pool: list[tuple[int, int]] = []  # (tokens, video), ascending
        queue: dict[int, None] = {}  # the pool's videos in their order
        while left >= self.tokens:
            batch, rest = [], self.tokens
            while True:
                for video in islice(coming, self.pool - len(pool)):
                    bisect.insort(pool, (self.counts[video], video))
                    queue[video] = None
                if not pool or pool[0][0] > rest:
                    break
                video = next(iter(queue)) if rest >= largest else pool[bisect.bisect(pool, (rest + 1,)) - 1][1]
                count = self.counts[video]
                del pool[bisect.bisect_left(pool, (count, video))], queue[video]
                batch.append(video)
                rest, left = rest - count, left - count
            yield batch


def count_tokens(model: Any, clips: Sequence[Any], *, batch_size: int = 8, workers: int = 0) -> list[int]:
    """How many tokens a patched model keeps of each clip: its selector's budget, or the same of all without one.

    Args:
        clips: items with "pixel_values" uint8 (1, T, 3, H, W), such as `TestViews` of one view.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    counts: list[int] = []
    loader = DataLoader(clips, batch_size, num_workers=workers, collate_fn=collate)
    for batch in tqdm(loader, desc="counting tokens", unit="batch", disable=None):
        pixels = (batch["pixel_values"].flatten(0, 1) / 255 - mean) / std
        selection = et.select_tokens(model, pixels.to(model.device, model.dtype))
        lengths = selection.lengths
        counts += [selection.kept.shape[1]] * len(pixels) if lengths is None else lengths.tolist()
    return counts


def write_counts(counts: Sequence[int], file: str | os.PathLike[str]) -> None:
    """One number a line, in the order of the list of videos."""
    part = Path(f"{os.fspath(file)}.part")
    part.write_text("".join(f"{count}\n" for count in counts))
    os.replace(part, file)


def read_counts(file: str | os.PathLike[str], videos: int) -> list[int]:
    """Read what `write_counts` wrote. Raises ValueError where it isn't a number for each of so many videos."""
    lines = Path(file).read_text().split()
    if len(lines) != videos or not all(line.isdecimal() for line in lines):
        raise ValueError(f"{file}: expected a whole number for each of {videos} videos, got {len(lines)} lines")
    return [int(line) for line in lines]
