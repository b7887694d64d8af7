"""Videos that PyAV's encoder cannot be asked for, made by the FFmpeg program, which also says what it shows of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import LENGTH, picture, turn

H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-x264-params")
HEVC = ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params")
OPEN = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"


def run_ffmpeg(*arguments: object, pixels: bytes | None = None) -> bytes:
    """What the program writes on its standard output; skips the test where it isn't installed."""
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        program = shutil.which("ffmpeg")
    if not program:
        pytest.skip("needs the ffmpeg program: pip install imageio-ffmpeg")
    done = subprocess.run([program, "-y", "-v", "error", *map(str, arguments)], input=pixels, capture_output=True)
    problem = done.stderr.decode(errors="replace").strip()
    if "Unknown encoder" in problem:
        pytest.skip(f"needs another build of ffmpeg: {problem}")
    assert done.returncode == 0, problem
    return done.stdout


def encode(path: Path, *options: object, length: int = LENGTH, size: tuple[int, int] = (96, 64)) -> Path:
    """`made_videos.picture` of 0, 1, … at 25 a second."""
    pixels = b"".join(picture(number, *size).tobytes() for number in range(length))
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*size), "-r", "25", "-i", "-")
    run_ffmpeg(*source, *options, path, pixels=pixels)
    return path


def cut(path: Path, *options: object) -> Path:
    """Without its first 0.9 s, nothing encoded anew."""
    whole = encode(path.with_name(f"whole-{path.name}"), *options)
    run_ffmpeg("-ss", "0.9", "-i", whole, "-c", "copy", path)
    return path


def shown_by_ffmpeg(path: Path) -> torch.Tensor:
    """Every frame that the program shows of a file, at the first one's size: uint8 (T, 3, H, W)."""
    images = run_ffmpeg(
        "-i", path, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"
    )
    frames = []
    while images:
        kind, size, depth, rest = images.split(b"\n", 3)
        assert (kind, depth) == (b"P6", b"255")
        width, height = map(int, size.split())
        frames.append(np.frombuffer(rest, np.uint8, 3 * width * height).reshape(height, width, 3))
        images = rest[3 * width * height :]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def two_sizes(path: Path) -> Path:
    """A transport stream that goes on at another size, as a broadcast does between two programmes."""
    options = (*H264, "keyint=12")
    parts = [
        encode(path.with_name(f"{size[0]}-{path.name}"), *options, length=30, size=size)
        for size in ((128, 96), (96, 64))
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


# Key frames that no decoder can begin at, or that are followed by frames which refer to what lies before them.
SEEKING: dict[str, Callable[[Path], Path]] = {
    **{
        f"{name}.{suffix}": make
        for suffix in ("mp4", "mkv", "ts")
        for name, make in {
            "intra-refresh": lambda path: encode(path, *H264, "intra-refresh=1:keyint=20:bframes=0:scenecut=0"),
            "intra-refresh-hevc": lambda path: encode(
                path, *HEVC, "log-level=none:intra-refresh=1:keyint=20:bframes=0:scenecut=0"
            ),
            "open": lambda path: encode(path, *H264, OPEN),
            "open-hevc": lambda path: encode(path, *HEVC, f"log-level=none:{OPEN}"),
            "cut": lambda path: cut(path, *H264, OPEN),
            "cut-hevc": lambda path: cut(path, *HEVC, f"log-level=none:{OPEN}"),
        }.items()
    },
    "cut-mpeg2.mkv": lambda path: cut(path, "-c:v", "mpeg2video", "-g", 12, "-bf", 2),
    "vp9.webm": lambda path: encode(path, "-c:v", "libvpx-vp9", "-g", 12),
    "av1.mp4": lambda path: encode(path, "-c:v", "libsvtav1", "-g", 12, "-svtav1-params", "lp=1"),
}
COLOURS: dict[str, Callable[[Path], Path]] = {
    "10-bit.mp4": lambda path: encode(path, "-c:v", "libx264", "-pix_fmt", "yuv420p10le"),
    "10-bit-hevc.mp4": lambda path: encode(
        path, "-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none"
    ),
    "odd.mkv": lambda path: encode(path, "-c:v", "ffv1", "-pix_fmt", "yuv420p", size=(97, 65)),
    "odd.webm": lambda path: encode(path, "-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p", size=(97, 65)),
    "interlaced.mp4": lambda path: encode(path, "-flags", "+ilme+ildct", *H264, "tff=1"),
    "alpha.webm": lambda path: encode(path, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"),
    "alpha.mov": lambda path: encode(path, "-c:v", "qtrle", "-pix_fmt", "argb"),
    "prores.mov": lambda path: encode(path, "-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"),
    "grey.mp4": lambda path: encode(path, "-c:v", "libx264", "-pix_fmt", "gray"),
    "grey.mkv": lambda path: encode(path, "-c:v", "ffv1", "-pix_fmt", "gray"),
    "full-range.mp4": lambda path: encode(path, "-c:v", "libx264", "-pix_fmt", "yuvj420p"),
    "bt709.mp4": lambda path: encode(path, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-colorspace", "bt709"),
}
OTHERS: dict[str, Callable[[Path], Path]] = {
    "two-sizes.ts": two_sizes,
    "one-frame.mp4": lambda path: encode(path, *H264, "keyint=12", length=1),
    "negative-times.mkv": lambda path: encode(
        path, *H264, "keyint=12", "-output_ts_offset", "-0.4", "-avoid_negative_ts", "disabled"
    ),
    "negative-times.mp4": lambda path: encode(
        path, *H264, "keyint=12", "-output_ts_offset", "-0.4", "-avoid_negative_ts", "disabled"
    ),
    "turned.mp4": lambda path: turn(encode(path.with_name("upright.mp4"), *H264, "keyint=12"), path, 90),
    "index-in-front.mp4": lambda path: encode(path, *H264, "keyint=12", "-movflags", "faststart"),
}
