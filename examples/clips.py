"""Clips for training and views for testing, from a list of videos: which frames, which crops, and what if one is bad.

A video that cannot be read stops nothing and lends its label to nobody: in training another one takes its place with
its own label, in testing it is reported. Whatever happens, shapes are constant. Pixels stay uint8, a quarter of the
memory and of the traffic between processes, until they are on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from decoding import read_frames
from torch import Tensor
from torch.utils.data import Dataset
from video_list import Entry

from everest_tokens.video import dense_indices, view_indices

# A video is unreadable where more than this share of the frames asked for doesn't decode; below it, each of them
# repeats the frame before.
MAX_LOST = 0.25
# So many unreadable videos in a row are no accident.
MAX_REPLACEMENTS = 32


# --- Which frames ---


@dataclass(frozen=True)
class Sampling:
    """How a clip's frames are chosen.

    Args:
        num_frames: frames of a clip. With a frame sampler its candidates, tubelet_size · ⌊α·τ⌋.
        stride: from one frame to the next, in frames (dense sampling); None: one frame of each of `num_frames` equal
            segments of the video (TSN, Wang et al. 2016; Something-Something V2).

    Raises:
        ValueError: either is not a positive integer.
    """

    num_frames: int = 16
    stride: int | None = 4

    def __post_init__(self) -> None:
        for name, value in (("num_frames", self.num_frames), ("stride", 1 if self.stride is None else self.stride)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")


def frame_numbers(length: int, sampling: Sampling, *, generator: torch.Generator | None = None) -> list[int]:
    """The frames of one clip of a video of `length` frames: random with a generator, else the central ones.

    Dense: a clip that starts anywhere it fits, or lies in the middle; the last frame is repeated where the video is too
    short. Segments: any frame of each, or the middle one; of fewer frames than segments, some are repeated.
    """
    num_frames = sampling.num_frames
    if sampling.stride is not None:
        return dense_indices(length, num_frames, sampling.stride, generator=generator)
    if generator is None:
        return view_indices(length, num_frames, 0, 1)[0]
    numbers = []
    for segment in range(num_frames):
        first, end = segment * length // num_frames, (segment + 1) * length // num_frames
        numbers.append(first + int(torch.randint(max(end - first, 1), (), generator=generator)))
    return numbers


# --- Training ---


class ClipCutter:
    """Cuts augmented clips out of the first of some videos that can be read.

    The item is `{"pixel_values": uint8 (repeats, T, 3, S, S), "labels": int64 (repeats,), "bad": [(path, reason), …]}`,
    without "labels" where the video has none. It is decoded once, and `geometry` drawn `repeats` times (repeated
    augmentation, Hoffer et al. 2020). "bad" names the videos before it and why each was passed over.

    Args:
        sampling: which frames.
        geometry: (clip uint8 (T, 3, H, W), generator) → uint8 (T, 3, S, S), such as `TrainingGeometry`.
        repeats: clips of each decoded video.
        short_side: frames are decoded at this short side, if larger (see `read_frames`). By default at
            geometry.size / min(geometry.scales) where it has these, so that the smallest crop is not enlarged; 0: at
            their own size.

    Raises:
        ValueError: repeats or short_side out of range. On a call: none of the videos, or of the first 32, can be read.
    """

    def __init__(
        self,
        sampling: Sampling,
        geometry: Callable[[Tensor, torch.Generator], Tensor],
        repeats: int = 1,
        short_side: int | None = None,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be a positive integer, got {repeats!r}")
        if short_side is not None and short_side < 0:
            raise ValueError(f"short_side must be 0 (own size) or a number of pixels, got {short_side!r}")
        self.sampling, self.geometry, self.repeats = sampling, geometry, repeats
        self.short_side = _needed_short_side(geometry) if short_side is None else short_side or None

    def __call__(self, candidates: Iterable[Entry], generator: torch.Generator) -> dict[str, Any]:
        def choose(length: int) -> list[int]:
            return frame_numbers(length, self.sampling, generator=generator)

        bad: list[tuple[str, str]] = []
        for entry in islice(candidates, MAX_REPLACEMENTS):
            clip, problem = _read(entry, choose, self.short_side)
            if clip is not None:
                clips = torch.stack([self.geometry(clip, generator) for _ in range(self.repeats)])
                item = {"pixel_values": clips, "bad": bad}
                return item if entry.label is None else {**item, "labels": torch.full((self.repeats,), entry.label)}
            bad.append((str(entry.path), problem))
        reasons = "".join(f"\n  {reason}" for _, reason in bad[:5])
        raise ValueError(f"expected videos that can be read, got {len(bad)} in a row that cannot:{reasons}")


class TrainingClips(Dataset[dict[str, Any]]):
    """Random augmented clips of the videos in a list.

    Item i is `ClipCutter`'s of video i. Where it is unreadable the item shows another of the list, with that one's own
    label, and "bad" names video i and why (and any other that was tried).

    Item i + k · (number of videos) is another clip of video i, for one that an epoch has more than once.

    The item depends on (seed, epoch, i) alone, whichever worker makes it. `set_epoch` reaches running workers too.

    Args:
        entries: of `read_list`; all labelled or none.
        sampling, geometry, repeats, short_side: as `ClipCutter`'s.
        seed: of all that is random here.

    Raises:
        ValueError: no entries, some labelled and some not, or repeats, seed or short_side out of range. On an item: 32
            videos in a row, or all that there are, could not be read.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        sampling: Sampling,
        geometry: Callable[[Tensor, torch.Generator], Tensor],
        *,
        repeats: int = 1,
        seed: int = 0,
        short_side: int | None = None,
    ) -> None:
        _check_entries(entries)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed!r}")
        if len({entry.label is None for entry in entries}) > 1:
            raise ValueError("expected entries that are all labelled or all unlabelled, got both")
        self.entries, self.seed = entries, seed
        self.cut = ClipCutter(sampling, geometry, repeats, short_side)
        # In shared memory, because persistent workers keep their copy of the data set from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Change what is drawn. accelerate's data loaders call this at the start of each epoch."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))  # no number is beyond the end

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = item_generator(self.seed, self.epoch, i)
        return self.cut(self._candidates(i, generator), generator)

    def _candidates(self, i: int, generator: torch.Generator) -> Iterator[Entry]:
        """Entry i, and if that won't do others at random, each once."""
        yield self.entries[i % len(self.entries)]
        others = torch.randperm(len(self.entries), generator=generator).tolist()
        others.remove(i % len(self.entries))
        yield from (self.entries[other] for other in others)


