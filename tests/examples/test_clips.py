"""examples/clips.py: numbers by hand, and clips of videos made on the spot whose frames carry their number as bars."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import Sampling, TestViews, TrainingClips, collate, frame_numbers, spatial_crops
from decoding import read_frames
from made_videos import (
    H264,
    HAS_X264,
    damage,
    numbers_in,
    turn,
    uneven_times,
    write_audio,
    write_frames,
    write_video,
)
from torch import Tensor
from torch.utils.data import DataLoader
from video_list import Entry

from everest_tokens.demo import sample_video
from everest_tokens.video import view_indices

LENGTH = 40
SQUARE = {"size": (84, 84), "length": LENGTH, "group": 10}
ODD = {"size": (91, 77), "pix_fmt": "yuv444p" if HAS_X264 else "yuv420p"}

# --- videos ---


def write(path: Path, codec: str = H264, **changes) -> Path:
    return write_video(path, codec, **(SQUARE | changes))


GOOD = {
    "h264.mp4": write,
    "mpeg4.avi": lambda path: write(path, "mpeg4"),
    "vp9.webm": lambda path: write(path, "libvpx-vp9"),
    "mjpeg.mkv": lambda path: write(path, "mjpeg", pix_fmt="yuvj420p", b_frames=0),
    "h264.ts": write,
    "uneven.mkv": lambda path: write(path, times=uneven_times()),
    "turned.mp4": lambda path: turn(write(path.with_suffix(".upright.mp4"), size=(84, 56)), path, 90),
    "odd.mp4": lambda path: write(path, **ODD),
    "small.mp4": lambda path: write(path, size=(28, 14)),
    "short.mp4": lambda path: write(path, length=3),
}
BAD = {
    "corrupted.mp4": (lambda path: damage(write(path), path, slice(None)), "none of its frames could be decoded"),
    "sound.wav": (write_audio, "audio only"),
    "garbage.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "undecodable"),
    "empty.mp4": (Path.touch, "empty"),
    "missing.mp4": (lambda path: None, "no such file"),
    "folder.mp4": (Path.mkdir, "a directory"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, write in GOOD.items():
        write(folder / name)
    for name, (write, _) in BAD.items():
        write(folder / name)
    return folder


@pytest.fixture
def good(folder: Path) -> list[Entry]:
    return [Entry(folder / name, label) for label, name in enumerate(GOOD)]


@pytest.fixture
def mixed(folder: Path) -> list[Entry]:
    """Good and bad in turn; the label is the place in the list."""
    names = [*sum(zip(GOOD, BAD, strict=False), ()), *list(GOOD)[len(BAD) :]]
    return [Entry(folder / name, label) for label, name in enumerate(names)]


@dataclass(frozen=True)
class Square:
    """A geometry that keeps the whole frame: sides become `size`, and a drawn number is written into the corner."""

    size: int = 28

    def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        clip = torch.nn.functional.interpolate(clip.float(), (self.size, self.size), mode="area").to(torch.uint8)
        clip[..., 0, 0] = int(torch.randint(256, (), generator=generator))
        return clip


# --- frame numbers ---


def test_dense_numbers_by_hand():
    assert frame_numbers(100, Sampling(4, 10)) == [34, 44, 54, 64]  # the clip spans 31 of 100 frames
    assert frame_numbers(25, Sampling(4, 10)) == [0, 10, 20, 24]
    assert frame_numbers(200, Sampling()) == list(range(69, 69 + 64, 4))
    assert view_indices(100, 4, 10, 1) == [[34, 44, 54, 64]]
    assert view_indices(100, 4, 10, 3) == [[0, 10, 20, 30], [34, 44, 54, 64], [69, 79, 89, 99]]
    assert view_indices(33, 4, 10, 2) == [[0, 10, 20, 30], [2, 12, 22, 32]]
    assert view_indices(25, 4, 10, 2) == [[0, 10, 20, 24], [0, 10, 20, 24]]
    starts = [view[0] for view in view_indices(31 + 9, 4, 10, 5)]
    assert starts == [0, 2, 4, 6, 9]  # 0, 2¼, 4½, 6¾, 9


def test_segment_numbers_by_hand():
    assert frame_numbers(40, Sampling(4, None)) == [5, 15, 25, 35]
    assert frame_numbers(7, Sampling(4, None)) == [0, 2, 4, 6]  # middles at 0.875, 2.625, 4.375, 6.125
    assert frame_numbers(2, Sampling(4, None)) == [0, 0, 1, 1]
    assert view_indices(40, 4, 0, 1) == [[5, 15, 25, 35]]
    assert view_indices(40, 4, 0, 2) == [[2, 12, 22, 32], [7, 17, 27, 37]]
    assert view_indices(1, 4, 0, 2) == [[0] * 4] * 2


@pytest.mark.parametrize("length", [1, 3, 41])
def test_random_segment_numbers_take_every_frame_of_their_segment(length):
    generator = torch.Generator().manual_seed(0)
    seen = [set() for _ in range(4)]
    for _ in range(600):
        for numbers, number in zip(seen, frame_numbers(length, Sampling(4, None), generator=generator), strict=True):
            numbers.add(number)
    bounds = [0, length // 4, length // 2, 3 * length // 4, length]
    for numbers, first, end in zip(seen, bounds, bounds[1:], strict=False):
        assert numbers == set(range(first, max(end, first + 1)))


def test_random_dense_numbers_start_wherever_they_fit():
    generator = torch.Generator().manual_seed(0)
    clips = [frame_numbers(12, Sampling(3, 4), generator=generator) for _ in range(100)]
    assert {tuple(clip) for clip in clips} == {(start, start + 4, start + 8) for start in range(4)}


@pytest.mark.parametrize(
    "arguments", [{"num_frames": 0}, {"num_frames": 8.0}, {"stride": 0}, {"stride": -4}, {"stride": True}]
)
def test_sampling_errors(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value}"):
        Sampling(**arguments)


# --- spatial crops ---


def ramp(height: int, width: int) -> Tensor:
    """(1, 3, height, width): a pixel's row, its column, and 7."""
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    return torch.stack(torch.broadcast_tensors(rows, columns, torch.tensor(7))).to(torch.uint8).unsqueeze(0)


