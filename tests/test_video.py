"""everest_tokens.video on videos made on the spot, whose frames carry their number as eight light or dark bars."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import (
    GROUP,
    KINDS,
    LENGTH,
    damage,
    full_decode,
    numbers_in,
    packets,
    turn,
    watch,
    write_audio,
    write_video,
)

from everest_tokens import video
from everest_tokens.video import dense_indices, load_clip

PIXELS = {"mean": (0, 0, 0), "std": (1, 1, 1)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        path = folder / name
        return path if path.exists() else KINDS[name][0](path)

    return make


def frames_of(path: Path, start: int, num_frames: int, stride: int = 1) -> torch.Tensor:
    """uint8 (T, 3, H, W) by `load_clip`, at the size that they have."""
    size = tuple(full_decode(path).shape[-2:])
    clip = load_clip(path, start=start, num_frames=num_frames, stride=stride, size=size, **PIXELS)
    return (clip[0] * 255).round().to(torch.uint8)


# --- which frames ---


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(made, name):
    path, carried = made(name), KINDS[name][1]
    whole = full_decode(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(frames_of(path, 0, len(carried)), whole)
        for start in range(0, len(carried), 7):  # within a group of pictures, and at its ends
            frames = frames_of(path, start, 3, 2)
            wanted = [min(start + i, len(carried) - 1) for i in (0, 2, 4)]
            assert numbers_in(frames) == [carried[number] for number in wanted]
            assert torch.equal(frames, whole[wanted])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_a_long_video_the_clip_alone_is_decoded(tmp_path, monkeypatch, suffix):
    path = write_video(tmp_path / f"long.{suffix}", length=600)
    containers = watch(monkeypatch, video)
    clip = load_clip(path, start=400, num_frames=4, stride=5, size=(64, 96), **PIXELS)[0]
    assert numbers_in((clip * 255).byte()) == [number % 256 for number in (400, 405, 410, 415)]
    numbering, decoding = containers
    assert numbering.read > 600
    assert 16 <= decoding.read < 60


@pytest.mark.parametrize("far", [3, GROUP])
def test_a_seek_that_goes_too_far_is_mended(tmp_path, monkeypatch, far):
    # This codec decodes without a key frame too, to something grey.
    path = write_video(tmp_path / "mpeg4.mp4", "mpeg4", b_frames=0)
    containers = watch(monkeypatch, video, far)
    clip = load_clip(path, start=29, num_frames=2, stride=11, size=(64, 96), **PIXELS)[0]
    assert numbers_in((clip * 255).byte()) == [29, 40]
    assert len(containers) == 3  # to number the frames, to seek, and once more from the start


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured(made, tmp_path, rotation):
    path = turn(made("b-frames.mp4"), tmp_path / "turned.mp4", rotation)
    upright = load_clip(made("b-frames.mp4"), num_frames=2, size=(64, 96), **PIXELS)[0]
    turned = load_clip(path, num_frames=2, size=(64, 96) if rotation == 180 else (96, 64), **PIXELS)[0]
    assert torch.equal(turned, torch.rot90(upright, rotation // 90, dims=(2, 3)))


def test_a_reserved_colour_space_is_read_as_unspecified(made):
    with av.open(str(made("b-frames.mp4"))) as container:
        frame, stream = next(container.decode(video=0)), container.streams.video[0]
        expected = video.ToRGB("x", stream)(frame)
        frame.colorspace = 3  # reserved: swscale refuses it
        assert torch.equal(video.ToRGB("x", stream)(frame), expected)


# --- what can't be read ---


@pytest.mark.parametrize("name", ["b-frames.mp4", "mpeg4.avi"])
def test_what_is_damaged_outside_the_clip_does_no_harm(made, tmp_path, name):
    path = damage(made(name), tmp_path / name, slice(48, 60))
    assert numbers_in(frames_of_part(path)) == [13, 15, 17]


def test_a_clip_that_is_damaged_is_an_error(made, tmp_path):
    path = damage(made("b-frames.mp4"), tmp_path / "damaged.mp4", slice(24, 36))
    assert numbers_in(frames_of_part(path, start=40)) == [40, 42, 44]
    with pytest.raises(ValueError, match=r"damaged\.mp4: damaged or cut off, not all frames of the clip"):
        frames_of_part(path, start=23)


def test_a_file_that_was_cut_off_is_shorter(tmp_path):
    whole = write_video(tmp_path / "fast.mp4", muxer={"movflags": "faststart"})
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: packets(whole)[36].pos])  # the key frame of the fourth group
    assert numbers_in(frames_of_part(path, start=30)) == [30, 32, 34]
    with pytest.raises(ValueError, match="start must be below the video's length 36, got 40"):
        frames_of_part(path, start=40)


def frames_of_part(path: Path, start: int = 13) -> torch.Tensor:
    clip = load_clip(path, start=start, num_frames=3, stride=2, size=(64, 96), **PIXELS)
    return (clip[0] * 255).round().to(torch.uint8)


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
    make(tmp_path / name)
    with pytest.raises(ValueError, match=problem) as error:
        load_clip(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("module", ["av", "torchvision.transforms.v2"])
def test_without_an_optional_package_the_extra_is_named(made, monkeypatch, module):
    path = made("one-frame.mp4")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[video\]'"):
        load_clip(path)


def test_dense_indices_by_hand():
    assert dense_indices(100, 4, 10) == [34, 44, 54, 64]  # 31 frames of 100, 69 left over
    assert dense_indices(31, 4, 10) == [0, 10, 20, 30]
    assert dense_indices(30, 4, 10) == [0, 10, 20, 29]
    assert dense_indices(1, 3, 2) == [0, 0, 0]
    assert dense_indices(100, 4, 10, start=90) == [90, 99, 99, 99]
    assert dense_indices(100, 4, 10, start=0) == [0, 10, 20, 30]
    assert dense_indices(300) == list(range(119, 180, 4))


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_dense_indices_properties(length, num_frames, stride, seed):
    span = (num_frames - 1) * stride + 1
    for generator in (None, torch.Generator().manual_seed(seed)):
        indices = dense_indices(length, num_frames, stride, generator=generator)
        assert len(indices) == num_frames
        if span <= length:
            assert indices == list(range(indices[0], indices[0] + span, stride))
            assert 0 <= indices[0] <= indices[-1] < length
        else:
            assert indices == [min(i * stride, length - 1) for i in range(num_frames)]
    centred = dense_indices(length, num_frames, stride)
    if span <= length:
        assert 0 <= (length - 1 - centred[-1]) - centred[0] <= 1  # as many frames behind it as in front


def test_random_starts_are_uniform_over_all_that_fit():
    generator = torch.Generator().manual_seed(0)
    starts = [dense_indices(10, 3, 3, generator=generator)[0] for _ in range(800)]
    counts = np.bincount(starts)
    assert len(counts) == 4  # 0 … 3: the clip spans 7 of 10
    assert counts.min() > 150
    again = torch.Generator().manual_seed(0)
    assert starts[:20] == [dense_indices(10, 3, 3, generator=again)[0] for _ in range(20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length .* got 0"),
        ({"length": 5.0}, "length .* got 5.0"),
        ({"num_frames": -1}, "num_frames .* got -1"),
        ({"stride": 0}, "stride .* got 0"),
        ({"stride": True}, "stride .* got True"),
        ({"start": -1}, "start .* got -1"),
        ({"start": 50}, "50, got 50"),
        ({"start": 1, "generator": torch.Generator()}, "both"),
    ],
)
def test_dense_indices_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        dense_indices(**{"length": 50, **arguments})


# --- preparing ---


@pytest.mark.parametrize(
    ("size", "short_side", "shape"),
    [
        (32, None, (48, 96)),
        (32, None, (96, 48)),
        ((16, 32), None, (48, 60)),
        ((32, 16), None, (48, 48)),
        (32, 40, (61, 97)),
    ],
)
def test_the_crop_is_the_middle_and_keeps_the_aspect_ratio(size, short_side, shape, monkeypatch):
    """On ramps: the value at a pixel says where in the source it comes from."""
    height, width = shape
    rows = torch.linspace(0, 255, height).view(1, height, 1).expand(1, height, width)
    columns = torch.linspace(0, 255, width).view(1, 1, width).expand(1, height, width)
    clip = torch.stack([rows, columns, rows], 1).round().to(torch.uint8)
    monkeypatch.setattr(video, "_read", lambda path, choose: clip)
    if short_side is None:
        out = load_clip("x", size=size, **PIXELS)[0, 0] * 255
    else:
        processor = {"image_mean": (0,) * 3, "image_std": (1,) * 3, "size": {"shortest_edge": short_side}}
        out = load_clip("x", processor=types.SimpleNamespace(crop_size=size, **processor))[0, 0] * 255
    new_height, new_width = (size, size) if isinstance(size, int) else size
    assert out.shape == (3, new_height, new_width)
    scale = short_side / min(shape) if short_side else max(new_height / height, new_width / width)
    for channel, side in enumerate(shape):  # centred in either direction, to half a pixel
        assert abs(out[channel].mean() - 127.5) < 1 + 255 / (side * scale) / 2
    down = (out[0, -3] - out[0, 2]).mean() / (new_height - 5)
    across = (out[1, :, -3] - out[1, :, 2]).mean() / (new_width - 5)
    assert down == pytest.approx(255 / (height - 1) / scale, rel=0.03)
    assert across == pytest.approx(255 / (width - 1) / scale, rel=0.03)


@pytest.mark.parametrize("size", [0, (8, -8), 8.5])
def test_sizes_that_are_none(made, size):
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got"):
        load_clip(made("one-frame.mp4"), size=size)


def test_load_clip_by_hand(made):
    path = made("b-frames.mp4")
    clip = load_clip(path, num_frames=4, stride=5, size=64, start=7)  # 64 high as it is: no resizing, a crop from 16 on
    assert clip.shape == (1, 4, 3, 64, 64)
    assert clip.dtype == torch.float32
    frames = full_decode(path)[[7, 12, 17, 22], :, :, 16:80].float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(clip[0], (frames - mean) / std, atol=1e-5, rtol=0)
    other = load_clip(path, num_frames=4, stride=5, size=64, start=7, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(other[0], frames, atol=1e-6, rtol=0)


def test_load_clip_chooses_its_frames_by_dense_indices(made):
    path = made("uneven.mp4")
    plain = {"size": (64, 96), "mean": (0, 0, 0), "std": (1, 1, 1)}

    def carried(**arguments) -> list[int]:
        return numbers_in((load_clip(path, **plain, **arguments)[0] * 255).round().to(torch.uint8))

    assert carried() == dense_indices(LENGTH)
    assert carried(num_frames=20, stride=5) == [*range(0, 60, 5), *[59] * 8]
    assert carried(generator=torch.Generator().manual_seed(3), num_frames=3) == dense_indices(
        LENGTH, 3, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("kind", ["VideoMAEImageProcessor", "VideoMAEVideoProcessor"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 63}, "crop_size": {"height": 63, "width": 63}},  # 63 × 94: an odd margin
        {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 56}},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
)
def test_load_clip_equals_the_processor(made, kind, settings):
    path = made("odd-size.mp4")
    processor = getattr(transformers, kind)(**settings)
    frames = full_decode(path)[[10, 14, 18]]
    expected = processor(list(frames), return_tensors="pt")["pixel_values"]
    clip = load_clip(path, num_frames=3, start=10, processor=processor)
    assert clip.shape == expected.shape
    torch.testing.assert_close(clip, expected, atol=1e-5, rtol=0)


def test_load_clip_takes_a_processor_of_any_class(made):
    path = made("b-frames.mp4")
    processor = types.SimpleNamespace(image_mean=(0.5,) * 3, image_std=(0.25,) * 3, size=48)
    expected = load_clip(path, num_frames=2, size=48, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert torch.equal(load_clip(path, num_frames=2, processor=processor), expected)
    with pytest.raises(ValueError, match="expected a processor with a crop_size or a size"):
        load_clip(path, processor=types.SimpleNamespace(image_mean=(0,) * 3, image_std=(1,) * 3))
    with pytest.raises(ValueError, match="short_side must be an integer of at least 60, got 48"):
        load_clip(path, processor=types.SimpleNamespace(image_mean=(0,), image_std=(1,), size=48, crop_size=60))