def item_generator(seed: int, epoch: int, *place: int) -> torch.Generator:
    """What is random in the item of a place: first the frames are drawn, then the geometry."""
    state = np.random.SeedSequence((seed, epoch, *place)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def _needed_short_side(geometry: Any) -> int | None:
    size, scales = getattr(geometry, "size", None), getattr(geometry, "scales", None)
    # Rounded up, but not because of float error: 28 / 0.7 is 40.00000000000001.
    return None if size is None or not scales else math.ceil(round(size / min(scales), 6))


# --- Testing ---


class TestViews(Dataset[dict[str, Any]]):
    """Every video of a list in `clips` temporal views of `crops` spatial crops each.

    Item i is `{"pixel_values": uint8 (clips · crops, T, 3, S, S), "labels": label or -1, "index": i, "problem": ""}`,
    the crops of the first clip first. For an unreadable video "problem" says why, and the pixels are zeros.

    Args:
        entries: of `read_list`.
        sampling: which frames.
        clips: temporal views (see `view_indices`).
        crops: of the frame resized to a short side of `size`: 3 squares at the ends and in the middle of the long side
            (left, centre, right, or top, centre, bottom), or 1 in the middle.
        size: S.

    Raises:
        ValueError: no entries, clips or size not positive, or crops neither 1 nor 3.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    def __init__(self, entries: Sequence[Entry], sampling: Sampling, clips: int, crops: int, size: int) -> None:
        _check_entries(entries)
        for name, value in (("clips", clips), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if crops not in (1, 3):
            raise ValueError(f"crops must be 1 or 3, got {crops!r}")
        self.entries, self.sampling, self.clips, self.crops, self.size = entries, sampling, clips, crops, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> dict[str, Any]:
        entry, shape = self.entries[i], (self.clips * self.crops, self.sampling.num_frames, 3, self.size, self.size)

        def choose(length: int) -> list[int]:
            views = view_indices(length, self.sampling.num_frames, self.sampling.stride or 0, self.clips)
            return [number for view in views for number in view]

        frames, problem = _read(entry, choose, self.size)
        if frames is None:
            views = torch.zeros(shape, dtype=torch.uint8)
        else:
            crops = spatial_crops(frames, self.crops, self.size)  # (crops, clips·T, 3, S, S)
            views = crops.unflatten(1, (self.clips, -1)).transpose(0, 1).reshape(shape)
        label = -1 if entry.label is None else entry.label
        return {"pixel_values": views, "labels": label, "index": i, "problem": problem}


def spatial_crops(frames: Tensor, crops: int, size: int) -> Tensor:
    """Squares along the long side of frames (N, 3, H, W) resized to a short side of `size`: (crops, N, 3, size, size).

    Three crops: at its beginning, in its middle and at its end; one: in its middle.
    """
    from torchvision.transforms.v2 import functional

    height, width = frames.shape[-2:]
    if min(height, width) != size:
        short = min(height, width)
        height, width = round(height * size / short), round(width * size / short)
        frames = functional.resize(frames, [height, width], antialias=True)
    top, left = height - size, width - size  # one of them is 0
    places = [(0, 0), (top // 2, left // 2), (top, left)] if crops == 3 else [(top // 2, left // 2)]
    return torch.stack([frames[..., y : y + size, x : x + size] for y, x in places])


# --- Both ---


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of either data set: tensors and numbers stacked, "problem" a list, "bad" one list of all the items'."""
    batch: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if key == "bad":
            batch[key] = [bad for value in values for bad in value]
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def _check_entries(entries: Sequence[Entry]) -> None:
    if not entries:
        raise ValueError(f"expected at least one video, got {entries!r}")


def _read(entry: Entry, choose: Callable[[int], list[int]], short_side: int | None) -> tuple[Tensor | None, str]:
    """(frames uint8 (N, 3, H, W), "") of an entry's video or part of it, or (None, why there are none)."""
    part = None if entry.start is None or entry.end is None else (entry.start, entry.end)
    path = entry.path
    try:
        with entry.local() as path:
            return read_frames(path, choose, short_side=short_side, part=part, max_lost=MAX_LOST), ""
    except (ValueError, OSError) as error:  # what is wrong with a file; a missing decoder is an ImportError
        return None, str(error).replace(str(path), str(entry.path)) or repr(error)