@pytest.mark.parametrize(
    ("height", "width", "crops", "corners"),
    [
        (10, 25, 3, [(0, 0), (0, 7), (0, 15)]),
        (24, 10, 3, [(0, 0), (7, 0), (14, 0)]),
        (10, 25, 1, [(0, 7)]),
        (10, 10, 3, [(0, 0)] * 3),
    ],
)
def test_crops_by_hand(height, width, crops, corners):
    out = spatial_crops(ramp(height, width), crops, 10)
    assert out.shape == (crops, 1, 3, 10, 10)
    for crop, (top, left) in zip(out, corners, strict=True):
        assert torch.equal(crop, ramp(height, width)[..., top : top + 10, left : left + 10])


@pytest.mark.parametrize("shape", [(5, 12), (40, 96)])  # to 10 × 24
def test_crops_of_a_frame_that_is_resized(shape):
    columns = torch.linspace(0, 240, shape[1]).round().to(torch.uint8).expand(1, 3, *shape)
    left, centre, right = spatial_crops(columns, 3, 10)
    assert left.shape == (1, 3, 10, 10)
    for crop, middle in ((left, 5), (centre, 12), (right, 19)):
        column = middle / 24 * shape[1] - 0.5  # a pixel's middle lies half a pixel behind its beginning
        assert crop.float().mean() == pytest.approx(column * 240 / (shape[1] - 1), abs=2)


# --- training ---


