"""Videos made on the spot, of every kind that decoders number wrongly; each frame carries its number as eight bars."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

HAS_X264 = "libx264" in av.codecs_available
H264 = "libx264" if HAS_X264 else "mpeg4"
LENGTH = 60
GROUP = 12  # frames from one key frame to the next


def picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): above, the bits of `number`, the lowest at the left; below, something coloured."""
    image = np.empty((height, width, 3), np.uint8)
    for bit in range(8):
        image[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 230 if number >> bit & 1 else 20
    image[height // 2 :, :, 0] = number * 7 % 256
    image[height // 2 :, :, 1] = np.arange(width) % 256
    image[height // 2 :, :, 2] = 90
    return image


def numbers_in(frames: torch.Tensor) -> list[int]:
    """Reads the numbers back from uint8 (T, 3, H, W), looking at the middle of each bar only."""
    height, width = frames.shape[-2:]
    rows = frames.float()[:, :, height // 8 : height * 3 // 8]
    bars = [rows[..., bit * width // 8 + width // 32 : (bit + 1) * width // 8 - width // 32] for bit in range(8)]
    bits = torch.stack([bar.mean((1, 2, 3)) > 125 for bar in bars], 1)
    return (bits * 2 ** torch.arange(8)).sum(1).tolist()


def write_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = H264,
    *,
    times: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    group: int = GROUP,
    b_frames: int = 2,
    x264: str = "",
    muxer: dict[str, str] | None = None,
) -> Path:
    """uint8 (H, W, 3) each, at 25 a second or at `times` in milliseconds, with `b_frames` between the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images, clock = list(frames), Fraction(1, 1000) if times else Fraction(1, 25)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, clock
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = group, b_frames
        if x264 and codec == "libx264":
            stream.options = {"x264-params": x264}
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_video(
    path: Path, codec: str = H264, *, length: int = LENGTH, size: tuple[int, int] = (96, 64), **more: Any
) -> Path:
    """Frames 0, 1, … of `size` (width, height), each with its number; for the rest see `write_frames`."""
    return write_frames(path, (picture(number, *size) for number in range(length)), codec, **more)


def full_decode(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def turn(upright: Path, path: Path, rotation: int) -> Path:
    """A copy of an MP4 whose track header asks for a turn by `rotation` degrees counterclockwise."""
    data = bytearray(upright.read_bytes())
    matrix = data.index(b"tkhd") + 44  # behind version, times, track, duration, layer and volume
    sine, cosine = {90: (1, 0), 180: (0, -1), 270: (-1, 0)}[rotation]
    struct.pack_into(">9i", data, matrix, *(x << 16 for x in (cosine, -sine, 0, sine, cosine, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


def write_hidden(path: Path) -> Path:
    """VP8 with a frame that isn't shown before every key frame: a copy of it, so that the picture stays right."""
    source = write_video(path.with_suffix(".webm"), "libvpx")
    with av.open(str(source)) as reader, av.open(str(path), "w", format="matroska") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            if packet.is_keyframe:
                data = bytearray(bytes(packet))
                data[0] &= ~0x10  # show_frame
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream, hidden.is_keyframe = stream, True
                writer.mux(hidden)
            packet.stream = stream
            writer.mux(packet)
    return path


def uneven_times() -> list[int]:
    return np.random.default_rng(0).integers(5, 200, LENGTH).cumsum().tolist()


def restarted(path: Path, offset: int) -> Path:
    """Two MPEG-TS files one after the other: in the middle the clock starts again, `offset` milliseconds later."""
    as_it_is = {"mpegts_copyts": "1"}
    first = write_video(path.with_suffix(".1.ts"), times=[1000 + 40 * i for i in range(LENGTH)], muxer=as_it_is)
    start = 1000 + offset
    second = write_video(path.with_suffix(".2.ts"), times=[start + 40 * i for i in range(LENGTH)], muxer=as_it_is)
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


# name: (makes the file, the numbers that its frames carry)
KINDS: dict[str, tuple[Callable[[Path], Path], list[int]]] = {
    "b-frames.mp4": (write_video, list(range(LENGTH))),
    "open-gop.mp4": (
        lambda path: write_video(path, x264="open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"),
        list(range(LENGTH)),
    ),
    "b-frames.mkv": (write_video, list(range(LENGTH))),
    "b-frames.ts": (write_video, list(range(LENGTH))),
    "uneven.mp4": (lambda path: write_video(path, times=uneven_times()), list(range(LENGTH))),
    "uneven.mkv": (lambda path: write_video(path, times=uneven_times()), list(range(LENGTH))),
    "mpeg4.avi": (lambda path: write_video(path, "mpeg4"), list(range(LENGTH))),
    "wrong-times.avi": (write_video, list(range(LENGTH))),  # AVI has no room for H.264's time stamps
    "no-times": (lambda path: write_raw(path), list(range(LENGTH))),
    "same-times-again.ts": (lambda path: restarted(path, 0), [*range(LENGTH), *range(LENGTH)]),
    "times-in-between.ts": (lambda path: restarted(path, 20), [*range(LENGTH), *range(LENGTH)]),
    "odd-size.mp4": (
        lambda path: write_video(path, size=(97, 65), pix_fmt="yuv444p" if HAS_X264 else "yuv420p"),
        list(range(LENGTH)),
    ),
    # Starts 0.4 s before time 0: the container hides the first ten frames by an edit list.
    "edit-list.mp4": (
        lambda path: write_video(path, times=[40 * (i - 10) for i in range(LENGTH)]),
        list(range(10, LENGTH)),
    ),
    "hidden-frames.mkv": (write_hidden, list(range(LENGTH))),
    "one-frame.mp4": (lambda path: write_video(path, length=1), [0]),
}


def write_raw(path: Path) -> Path:
    suffix = ".h264" if HAS_X264 else ".m4v"
    write_video(path.with_suffix(suffix)).rename(path)
    return path


def packets(path: Path) -> list[av.Packet]:
    """In the order in which they are shown."""
    with av.open(str(path)) as container:
        return sorted((packet for packet in container.demux(video=0) if packet.size), key=lambda packet: packet.pts)


def damage(whole: Path, path: Path, numbers: slice) -> Path:
    """A copy in which the packets of these frames are overwritten, so that the frames don't decode."""
    data = bytearray(whole.read_bytes())
    for packet in packets(whole)[numbers]:
        content = bytes(packet)
        assert data.count(content) == 1
        start = data.index(content)
        data[start : start + len(content)] = b"\xff" * len(content)
    path.write_bytes(data)
    return path


def write_audio(path: Path) -> None:
    """A tenth of a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class Watched:
    """A container that lands `far` frames behind where it was asked to, and notes what it reads."""

    def __init__(self, container, far: int = 0) -> None:
        self.container, self.far, self.read = container, far, 0

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def seek(self, pts: int, stream) -> None:
        self.container.seek(pts + round(self.far / 25 / stream.time_base), stream=stream, any_frame=self.far > 0)

    def demux(self, stream):
        for packet in self.container.demux(stream):
            self.read += 1
            yield packet


def watch(monkeypatch: Any, module: Any, far: int = 0) -> list[Watched]:
    """Make a module's `open_video` give such containers; returns them as they are opened."""
    opened, containers = module.open_video, []

    def open_watched(path: str) -> tuple[Watched, Any]:
        container, stream = opened(path)
        containers.append(Watched(container, far))
        return containers[-1], stream

    monkeypatch.setattr(module, "open_video", open_watched)
    return containers
