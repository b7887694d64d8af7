"""movies.py: files that play, read back with PyAV and Pillow, show each frame of the video, and what is kept of it."""

from __future__ import annotations

import os
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from made_videos import HAS_X264, damage, full_decode, numbers_in, picture, turn, write_audio, write_frames, write_video
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining

import everest_tokens as et
from everest_tokens import movies
from everest_tokens.cli import main
from everest_tokens.movies import COLOURS, Film
from everest_tokens.video import load_clip

pytestmark = pytest.mark.skipif(not HAS_X264, reason="this PyAV has no libx264")

SIDE = 400  # of a panel in an .mp4 of three; its first one begins at (48, 80)
TOP, LEFT, GAP = 48, 80, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small VideoMAE: 4 × 4 × 4 tokens of 8 frames."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"image_size": 64, "num_frames": 8, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    config = VideoMAEConfig(**sizes, **decoder, intermediate_size=96, decoder_intermediate_size=48)
    VideoMAEForPreTraining(config).save_pretrained(path)
    return path


def visualize(video, out, folder, *options) -> int:
    return main(["visualize", str(video), "--model", str(folder), "--out", str(out), *map(str, options)])


def panel(images: torch.Tensor, number: int, side: int = SIDE) -> torch.Tensor:
    left = LEFT + number * (side + GAP)
    return images[:, :, TOP : TOP + side, left : left + side]


def file_of(path) -> tuple[dict, list[Fraction]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        about = {"codec": stream.codec_context.name, "pix_fmt": stream.pix_fmt, "rate": stream.average_rate}
        about |= {"streams": len(container.streams), "size": (stream.width, stream.height), "frames": stream.frames}
        return about, [frame.pts * stream.time_base for frame in container.decode(stream)]


def test_an_mp4_shows_every_frame_at_the_source_s_rate(tmp_path, folder, capsys):
    video = write_video(tmp_path / "in.mp4", length=45, size=(64, 64))
    assert visualize(video, tmp_path / "out.mp4", folder, "--stride", 2) == 0
    about, times = file_of(tmp_path / "out.mp4")
    assert about["codec"] == "h264"
    assert about["pix_fmt"] == "yuv420p"
    assert about["rate"] == 25
    assert about["frames"] == 45
    assert about["streams"] == 1
    assert all(side % 2 == 0 for side in about["size"])
    assert times == [Fraction(i, 25) for i in range(45)]
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before all of it is there
    images = full_decode(tmp_path / "out.mp4")
    assert numbers_in(panel(images, 0)) == list(range(45))
    shown = capsys.readouterr()
    assert "45/45" in shown.err
    assert f"drawn in {tmp_path / 'out.mp4'}" in shown.out
    assert not list(tmp_path.glob(".*"))


def test_what_is_kept_in_each_window_is_what_the_model_keeps_of_that_clip(tmp_path, folder):
    """Windows of 16 frames, every second of which the model takes; the last one reaches back to frame 24."""
    video = write_video(tmp_path / "in.mp4", length=40, size=(64, 64))
    assert visualize(video, tmp_path / "out.mp4", folder, "--stride", 2) == 0
    images = full_decode(tmp_path / "out.mp4").float()
    model = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(folder).eval())
    for start, frames in ((0, range(16)), (16, range(16, 32)), (24, range(32, 40))):
        clip = load_clip(video, num_frames=8, stride=2, start=start, size=64)
        selection = et.select_tokens(model, clip)
        for frame in frames:
            step = (frame - start) // 4
            kept, original = (panel(images[frame : frame + 1], number) for number in (1, 0))
            inside = slice(10, -10)  # without edges
            for token, (one, two) in enumerate(zip(tokens_of(kept), tokens_of(original), strict=True)):
                same = (one[..., inside, inside] - two[..., inside, inside]).abs().mean() < 12
                assert same == (16 * step + token in selection.kept[0]), (frame, token)
            if frame - start - 4 * step == 2:
                line = line_at(images[-1], frame / 40)
                assert line == pytest.approx(int(selection.frame_counts[0, step]) / 16, abs=0.03)


def tokens_of(images: torch.Tensor) -> list[torch.Tensor]:
    return [part for row in images.chunk(4, 2) for part in row.chunk(4, 3)]


