"""Each label as often as any other, whatever the data has of it: `--balanced`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from clips import TrainingClips, item_generator
from torch.utils.data import WeightedRandomSampler


class BalancedSampler(WeightedRandomSampler):
    """Draws videos with replacement, all labels with the same probability.

    What is drawn depends on (seed, the clips' epoch) alone, so that all processes draw the same, and a run that goes on
    draws what it would have drawn.

    Args:
        clips: labelled.
        num_samples: how many are drawn in an epoch.
    """

    def __init__(self, clips: TrainingClips, num_samples: int) -> None:
        videos = Counter(entry.label for entry in clips.entries)
        weights = [1 / videos[entry.label] for entry in clips.entries]
        super().__init__(weights, num_samples, replacement=True)
        self.clips = clips

    def __iter__(self) -> Iterator[int]:
        self.generator = item_generator(self.clips.seed, self.clips.epoch)
        drawn: Counter[int] = Counter()
        for i in super().__iter__():
            yield i + drawn[i] * len(self.clips)  # the same video, but another clip of it each time
            drawn[i] += 1
