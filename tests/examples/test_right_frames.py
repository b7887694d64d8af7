"""Frames of files after public reports about decoders: by every way to read those of decoding from the start."""

from __future__ import annotations

import json
import socket
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import by_torchcodec
import pytest
import torch
from decoding import read_frames, video_length
from made_by_ffmpeg import COLOURS, H264, OTHERS, SEEKING, encode, shown_by_ffmpeg
from made_videos import GROUP, LENGTH, full_decode, numbers_in, write_video

from everest_tokens.video import load_clip

ALL = {**SEEKING, **COLOURS, **OTHERS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        path = folder / name
        return path if path.exists() else ALL[name](path)

    return make


@pytest.fixture
def real_torchcodec() -> None:
    pytest.importorskip("torchcodec", exc_type=Exception, reason="torchcodec is not installed or fails to import")
    if by_torchcodec.torchcodec_decoder() is None:
        pytest.skip("torchcodec finds no FFmpeg shared libraries on this system")


def by_load_clip(path: Path, number: int, size: tuple[int, int]) -> torch.Tensor:
    pixels = {"mean": (0,) * 3, "std": (1,) * 3}
    clip = load_clip(path, start=number, num_frames=1, size=size, **pixels)
    return (clip[0, 0] * 255).round().to(torch.uint8)


# --- key frames and what they promise ---


@pytest.mark.parametrize("name", SEEKING)
def test_every_frame_is_that_of_decoding_from_the_start(made, name):
    whole, path = full_decode(made(name)), made(name)
    assert video_length(path, backend="pyav") == len(whole)
    assert torch.equal(read_frames(path, range(len(whole)), backend="pyav"), whole)
    for number in range(len(whole)):
        assert torch.equal(read_frames(path, [number], backend="pyav")[0], whole[number]), number
    for number in (0, 1, len(whole) // 2, len(whole) - 1):
        assert torch.equal(by_load_clip(path, number, tuple(whole.shape[-2:])), whole[number]), number


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    "kind", ["open-gop=1:keyint=12:min-keyint=12:bframes=3", "intra-refresh=1:keyint=100:bframes=0"]
)
def test_parts_of_a_long_video_are_those_of_decoding_from_the_start(tmp_path, kind, suffix):
    # So wide that a refresh, a column of blocks a frame, takes four seconds.
    path = encode(tmp_path / f"long.{suffix}", *H264, f"{kind}:scenecut=0", length=200, size=(1600, 64))
    whole = full_decode(path)
    for first in (30, 95, 110, 130, 160):
        part = (first / 25, first / 25 + 0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(read_frames(path, range(5), part=part), whole[first : first + 5]), first


@pytest.mark.usefixtures("real_torchcodec")
@pytest.mark.parametrize("name", {**SEEKING, **COLOURS})
def test_torchcodec_gives_the_same_or_is_not_asked(made, name):
    whole, path = full_decode(made(name)), made(name)
    for number in range(len(whole)):
        with suppress(ValueError):
            assert torch.equal(read_frames(path, [number], backend="torchcodec")[0], whole[number]), number


@pytest.mark.usefixtures("real_torchcodec")
@pytest.mark.parametrize("name", ["intra-refresh.mp4", "open.mp4", "open-hevc.mkv", "vp9.webm", "av1.mp4", "grey.mp4"])
def test_torchcodec_itself_reads_what_it_can(made, name):
    whole = full_decode(made(name))
    assert torch.equal(read_frames(made(name), [50, 21, 37], backend="torchcodec"), whole[[50, 21, 37]])


class Mapped:
    """Stands for torchcodec; notes which frames it is told that decoding may begin at."""

    keys: list[int]

    def __init__(self, path: str, *, custom_frame_mappings: str, **options: Any) -> None:
        frames = json.loads(custom_frame_mappings)["frames"]
        type(self).keys = [number for number, frame in enumerate(frames) if frame["key_frame"]]

    def get_frames_at(self, numbers: list[int]) -> types.SimpleNamespace:
        raise RuntimeError("no more than that")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("intra-refresh.mp4", [0]),
        ("intra-refresh.mkv", [0]),
        ("intra-refresh-hevc.mp4", [0]),
        ("open.mp4", [*range(0, LENGTH, GROUP)]),  # H.264 says of these that pictures are right from there on
        ("open-hevc.mp4", [*range(0, LENGTH, GROUP)]),
        ("vp9.webm", [*range(0, LENGTH, GROUP)]),
    ],
)
def test_where_decoding_may_begin(made, monkeypatch, name, keys):
    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: Mapped)
    with pytest.raises(ValueError, match="no more than that"):
        read_frames(made(name), [3], backend="torchcodec")
    assert Mapped.keys == keys


# --- what is shown ---