def line_at(image: torch.Tensor, share: float) -> float:
    """How high the line of what is kept is there, in shares of its axes."""
    top, height, width = TOP + SIDE + 16, 96, 3 * SIDE + 2 * GAP
    column = image[:, top : top + height, LEFT + int(share * (width - 2)) - 2].T - torch.tensor(COLOURS[0])
    rows = (column.abs().sum(dim=1) < 120).nonzero().flatten().float()
    return 1 - rows.mean().item() / (height - 3)


def test_uneven_times_stay(tmp_path, folder):
    times = [0, 40, 80, 400, 440, 1000, 1040, 1080, 1200]
    video = write_video(tmp_path / "in.mp4", times=times, length=len(times), size=(64, 64))
    assert visualize(video, tmp_path / "out.mp4", folder, "--stride", 1, "--quiet") == 0
    _, shown = file_of(tmp_path / "out.mp4")
    assert [round(1000 * time) for time in shown] == times


@pytest.mark.parametrize("length", [1, 3])
def test_a_video_shorter_than_a_clip_repeats_its_last_frame_for_the_model_alone(tmp_path, folder, length):
    video = write_video(tmp_path / "in.mp4", length=length, size=(64, 64))
    film = Film(video, 8, 2, (64, 64))
    film.shown = (64, 64)
    ((clip, frames),) = film.windows()
    assert torch.equal(clip, load_clip(video, num_frames=8, stride=2, start=0, size=64))
    assert [(place, time) for place, time, _ in frames] == [(i // 2, i) for i in range(length)]
    assert visualize(video, tmp_path / "out.mp4", folder, "--stride", 2) == 0
    assert len(file_of(tmp_path / "out.mp4")[1]) == length


def test_windows_are_clips_that_load_clip_loads(tmp_path):
    video = write_video(tmp_path / "in.mp4", length=37, size=(96, 64))
    film = Film(video, 4, 3, (32, 32))
    film.shown = (40, 40)
    windows = list(film.windows())
    starts = [0, 12, 24, 27]  # what comes last is frame 36
    assert len(windows) == len(starts)
    for (clip, _), start in zip(windows, starts, strict=True):
        assert torch.equal(clip, load_clip(video, num_frames=4, stride=3, size=32, start=start))
    assert [time for _, frames in windows for _, time, _ in frames] == list(range(37))
    assert [place for place, _, _ in windows[-1][1]] == [3]


def test_a_rotated_video_is_shown_upright(tmp_path, folder):
    upright = write_video(tmp_path / "upright.mp4", length=8, size=(64, 64))
    sideways = write_frames(tmp_path / "sideways.mp4", (np.rot90(picture(i, 64, 64), -1).copy() for i in range(8)))
    turn(sideways, tmp_path / "in.mp4", 90)
    for video in (upright, tmp_path / "in.mp4"):
        assert visualize(video, tmp_path / "out.mp4", folder, "--stride", 1, "--quiet") == 0
        assert numbers_in(panel(full_decode(tmp_path / "out.mp4"), 0)) == list(range(8))


def test_no_more_than_a_window_s_frames_are_held(tmp_path, monkeypatch):
    """However long the video: what is alive of its frames, whenever one is written."""
    video = write_video(tmp_path / "in.mp4", length=120, size=(64, 64))
    film, alive, most = Film(video, 4, 2, (32, 32)), set(), []

    class Counted(movies.video.ToRGB):
        def __call__(self, frame):
            alive.add(number := len(most))
            pixels = super().__call__(frame)
            weakref.finalize(pixels, alive.discard, number)
            most.append(len(alive))
            return pixels

    monkeypatch.setattr(movies.video, "ToRGB", Counted)
    film.shown = (32, 32)
    for _ in film.windows():
        pass
    assert len(most) == 120
    assert max(most) <= 8 + 2


def test_a_gif_plays_one_clip(tmp_path, folder):
    video = write_video(tmp_path / "in.mp4", length=60, size=(64, 64))
    assert visualize(video, tmp_path / "out.gif", folder, "--stride", 2, "--start", 20) == 0
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 8
        assert gif.info["duration"] == 80
        assert gif.info["loop"] == 0
        shown = []
        for i in range(8):
            gif.seek(i)
            shown.append(np.asarray(gif.convert("RGB")))
    images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    assert numbers_in(panel(images, 0, 240)) == list(range(20, 36, 2))


@pytest.mark.parametrize(("seconds", "duration"), [(200, 655350), (0.002, 20)])
def test_a_gif_of_few_or_very_many_frames_a_second(tmp_path, folder, seconds, duration):
    """As long as the format has room for, and as short as browsers play."""
    times = [int(1000 * seconds * i) for i in range(40)]
    video = write_video(tmp_path / "in.mp4", times=times, length=len(times), size=(64, 64))
    assert visualize(video, tmp_path / "out.gif", folder, "--quiet") == 0
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (8, duration)


def test_strategies_play_too(tmp_path, folder):
    video = write_video(tmp_path / "in.mp4", length=9, size=(64, 64))
    assert visualize(video, tmp_path / "out.mp4", folder, "--draw", "strategies", "--stride", "1") == 0
    about, times = file_of(tmp_path / "out.mp4")
    assert len(times) == 9
    assert about["size"][0] > 7 * 224
    assert numbers_in(panel(full_decode(tmp_path / "out.mp4"), 0, 224)) == list(range(9))


def test_frames_that_do_not_decode_are_left_out_and_counted(tmp_path, folder, capsys):
    whole = write_video(tmp_path / "whole.mkv", "mpeg4", length=60, size=(64, 64), b_frames=0)
    damaged = damage(whole, tmp_path / "in.mkv", slice(58, 60))
    assert visualize(damaged, tmp_path / "out.mp4", folder, "--stride", "1", "--quiet") == 0
    frames = len(file_of(tmp_path / "out.mp4")[1])
    assert frames < 60
    assert f"damaged or cut off, {frames} of 60 frames are drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["in.mp4", "--out", "x.webm"], "expected a name that ends in .png, .pdf, .svg, .gif, .mp4, got x.webm"),
        (["in.mp4", "in.mp4", "--out", "x.mp4"], "expected one video to play in x.mp4, got 2"),
        (["in.mp4", "--start", "3", "--out", "x.mp4"], "x.mp4 plays the whole video: --start is of a clip"),
        (["in.mp4", "--out", "./in.mp4"], "in.mp4 is the video itself: give another --out"),
        (
            ["in.mp4", "--draw", "strategies", "--keep-ratio", "0", "--out", "x.mp4"],
            "keep_ratio must be a number in (0, 1]",
        ),
        (["in.mp4", "--stride", "0", "--out", "x.mp4"], "stride must be an integer of at least 1, got 0"),
        (["in.mp4", "--out", "locked/x.mp4"], "locked/x.mp4 can't be written"),
        (["sound.wav", "--out", "x.mp4"], "sound.wav: no video stream, audio only"),
        (["in.mp4", "--start", "99", "--out", "x.gif"], "start must be below the video's length 3, got 99"),
    ],
)
def test_what_can_not_be_played_is_one_line_and_status_2(options, message, tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "in.mp4", length=3, size=(64, 64))
    write_audio(tmp_path / "sound.wav")
    (tmp_path / "locked").mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    assert main(["visualize", *options, "--model", str(folder)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if path.name.lstrip(".").startswith("x.")]


def test_a_run_that_is_cut_off_leaves_the_old_file_and_nothing_else(tmp_path, folder, monkeypatch):
    video = write_video(tmp_path / "in.mp4", length=20, size=(64, 64))
    (tmp_path / "out.mp4").write_bytes(b"old")

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(movies.Page, "image", interrupted)
    assert visualize(video, tmp_path / "out.mp4", folder, "--quiet") == 130
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_a_gif_that_is_cut_off_leaves_the_old_file_and_nothing_else(tmp_path, folder, monkeypatch):
    video = write_video(tmp_path / "in.mp4", length=20, size=(64, 64))
    (tmp_path / "out.gif").write_bytes(b"old")

    def interrupted(image, file, *given, **more):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert visualize(video, tmp_path / "out.gif", folder, "--quiet") == 130
    assert (tmp_path / "out.gif").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.gif"]