@pytest.mark.parametrize("sampling", [Sampling(4, 5), Sampling(4, None)])
def test_items_of_every_kind_of_video(good, sampling):
    clips = TrainingClips(good, sampling, Square())
    for label, name in enumerate(GOOD):
        item = clips[label]
        assert item["bad"] == []
        assert item["labels"].tolist() == [label]
        assert item["labels"].dtype == torch.int64
        assert item["pixel_values"].shape == (1, 4, 3, 28, 28)
        assert item["pixel_values"].dtype == torch.uint8
        if name not in ("short.mp4", "turned.mp4"):
            first, *others = numbers_in(item["pixel_values"][0])
            if sampling.stride:
                assert others == [first + 5, first + 10, first + 15]
            else:
                assert [number // 10 for number in (first, *others)] == [0, 1, 2, 3]


def test_a_turned_video_is_upright(folder):
    clip = TrainingClips([Entry(folder / "turned.mp4")], Sampling(2, 5), lambda clip, generator: clip, short_side=0)[0]
    assert clip["pixel_values"].shape == (1, 2, 3, 84, 56)
    assert "labels" not in clip
    first, second = numbers_in(clip["pixel_values"][0].rot90(-1, (-2, -1)))  # it was turned to the left
    assert second == first + 5


def test_repeats_are_drawn_from_one_decoded_clip(good, monkeypatch):
    reads = []
    monkeypatch.setattr("clips.read_frames", lambda *args, **kwargs: reads.append(args) or read_frames(*args, **kwargs))
    item = TrainingClips(good, Sampling(4, 5), Square(), repeats=3)[0]
    assert len(reads) == 1
    assert item["pixel_values"].shape == (3, 4, 3, 28, 28)
    assert item["labels"].tolist() == [0, 0, 0]
    numbers = [numbers_in(clip) for clip in item["pixel_values"]]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len({int(clip[0, 0, 0, 0]) for clip in item["pixel_values"]}) > 1


def same(one: dict, other: dict) -> bool:
    if one.keys() != other.keys() or one["bad"] != other["bad"] or not torch.equal(one["labels"], other["labels"]):
        return False
    return torch.equal(one["pixel_values"], other["pixel_values"])


def test_an_item_depends_on_seed_epoch_and_index_alone(mixed):
    def data_set(seed: int = 5) -> TrainingClips:
        return TrainingClips(mixed, Sampling(4, 5), Square(), repeats=2, seed=seed)

    def epochs(workers: int) -> list[list[dict]]:
        """Batches of epochs 0 and 3, in the same loader: its workers live on."""
        clips = data_set()
        persistent = workers > 0
        loader = DataLoader(clips, 2, collate_fn=collate, num_workers=workers, persistent_workers=persistent)
        batches = []
        for epoch in (0, 3):
            clips.set_epoch(epoch)
            batches.append(list(loader))
        return batches

    alone, shared = epochs(0), epochs(2)
    for ours, theirs in zip(alone, shared, strict=True):
        assert len(ours) == len(theirs) == len(mixed) // 2
        assert all(same(*pair) for pair in zip(ours, theirs, strict=True))
    assert not any(same(*pair) for pair in zip(*alone, strict=True))  # another epoch is another stream

    clips = data_set()
    clips.set_epoch(3)
    backwards = {i: clips[i] for i in reversed(range(len(mixed)))}
    torch.rand(3)  # the global stream has no part in it
    assert all(same(backwards[i], clips[i]) for i in backwards)
    assert not any(same(backwards[i], data_set(6)[i]) for i in backwards)


def test_numbers_beyond_the_list_are_other_clips_of_its_videos(good):
    def cut(clip: Tensor, generator: torch.Generator) -> Tensor:
        return clip[:, :, :1, :1] * 0 + torch.randint(256, (), generator=generator).to(torch.uint8)

    entries = [Entry(entry.path, label) for label, entry in enumerate(good[:3])]
    clips = TrainingClips(entries, Sampling(2, 1), cut)
    again = [clips[1 + k * len(clips)] for k in range(8)]
    assert {int(item["labels"]) for item in again} == {1}
    assert len({int(item["pixel_values"].flatten()[0]) for item in again}) > 4  # of 256 that are drawn from
    assert len(list(clips)) == 3


def test_the_epoch_reaches_spawned_workers_too(good):
    clips = TrainingClips(good, Sampling(4, 5), Square())
    sent = pickle.loads(ForkingPickler.dumps(clips))
    before = sent[0]
    clips.set_epoch(7)
    assert same(sent[0], clips[0])
    assert not same(sent[0], before)


def test_bad_videos_are_replaced_by_others_with_their_own_labels(mixed, folder):
    clips = TrainingClips(mixed, Sampling(4, 5), Square())
    is_bad = [entry.path.name in BAD for entry in mixed]
    replaced = set()
    for epoch in range(4):
        clips.set_epoch(epoch)
        for i, entry in enumerate(mixed):
            item = clips[i]
            label = int(item["labels"])
            assert not is_bad[label]
            assert item["pixel_values"].shape == (1, 4, 3, 28, 28)
            # The very frames of the video whose label it carries, if it can be told by its shape.
            names = [Path(path).name for path, _ in item["bad"]]
            if is_bad[i]:
                assert names[0] == entry.path.name
                replaced.add(label)
            else:
                assert (label, names) == (i, [])
            for path, reason in item["bad"]:
                assert Path(path).parent == folder
                assert BAD[Path(path).name][1] in reason
    assert len(replaced) > 3  # not always the same one


def test_a_replacement_shows_what_its_label_says(tmp_path):
    entries = []
    for label in range(4):
        path = tmp_path / f"{label}.mp4"
        if label % 2:
            path.write_bytes(b"nothing")
        else:  # a video of one grey only
            write_frames(path, [np.full((32, 32, 3), 40 + 60 * label, np.uint8)] * 10)
        entries.append(Entry(path, label))
    clips = TrainingClips(entries, Sampling(2, 2), Square(), seed=1)
    labels = []
    for epoch in range(8):
        clips.set_epoch(epoch)
        for i in range(4):
            item = clips[i]
            labels.append(int(item["labels"]))
            assert labels[-1] == i or i % 2
            assert item["pixel_values"][..., 8:, :].float().mean() == pytest.approx(40 + 60 * labels[-1], abs=4)
    assert set(labels) == {0, 2}


def test_where_every_video_is_bad(folder):
    entries = [Entry(folder / name, 0) for name in BAD]
    with pytest.raises(ValueError, match=r"got 6 in a row that cannot") as error:
        TrainingClips(entries, Sampling(), Square())[2]
    assert "undecodable" in str(error.value)


def test_a_damaged_video_counts_as_bad_where_too_much_is_lost(tmp_path):
    entry = Entry(damage(write(tmp_path / "a.mp4"), tmp_path / "b.mp4", slice(10, 20)), 0)  # the second of four groups
    views = TestViews([entry], Sampling(4, None), 1, 1, 28)  # one frame in each group
    with pytest.warns(UserWarning, match="3 of the 4 frames"):
        item = views[0]
    assert item["problem"] == ""
    assert item["pixel_values"].any()
    item = TestViews([entry], Sampling(4, 6), 1, 1, 28)[0]  # 10, 16, 22, 28
    assert "2 of the 4 frames asked for could be decoded" in item["problem"]
    assert not item["pixel_values"].any()


def test_missing_pyav_is_no_bad_video(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="PyAV"):
        TrainingClips(good, Sampling(), Square())[0]


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.ts"])
def test_parts_of_long_videos(folder, name):
    """At 25 frames a second, 0.4 s is frame 10 and 1.2 s frame 30, which is the first one beyond."""
    entry = Entry(folder / name, 1, 0.4, 1.2)
    clips = TrainingClips([entry], Sampling(4, 2), Square())
    starts = set()
    for epoch in range(40):
        clips.set_epoch(epoch)
        first, *others = numbers_in(clips[0]["pixel_values"][0])
        assert others == [first + 2, first + 4, first + 6]
        starts.add(first)
    assert min(starts) == 10
    assert max(starts) == 23  # 29 is the last frame
    views = TestViews([entry], Sampling(4, None), 1, 1, 84)[0]["pixel_values"]
    assert numbers_in(views[0]) == [12, 17, 22, 27]


def test_a_part_beyond_the_end_is_bad(folder):
    item = TestViews([Entry(folder / "h264.mp4", 1, 5.0, 6.0)], Sampling(4, 2), 1, 1, 28)[0]
    assert "no frames from 5 to 6 s" in item["problem"]


def test_decoded_size(folder, good):
    """As small as the smallest crop allows, and never larger than it is."""

    @dataclass(frozen=True)
    class Geometry(Square):
        scales: tuple[float, ...] = (1.0, 0.7)

        def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
            shapes.append(clip.shape)
            return super().__call__(clip, generator)

    shapes: list[torch.Size] = []
    for name in ("h264.mp4", "odd.mp4", "small.mp4", "turned.mp4"):
        TrainingClips([Entry(folder / name)], Sampling(4, 5), Geometry())[0]
    # 28 / 0.7 = 40
    assert [tuple(shape[-2:]) for shape in shapes] == [(40, 40), (40, 47), (14, 28), (60, 40)]
    TrainingClips(good, Sampling(4, 5), Geometry(), short_side=0)[0]
    TrainingClips(good, Sampling(4, 5), Geometry(), short_side=60)[0]
    TrainingClips(good, Sampling(4, 5), Square())[0]
    assert [tuple(shape[-2:]) for shape in shapes[4:]] == [(84, 84), (60, 60)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": []}, "at least one video"),
        ({"entries": [Entry(Path("a"), 0), Entry(Path("b"))]}, "all labelled or all unlabelled"),
        ({"repeats": 0}, "repeats .* got 0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"short_side": -5}, "short_side .* got -5"),
    ],
)
def test_training_errors(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingClips(**{"entries": [Entry(Path("a"), 0)], "sampling": Sampling(), "geometry": Square(), **change})


# --- testing ---


def test_views_by_hand(folder):
    """Frames of 84 × 84 as they are: the bars say which; the crops of a square are one."""
    item = TestViews([Entry(folder / "h264.mp4", 3)], Sampling(3, 4), clips=2, crops=3, size=84)[0]
    assert item["pixel_values"].shape == (6, 3, 3, 84, 84)
    assert (item["labels"], item["index"], item["problem"]) == (3, 0, "")
    assert [numbers_in(view) for view in item["pixel_values"]] == [[0, 4, 8]] * 3 + [[31, 35, 39]] * 3


def test_views_are_crops_of_the_reduced_frame():
    video = sample_video()  # 640 × 272: 132 × 56
    views = TestViews([Entry(video)], Sampling(2, 3), clips=2, crops=3, size=56)[0]
    assert views["labels"] == -1
    frames = read_frames(video, [0, 3, 246, 249], short_side=56)
    assert frames.shape == (4, 3, 56, 132)
    expected = [frames[clip : clip + 2, :, :, x : x + 56] for clip in (0, 2) for x in (0, 38, 76)]
    assert torch.equal(views["pixel_values"], torch.stack(expected))


@pytest.mark.parametrize("crops", [1, 3])
def test_bad_videos_in_testing_are_zeros_with_a_problem(mixed, crops):
    views = TestViews(mixed, Sampling(4, 5), 2, crops, 28)
    seen = []
    for batch in DataLoader(views, batch_size=4, collate_fn=collate, num_workers=2):
        assert batch["pixel_values"].shape == (len(batch["problem"]), 2 * crops, 4, 3, 28, 28)
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["labels"].tolist() == batch["index"].tolist()
        for pixels, index, problem in zip(batch["pixel_values"], batch["index"], batch["problem"], strict=True):
            name = mixed[index].path.name
            assert (name in BAD) == (problem != "") == (not pixels.any())
            assert name not in BAD or (name in problem and BAD[name][1] in problem)
            seen.append(int(index))
    assert seen == list(range(len(mixed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": []}, "at least one video"),
        ({"clips": 0}, "clips .* got 0"),
        ({"size": 0}, "size .* got 0"),
        ({"crops": 2}, "crops must be 1 or 3, got 2"),
    ],
)
def test_views_errors(change, message):
    settings = {"entries": [Entry(Path("a"))], "sampling": Sampling(), "clips": 1, "crops": 1, "size": 28}
    with pytest.raises(ValueError, match=message):
        TestViews(**{**settings, **change})