@pytest.mark.parametrize("name", {**COLOURS, **OTHERS})
def test_frames_are_those_that_ffmpeg_shows(made, name):
    """In number, order and size; in colour up to the way in which programs blow up halved colours."""
    path, shown = made(name), shown_by_ffmpeg(made(name))
    frames = read_frames(path, range(len(shown)))
    assert video_length(path) == len(shown)
    assert frames.shape == shown.shape
    if name != "turned.mp4":  # of which the bars lie
        assert numbers_in(frames) == numbers_in(shown)
    assert (frames.float() - shown.float()).abs().mean() < 2
    for number in {0, len(shown) // 2, len(shown) - 1}:
        assert torch.equal(read_frames(path, [number])[0], frames[number])  # whatever else is asked for
        assert torch.equal(by_load_clip(path, number, tuple(shown.shape[-2:])), frames[number])


# --- time stamps ---


def with_equal_times(path: Path, length: int = 75) -> Path:
    """H.264 whose frames 20, 40 and 60 are shown at the time of the frame after them, and whose rate changes at 30."""
    source = write_video(path.with_name(f"source-{path.name}"), length=length, b_frames=0)
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            tick = number + 2 * max(number - 30, 0)
            late = {20: 1, 40: 3, 60: 3}.get(number, 0)
            packet.time_base, packet.dts, packet.pts = Fraction(1, 25), tick, tick + late
            packet.stream = stream
            writer.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_equal_time_stamps_hide_no_frame_but_vp8s(tmp_path, suffix):
    path = with_equal_times(tmp_path / f"equal.{suffix}")
    assert video_length(path) == 75
    assert numbers_in(read_frames(path, range(75))) == [*range(75)]
    for number in (19, 20, 21, 41, 74):
        assert numbers_in(read_frames(path, [number])) == [number]
        assert numbers_in(by_load_clip(path, number, (64, 96))[None]) == [number]


def test_a_part_of_a_video_goes_by_its_time_stamps(tmp_path):
    """Up to frame 30 every frame takes 0.04 s, from then on 0.12 s."""
    path = with_equal_times(tmp_path / "equal.mp4")
    # 1.2 s is frame 30; 0.6 s later come 5 more. On average a frame takes 0.0875 s: 1.2 s would be frame 14.
    assert numbers_in(read_frames(path, range(5), part=(1.2, 1.8))) == [30, 31, 32, 33, 34]
    assert numbers_in(read_frames(path, [0, 99], part=(0.4, 0.6))) == [10, 14]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_part_begins_with_the_frame_that_is_shown_there(tmp_path, suffix):
    path = write_video(tmp_path / f"slow.{suffix}", length=30, times=[1000 * i for i in range(30)])  # one a second
    assert numbers_in(read_frames(path, range(3), part=(3.5, 5.5))) == [3, 4, 5]
    assert numbers_in(read_frames(path, [0, 9], part=(3.2, 3.9))) == [3, 3]
    assert numbers_in(read_frames(path, [0, 9], part=(3, 4))) == [3, 3]
    with pytest.raises(ValueError, match="has no frames"):
        read_frames(path, [0], part=(40, 41))


# --- paths ---

NAMES = [
    *("file:b.mp4", "a:b.mp4", "http:b.mp4", "pipe:", "pipe:0", "concat:a.mp4|b.mp4", "-i", "-", "subfile,,:b.mp4"),
    *("data:b", "%d.mp4", 'q"uote.mp4', "tab\t.mp4", " space .mp4", "ü ☃.mp4", "line\nbreak.mp4", "async:cache:b.mp4"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
def test_a_path_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "b.mp4", length=3)
    with pytest.raises(ValueError, match="no such file"):
        load_clip(name)
    with pytest.raises(ValueError, match="no such file"):
        read_frames(name, [0])
    write_video(tmp_path / "x.mp4", length=30).rename(tmp_path / name)
    path = name if relative else tmp_path / name
    assert numbers_in(read_frames(path, [29])) == [29]
    assert numbers_in(by_load_clip(path, 29, (64, 96))[None]) == [29]


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:9,\n{}\n", "ffconcat version 1.0\nfile '{}'\n"])
def test_a_file_leads_to_no_other_place(tmp_path, text):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        path = tmp_path / "list.mp4"
        path.write_text(text.format(f"http://127.0.0.1:{server.getsockname()[1]}/b.ts"))
        for read in (load_clip, lambda path: read_frames(path, [0])):
            with pytest.raises(ValueError, match=r"list\.mp4: (undecodable|no video)"):
                read(path)
        with pytest.raises(TimeoutError):
            server.accept()


def test_torchcodec_gets_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []

    class Noting(Mapped):
        def __init__(self, path: str, **options: Any) -> None:
            paths.append(path)
            super().__init__(path, **options)

    monkeypatch.setattr(by_torchcodec, "torchcodec_decoder", lambda: Noting)
    write_video(tmp_path / "b.mp4", length=3)
    (tmp_path / "b.mp4").rename(tmp_path / "file:b.mp4")
    with pytest.raises(ValueError, match="no more than that"):
        read_frames("file:b.mp4", [0], backend="torchcodec")
    assert paths == [str(tmp_path / "file:b.mp4")]
