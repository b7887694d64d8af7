"""examples/decoding.py on videos made on the spot, whose frames carry their number."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import av
import by_torchcodec
import decoding
import numpy as np
import pytest
import torch
from decoding import read_frames, video_length
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_videos import (
    GROUP,
    HAS_X264,
    KINDS,
    LENGTH,
    damage,
    full_decode,
    numbers_in,
    packets,
    picture,
    turn,
    uneven_times,
    watch,
    write_audio,
    write_video,
)
from torchvision.transforms.v2 import functional


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        path = folder / name
        return path if path.exists() else KINDS[name][0](path)

    return make


@pytest.fixture(scope="module")
def faststart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MP4 that has its index in front, so that one cut off or damaged behind it can still be opened."""
    return write_video(tmp_path_factory.mktemp("videos") / "fast.mp4", muxer={"movflags": "faststart"})


@pytest.fixture
def torchcodec_again() -> object:
    """Lets the test change what importing torchcodec does."""
    by_torchcodec.torchcodec_decoder.cache_clear()
    yield
    by_torchcodec.torchcodec_decoder.cache_clear()


# --- reading frames ---


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(made, name):
    path, carried = made(name), KINDS[name][1]
    assert video_length(path, backend="pyav") == len(carried)
    frames = read_frames(path, range(len(carried)), backend="pyav")
    assert frames.dtype == torch.uint8
    assert numbers_in(frames) == carried
    assert torch.equal(frames, full_decode(path))


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_by_itself(made, name):
    path, carried = made(name), KINDS[name][1]
    for number, expected in enumerate(carried):
        assert numbers_in(read_frames(path, [number], backend="pyav")) == [expected]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_and_any_repetition(made, name, data):
    path, carried = made(name), KINDS[name][1]
    indices = data.draw(st.lists(st.integers(0, len(carried) + 20), min_size=1, max_size=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a whole file that is merely short is no reason to warn
        frames = read_frames(str(path), indices, backend="pyav")
    assert numbers_in(frames) == [carried[min(i, len(carried) - 1)] for i in indices]


@pytest.mark.parametrize("indices", [np.array([3, 1]), torch.tensor([3, 1]), (3, 1), iter([np.int32(3), 1])])
def test_indices_may_be_any_integers(made, indices):
    assert numbers_in(read_frames(made("b-frames.mp4"), indices)) == [3, 1]


@pytest.mark.parametrize(("name", "at_most"), [("b-frames.mp4", 6), ("b-frames.mkv", 6 + GROUP), ("mpeg4.avi", 53)])
def test_decodes_no_more_than_needed(made, name, at_most, monkeypatch):
    decoded = []
    frames = decoding._Reader._frames

    def counting(self, *arguments):
        for frame in frames(self, *arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(decoding._Reader, "_frames", counting)
    # 49 and 52 belong to the group that starts at 48; an AVI is counted from the start.
    assert numbers_in(read_frames(made(name), [52, 49], backend="pyav")) == [52, 49]
    assert len(decoded) <= at_most


STEADY = [name for name in KINDS if name.endswith((".mp4", ".mkv")) and name != "hidden-frames.mkv"]


@pytest.mark.parametrize("name", STEADY)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_left_out_changes_no_pixel(made, name, data):
    """Groups of pictures without wanted frames are jumped over, frames nobody refers to are skipped, in one pass."""
    path, carried = made(name), KINDS[name][1]
    indices = data.draw(st.lists(st.integers(0, len(carried) - 1), min_size=1, max_size=6))
    decode, passes = decoding._Reader._decode, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding._Reader, "_decode", lambda *args: passes.append(args) or decode(*args))
        frames = read_frames(path, indices, backend="pyav")
    assert len(passes) == 1
    assert torch.equal(frames, full_decode(path)[indices])


@pytest.mark.skipif(not HAS_X264, reason="needs to know how the encoder orders the frames")
def test_jumps_and_skips(tmp_path, monkeypatch):
    """Stored as 0 3 1 2 6 4 5 9 7 8 11 10 | 12 …: nobody refers to 1, 2, 4, …"""
    params = "bframes=2:b-adapt=0:b-pyramid=none:scenecut=0:keyint=12:min-keyint=12:open-gop=0"
    path = write_video(tmp_path / "ibbp.mp4", x264=params)
    decoded = []
    frames = decoding._Reader._frames

    def counting(self, *arguments):
        for frame in frames(self, *arguments):
            decoded.append(self.numbers[frame.pts])
            yield frame

    monkeypatch.setattr(decoding._Reader, "_frames", counting)
    for indices, needed in (
        ([9, 6], [0, 3, 6, 9]),
        ([4, 50], [0, 3, 4, 6, 48, 50]),  # 4 refers to 6, and 51 comes after 50
        ([13, 12], [12, 13]),
    ):
        decoded.clear()
        assert numbers_in(read_frames(path, indices, backend="pyav")) == indices
        assert decoded == needed


@pytest.mark.parametrize("frames", [3, GROUP])
def test_a_seek_that_goes_too_far_is_mended(tmp_path, monkeypatch, frames):
    # This codec decodes without a key frame too, to something grey.
    path = write_video(tmp_path / "mpeg4.mp4", "mpeg4", b_frames=0)
    far = watch(monkeypatch, decoding, frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers_in(read_frames(path, [29, 40], backend="pyav")) == [29, 40]
    assert len(far) == 3  # to number the frames, to seek, and once more from the start


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured(made, tmp_path, rotation):
    path = turn(made("b-frames.mp4"), tmp_path / "turned.mp4", rotation)
    upright = read_frames(made("b-frames.mp4"), [0, 37], backend="pyav")
    turned = read_frames(path, [0, 37], backend="pyav")
    assert turned.shape == ((2, 3, 64, 96) if rotation == 180 else (2, 3, 96, 64))
    assert torch.equal(turned, torch.rot90(upright, rotation // 90, dims=(2, 3)))


def test_indices_chosen_from_the_length(made):
    lengths = []
    frames = read_frames(made("b-frames.mp4"), lambda length: lengths.append(length) or [length - 1, 3])
    assert lengths == [LENGTH]
    assert numbers_in(frames) == [59, 3]
    with pytest.raises(ValueError, match="a frame index must be an integer of at least 0, got -1"):
        read_frames(made("b-frames.mp4"), lambda length: [-1])


# --- reduced size ---


@pytest.mark.parametrize(
    ("name", "short_side", "shape"),
    [
        ("b-frames.mp4", 32, (32, 48)),
        ("b-frames.mp4", 64, (64, 96)),
        ("b-frames.mp4", 200, (64, 96)),  # never larger than it is
        ("odd-size.mp4", 31, (31, 46)),  # 65 × 97
        ("mpeg4.avi", 33, (33, 50)),  # 49.5
    ],
)
def test_reduced_size(made, name, short_side, shape):
    frames = read_frames(made(name), [44, 7], short_side=short_side, backend="pyav")
    assert frames.shape == (2, 3, *shape)
    assert frames.dtype == torch.uint8
    assert numbers_in(frames) == [44, 7]
    expected = functional.resize(read_frames(made(name), [44, 7], backend="pyav"), [*shape], antialias=True).float()
    # Colours are stored at half the size: only grey tells how exact the resizing is.
    assert (frames[:, :, : shape[0] // 2 - 2].float() - expected[:, :, : shape[0] // 2 - 2]).abs().mean() < 3


def test_reducing_averages_instead_of_dropping_pixels(tmp_path):
    """Stripes one pixel wide become an even grey."""
    stripes = np.where(np.arange(96) % 2, 235, 16).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    frame = av.VideoFrame.from_ndarray(stripes, "rgb24").reformat(format="yuv444p")
    stream = types.SimpleNamespace(codec_context=types.SimpleNamespace(height=64, width=96))
    reduced = decoding._ToReducedRGB("x", stream, 16)(frame)
    assert reduced.shape == (16, 24, 3)
    assert reduced[:, 3:-3].float().std() < 6
    assert reduced.float().mean() == pytest.approx(125, abs=4)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_reduced_size_of_a_turned_video(made, tmp_path, rotation):
    path = turn(made("b-frames.mp4"), tmp_path / "turned.mp4", rotation)
    upright = read_frames(made("b-frames.mp4"), [0, 37], short_side=32, backend="pyav")
    turned = read_frames(path, [0, 37], short_side=32, backend="pyav")
    assert turned.shape == ((2, 3, 32, 48) if rotation == 180 else (2, 3, 48, 32))
    assert torch.equal(turned, torch.rot90(upright, rotation // 90, dims=(2, 3)))


# --- parts ---


@pytest.mark.parametrize("name", [name for name in KINDS if name[:4] not in ("unev", "one-", "same", "time")])
def test_parts(made, name):
    """At 25 frames a second, frames 20 … 34 are shown from 0.8 s to before 1.4 s."""
    carried = KINDS[name][1]
    lengths = []

    def choose(length: int) -> list[int]:
        lengths.append(length)
        return [14, 0, 3, 99]

    frames = read_frames(made(name), choose, part=(0.8, 1.4), backend="pyav")
    assert lengths == [15]
    assert numbers_in(frames) == [carried[number] for number in (34, 20, 23, 34)]
    assert numbers_in(read_frames(made(name), [0, 400], part=(0, 0.12), backend="pyav")) == [carried[0], carried[2]]
    last = read_frames(made(name), [0, 1, 9], part=(len(carried) / 25 - 0.08, 1e6), backend="pyav")
    assert numbers_in(last) == [carried[-2], carried[-1], carried[-1]]
    with pytest.raises(ValueError, match=r"has no frames from 7 to 9\.5 s"):
        read_frames(made(name), [0], part=(7, 9.5), backend="pyav")


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_parts_go_by_time_stamps(made, name):
    times = np.array(uneven_times()) / 1000
    times -= times[0]
    first = int((times <= 2).nonzero()[0][-1])  # what is shown at 2 s
    inside = list(range(first, int((times < 3.5).sum())))
    assert numbers_in(read_frames(made(name), range(len(inside)), part=(2, 3.5), backend="pyav")) == inside


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_of_a_long_video_only_the_part_is_read(tmp_path, suffix, monkeypatch):
    path = write_video(tmp_path / f"long.{suffix}", length=1000)  # 40 s
    containers = watch(monkeypatch, decoding)
    frames = read_frames(path, [0, 24, 49], part=(20, 22), backend="pyav")
    assert numbers_in(frames) == [number % 256 for number in (500, 524, 549)]
    assert sum(container.read for container in containers) < 300


def test_a_seek_beyond_the_part_is_mended(tmp_path, monkeypatch):
    path = write_video(tmp_path / "far.mp4", length=200)
    watch(monkeypatch, decoding, 50)
    assert numbers_in(read_frames(path, [0, 9, 24], part=(4, 5), backend="pyav")) == [100, 109, 124]


def test_a_damaged_part(made, tmp_path):
    path = damage(made("b-frames.mp4"), tmp_path / "damaged.mp4", slice(24, 36))
    with pytest.warns(UserWarning, match="3 of the 5 frames"):
        frames = read_frames(path, [0, 3, 5, 15, 20], part=(0.8, 2))  # 20, 23, 25, 35, 40
    assert numbers_in(frames) == [20, 23, 23, 23, 40]


# --- damage ---


def test_cut_off_file_repeats_the_last_decodable_frame(faststart, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(faststart.read_bytes()[: packets(faststart)[36].pos])  # the key frame of the fourth group
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers_in(read_frames(path, [3, 30])) == [3, 30]
    with pytest.warns(UserWarning, match="2 of the 4 frames") as record:
        frames = read_frames(path, [3, 30, 40, 59])
    assert len(record) == 1
    assert str(path) in str(record[0].message)
    assert record[0].filename == __file__
    assert numbers_in(frames) == [3, 30, 35, 35]


def test_cut_off_avi(made, tmp_path):
    path, whole = tmp_path / "cut.avi", made("mpeg4.avi")
    path.write_bytes(whole.read_bytes()[: packets(whole)[36].pos])
    with pytest.warns(UserWarning, match="1 of the 2 frames") as record:
        frames = read_frames(path, [10, 50])
    assert len(record) == 1
    first, last = numbers_in(frames)
    assert first == 10
    assert 30 <= last < 40


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_damage_in_the_middle_leaves_the_other_frames_their_numbers(made, tmp_path, container):
    path = damage(made(f"b-frames.{container}"), tmp_path / f"damaged.{container}", slice(24, 36))  # the third group
    assert video_length(path) == LENGTH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers_in(read_frames(path, [5, 23])) == [5, 23]
        assert numbers_in(read_frames(path, [59, 36])) == [59, 36]
    with pytest.warns(UserWarning, match=r"damaged\..*3 of the 5 frames") as record:
        frames = read_frames(path, [50, 30, 23, 24, 36, 30])
    assert len(record) == 1
    assert numbers_in(frames) == [50, 23, 23, 23, 36, 23]


@pytest.mark.parametrize(
    ("numbers", "indices", "message", "carried"),
    [
        (slice(0, 12), [0, 20], "1 of the 2 frames", [12, 20]),  # nothing before it: the next
        (slice(48, 60), [50, 40, 59, 70], "1 of the 3 frames", [47, 40, 47, 47]),  # 70 isn't promised by the file
    ],
)
def test_damage_at_the_ends(made, tmp_path, numbers, indices, message, carried):
    path = damage(made("b-frames.mp4"), tmp_path / "damaged.mp4", numbers)
    with pytest.warns(UserWarning, match=message):
        assert numbers_in(read_frames(path, indices)) == carried


def test_damage_everywhere_is_undecodable(made, tmp_path):
    path = damage(made("b-frames.mp4"), tmp_path / "damaged.mp4", slice(None))
    with pytest.raises(ValueError, match=r"damaged\.mp4: undecodable, none of its frames"):
        read_frames(path, [0])


def test_how_much_may_be_lost(made, tmp_path):
    path = damage(made("b-frames.mp4"), tmp_path / "damaged.mp4", slice(24, 36))
    with pytest.warns(UserWarning, match="2 of the 4 frames"):
        read_frames(path, [5, 30, 25, 40], max_lost=0.5)
    with pytest.raises(ValueError, match=r"damaged\.mp4: damaged or cut off, 2 of the 4 frames asked for"):
        read_frames(path, [5, 30, 25, 40], max_lost=0.49)
    assert numbers_in(read_frames(path, [5, 40], max_lost=0)) == [5, 40]


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("missing.mp4", lambda path: None, "no such file"),
        ("folder.mp4", Path.mkdir, "a directory"),
        ("empty.mp4", Path.touch, r"empty \(0 bytes\)"),
        ("garbage.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "undecodable"),
        ("sound.wav", write_audio, "audio only"),
    ],
)
def test_what_is_no_video(tmp_path, name, make, problem):
    path = tmp_path / name
    make(path)
    for use in (video_length, lambda path: read_frames(path, [0])):
        with pytest.raises(ValueError, match=problem) as error:
            use(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("indices", "printed"),
    [
        ([], r"\[\]"),
        ([0, -1], "-1"),
        ([1.5], "1.5"),
        ([0, None], "None"),
        ([True], "True"),
        (torch.tensor([0.0, 2.0]), "0.0"),
        (torch.tensor([True, False]), "True"),
        (np.zeros(0, int), "array"),
        (torch.tensor(3), "3"),
        (7, "7"),
        ("12", "'1'"),
    ],
)
def test_bad_indices(made, indices, printed):
    with pytest.raises(ValueError, match=printed):
        read_frames(made("one-frame.mp4"), indices)


# --- backends ---


def test_unknown_backend(made):
    for use in (video_length, lambda path, backend: read_frames(path, [0], backend=backend)):
        with pytest.raises(ValueError, match="'pyav', 'torchcodec' or None, got 'decord'"):
            use(made("one-frame.mp4"), backend="decord")


@pytest.mark.usefixtures("torchcodec_again")
def test_neither_backend_installed(made, monkeypatch):
    path = made("one-frame.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for backend in (None, "pyav"):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[video\]'"):
            read_frames(path, [0], backend=backend)


@pytest.mark.usefixtures("torchcodec_again")
@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('no FFmpeg')",
        "raise OSError('libavutil')",
        "raise ImportError",
        "ffmpeg_major_version = None",
    ],
)
def test_torchcodec_that_does_not_load(made, tmp_path, monkeypatch, code):
    path = made("b-frames.mp4")
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text(code)
    (tmp_path / "torchcodec" / "decoders.py").write_text("VideoDecoder = None")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers_in(read_frames(path, [33])) == [33]
    with pytest.raises(ImportError, match="torchcodec is not installed"):
        read_frames(path, [33], backend="torchcodec")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        del sys.modules[name]  # the test's own, before monkeypatch puts the real one back


class FakeDecoder:
    """Stands for torchcodec: frame i is a picture of the number i + 100, and 9 doesn't decode."""

    size, ticks = (96, 64), 0

    def __init__(self, path: str, *, custom_frame_mappings: str, **options: int) -> None:
        assert options == {"stream_index": 0, "num_ffmpeg_threads": 1}
        self.times = [frame["pts"] for frame in json.loads(custom_frame_mappings)["frames"]]

    def get_frames_at(self, indices: list[int]) -> types.SimpleNamespace:
        assert indices == sorted(set(indices))
        if 9 in indices:
            raise RuntimeError("Could not push packet to decoder")
        data = torch.stack([torch.from_numpy(picture(i + 100, *self.size)).permute(2, 0, 1) for i in indices])
        seconds = torch.tensor([(self.times[i] + self.ticks) / 12800 for i in indices], dtype=torch.float64)
        return types.SimpleNamespace(data=data, pts_seconds=seconds)


def test_torchcodec_where_it_is_asked_for(made, monkeypatch):
    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: FakeDecoder)
    path = made("b-frames.mp4")
    assert video_length(path, backend="torchcodec") == LENGTH
    assert numbers_in(read_frames(path, [5, 2, 5], backend="torchcodec")) == [105, 102, 105]
    assert numbers_in(read_frames(path, [5, 2, 5])) == [5, 2, 5]


def test_torchcodec_reduced_and_in_parts(made, monkeypatch):
    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: FakeDecoder)
    path = made("b-frames.mp4")
    frames = read_frames(path, [5, 2, 5], short_side=32, backend="torchcodec")
    assert frames.shape == (3, 3, 32, 48)
    assert numbers_in(frames) == [105, 102, 105]
    assert read_frames(path, [5], short_side=65, backend="torchcodec").shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match=r"not for torchcodec .*part"):
        read_frames(path, [5], part=(0.4, 2), backend="torchcodec")


@pytest.mark.parametrize(
    ("name", "change", "indices", "problem"),
    [
        ("b-frames.mp4", {}, [9], "Could not push"),
        ("b-frames.mp4", {"ticks": 512}, [3, 4], "frames of other times"),
        ("b-frames.mp4", {"size": (48, 32)}, [3], "changes its size"),
        ("hidden-frames.mkv", {}, [3], "time stamps don't number"),
        ("b-frames.ts", {}, [3], "Matroska"),
        ("mpeg4.avi", {}, [3], "Matroska"),
    ],
)
def test_what_torchcodec_is_not_trusted_with(made, monkeypatch, name, change, indices, problem):
    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: type("Fake", (FakeDecoder,), change))
    with pytest.raises(ValueError, match=f"not for torchcodec .*{problem}.*backend='pyav' may read it") as error:
        read_frames(made(name), indices, backend="torchcodec")
    assert str(made(name)) in str(error.value)


def test_torchcodec_is_not_asked_for_what_is_cut_off(faststart, tmp_path, monkeypatch):
    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: FakeDecoder)
    path = tmp_path / "cut.mp4"
    path.write_bytes(faststart.read_bytes()[: packets(faststart)[36].pos])
    with pytest.raises(ValueError, match="seems to be cut off"):
        read_frames(path, [40], backend="torchcodec")


def test_a_torchcodec_that_takes_no_map_of_frames_is_too_old(monkeypatch):
    module = types.ModuleType("torchcodec.decoders")
    module.VideoDecoder = lambda path, num_ffmpeg_threads: None
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    assert by_torchcodec.torchcodec_decoder.__wrapped__() is None


@pytest.fixture
def real_torchcodec() -> None:
    pytest.importorskip("torchcodec", exc_type=Exception, reason="torchcodec is not installed or fails to import")
    if by_torchcodec.torchcodec_decoder() is None:
        pytest.skip("torchcodec finds no FFmpeg shared libraries on this system")


TORCHCODEC_KINDS = [name for name in KINDS if name.endswith((".mp4", ".mkv")) and name != "hidden-frames.mkv"]


@pytest.mark.usefixtures("real_torchcodec")
@pytest.mark.parametrize("name", TORCHCODEC_KINDS)
def test_backends_agree(made, name):
    path, length = made(name), len(KINDS[name][1])
    indices = [length - 1, 0, length // 2, length // 3, 0, length + 7]
    assert video_length(path, backend="torchcodec") == length
    frames = read_frames(path, indices, backend="torchcodec")
    assert torch.equal(frames, read_frames(path, indices, backend="pyav"))


@pytest.mark.usefixtures("real_torchcodec")
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_backends_agree_on_rotation(made, tmp_path, rotation):
    path = turn(made("b-frames.mp4"), tmp_path / "turned.mp4", rotation)
    assert torch.equal(read_frames(path, [3, 44], backend="torchcodec"), read_frames(path, [3, 44], backend="pyav"))


@pytest.mark.usefixtures("real_torchcodec")
def test_torchcodec_names_a_file_without_video(tmp_path):
    write_audio(tmp_path / "sound.mkv")
    with pytest.raises(ValueError, match=r"sound\.mkv.*audio only"):
        read_frames(tmp_path / "sound.mkv", [0], backend="torchcodec")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_side": 0}, "short_side .* got 0"),
        ({"short_side": 1.5}, "short_side .* got 1.5"),
        ({"part": (2, 1)}, r"part must be .* got \(2, 1\)"),
        ({"part": (-1, 1)}, r"part must be .* got \(-1, 1\)"),
        ({"part": (0, float("inf"))}, "part must be .* inf"),
        ({"part": (float("nan"), 1)}, r"part must be .* got \(nan, 1\)"),
        ({"max_lost": 1.1}, "max_lost .* got 1.1"),
    ],
)
def test_read_frames_errors(made, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_frames(made("b-frames.mp4"), [0], **arguments)
