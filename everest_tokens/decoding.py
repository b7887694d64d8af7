"""The two decoders behind `video`: PyAV reads whatever FFmpeg reads, torchcodec is faster where it can be trusted.

A reader has a `length` and reads frames by number, in the order in which they are shown.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

BACKENDS = ("pyav", "torchcodec")

# H.264 and HEVC may reorder a frame by at most 16 places; one further off means that the clock jumped or started again.
_MAX_REORDER = 32

T = TypeVar("T")


def with_reader(
    path: str | os.PathLike[str], backend: str | None, use: Callable[[_PyAVReader | _TorchCodecReader], T]
) -> T:
    """use(reader of the file), choosing the backend as `read_frames` documents."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    name = os.fsdecode(path)
    if not os.path.exists(name):
        raise ValueError(f"{name}: no such file")
    if os.path.isdir(name):
        raise ValueError(f"{name}: a directory, expected a video file")
    if os.path.getsize(name) == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes)")

    if backend != "pyav" and _torchcodec_decoder() is not None:
        try:
            return use(_TorchCodecReader(name))
        except _NotForTorchCodec as error:
            # PyAV goes on after a broken packet, and can say what is wrong with the file.
            if backend == "torchcodec":
                raise ValueError(f"{name}: not for torchcodec ({error}); backend='pyav' may read it") from error
    elif backend == "torchcodec":
        raise ImportError("torchcodec is not installed, or doesn't find FFmpeg's shared libraries on this system")
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError('reading this video needs PyAV: pip install "everest-tokens[video]"') from error
    return use(_PyAVReader(name))


# --- torchcodec ---


class _NotForTorchCodec(Exception):
    """torchcodec fails on this file, or may number its frames wrongly."""


@lru_cache(maxsize=1)  # a failing import is not remembered by Python, and looking for FFmpeg takes a while
def _torchcodec_decoder() -> Any:
    """torchcodec's VideoDecoder class, None where it isn't installed or doesn't find FFmpeg."""
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    # Recent versions import without FFmpeg, say so here, and raise only when a file is opened.
    return None if getattr(torchcodec, "ffmpeg_major_version", 0) is None else VideoDecoder


class _TorchCodecReader:
    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            head = file.read(8)
        quicktime = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        matroska = head[:4] == b"\x1a\x45\xdf\xa3"
        # In MPEG-TS torchcodec 0.17 is off by a group of pictures without noticing, and loses the last frame of an AVI.
        if not (quicktime or matroska):
            raise _NotForTorchCodec("only its frame numbers in MP4, QuickTime and Matroska files are reliable")
        try:
            self.decoder = _torchcodec_decoder()(path, num_ffmpeg_threads=torch.get_num_threads())
        except ValueError as error:  # its message asks to report a bug
            raise _NotForTorchCodec("it finds no video stream: audio only?") from error
        except RuntimeError as error:
            raise _NotForTorchCodec(str(error)) from error
        if self.decoder.metadata.codec == "vp8":
            raise _NotForTorchCodec("it counts the hidden frames of VP8")
        self.length = len(self.decoder)

    def read(self, numbers: list[int]) -> Tensor:
        if max(numbers) >= self.length and (self.decoder.metadata.num_frames_from_header or 0) > self.length:
            raise _NotForTorchCodec("the file seems to be cut off")
        clamped = [min(number, self.length - 1) for number in numbers]
        wanted = sorted(set(clamped))
        try:
            batch = self.decoder.get_frames_at(wanted)
        except (RuntimeError, IndexError) as error:
            raise _NotForTorchCodec(str(error)) from error
        if (batch.pts_seconds.diff() <= 0).any():
            raise _NotForTorchCodec("it gave one frame for several numbers")
        return batch.data[[wanted.index(number) for number in clamped]].contiguous()


# --- PyAV ---


class _PyAVReader:
    """Frames by number. Every pass opens the file anew: a millisecond, and it works where seeking back doesn't."""

    def __init__(self, path: str) -> None:
        self.path = path
        packets: list[Any] = []
        container, stream = self._open()
        # Reading errors come up again in `_frames`, if it gets as far as that.
        with container, suppress(*self._read_errors()):
            promised, is_avi = stream.frames, "avi" in container.format.name.split(",")
            packets.extend((p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size)
        shown = [pts for pts, _, discard in packets if not discard]  # an edit list discards frames after their decoding
        if not shown:
            raise ValueError(f"{path}: undecodable, its video stream contains no frames")
        # VP8 stores a hidden frame just before the one shown next, under its time stamp. It doesn't count, but numbers
        # by time stamp are then as unreliable as where the clock jumps and where (AVI) FFmpeg guesses the time stamps.
        self.length = 1 + sum(pts is None or pts != following for pts, following in pairwise(shown))
        self.times = [] if None in shown else sorted(set(shown))
        self.promised = max(self.length, promised - (len(packets) - len(shown)))
        numbers = {pts: number for number, pts in enumerate(self.times)}
        unambiguous = not is_avi and len(numbers) == len(shown)
        steady = unambiguous and all(abs(numbers[pts] - place) <= _MAX_REORDER for place, pts in enumerate(shown))
        self.numbers = numbers if steady else None
        self.positions = {pts: position for position, (pts, _, _) in enumerate(packets)}
        self.keys = [pts for pts, is_key, _ in packets if is_key and pts is not None]

    def read(self, numbers: list[int]) -> Tensor:
        clamped = [min(number, self.length - 1) for number in numbers]
        wanted = sorted(set(clamped))
        key = None
        if self.numbers is not None:
            first_time = self.times[wanted[0]]
            key = next((pts for pts in reversed(self.keys) if pts <= first_time), None)
        found, missing, errors = self._decode(wanted, key, torch.get_num_threads())
        if missing or errors:
            # Several threads lose good frames around a broken packet, and the seek may be to blame.
            found, missing, errors = self._decode(wanted, None, 1)
        if not found:
            raise ValueError(f"{self.path}: undecodable, none of its frames could be decoded")
        asked = {number for number in numbers if number < self.promised}
        lost = {number for number in asked if number in missing or number >= self.length}
        # Where frames had to be counted, a packet without a frame is no damage: it may be a place-holder.
        if lost and (errors or self.numbers is not None or self.promised > self.length):
            warnings.warn(
                f"{self.path} is damaged or cut off: {len(asked) - len(lost)} of the {len(asked)} frames asked for "
                "could be decoded, the others repeat the last decodable frame before them",
                stacklevel=5,  # the caller of read_frames
            )
        frames = torch.stack([found[number] for number in wanted])  # (distinct, H, W, 3)
        return frames.permute(0, 3, 1, 2)[[wanted.index(number) for number in clamped]].contiguous()  # (T, 3, H, W)

    def _decode(
        self, wanted: list[int], key: int | None, threads: int
    ) -> tuple[dict[int, Tensor], set[int], list[str]]:
        """Decode from a key frame's time stamp (None: from the start) to the last of the ascending numbers `wanted`.

        Returns the wanted frames, each (H, W, 3), a missing one replaced; the numbers, wanted or not, that didn't come
        where they should have; and the errors.
        """
        found: dict[int, Tensor] = {}
        missing: set[int] = set()
        errors: list[str] = []
        to_rgb = _ToRGB()
        queue = deque(wanted)
        last, last_frame = -1, None
        container, stream = self._open()
        with container:
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            for place, frame in enumerate(self._frames(container, stream, key, errors)):
                number = place if self.numbers is None else self.numbers.get(frame.pts, -1)
                if number <= last:
                    missing.add(number)
                    continue
                missing.update(range(max(last + 1, wanted[0]), number))
                while queue and queue[0] < number:
                    found[queue.popleft()] = to_rgb(frame if last_frame is None else last_frame)
                if queue and queue[0] == number:
                    found[queue.popleft()] = to_rgb(frame)
                last, last_frame = number, frame
                if not queue:
                    break
            missing.update(queue)
            if last_frame is not None:
                found.update({number: to_rgb(last_frame) for number in queue})
        return found, missing, errors

    def _frames(self, container: Any, stream: Any, key: int | None, errors: list[str]) -> Iterator[Any]:
        """The frames that decode, in the order in which they are shown, up to where the file ends or breaks off."""
        import av

        try:
            if key is not None and self.positions[key] > 0:
                container.seek(key, stream=stream)
            for packet in container.demux(stream):
                if not packet.size:  # would tell the decoder that nothing follows
                    continue
                if key is not None and self.positions.get(packet.pts, len(self.positions)) > self.positions[key]:
                    errors.append("the seek went beyond the key frame")
                    return
                key = None
                try:
                    frames = stream.decode(packet)
                except av.FFmpegError as error:
                    errors.append(str(error))
                else:
                    yield from frames
        except self._read_errors() as error:
            errors.append(str(error))
        try:
            held_back = stream.decode(None)  # for reordering
        except av.FFmpegError as error:
            errors.append(str(error))
        else:
            yield from held_back

    @staticmethod
    def _read_errors() -> tuple[type[Exception], ...]:
        import av

        return av.FFmpegError, IndexError  # PyAV's demux raises the latter where damage pretends to be a new stream

    def _open(self) -> tuple[Any, Any]:
        """(container, video stream), the stream being the one that FFmpeg deems best, as in torchcodec."""
        import av
        from av.stream import Disposition

        try:
            container = av.open(self.path, metadata_errors="ignore")
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: undecodable, FFmpeg can't open it ({error.strerror})") from error
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a piece of music
            problem = "no video stream, audio only" if container.streams.audio else "undecodable, no video stream"
        elif stream.codec_context is None:
            problem = "undecodable, this FFmpeg has no decoder for its video stream"
        else:
            return container, stream
        container.close()
        raise ValueError(f"{self.path}: {problem}")


class _ToRGB:
    """Converts frames to uint8 (H, W, 3), turned upright and all of the first one's size.

    One reformatter for all: setting one up, as `frame.to_ndarray(format="rgb24")` does, costs more than the conversion,
    and so do threads at this size.
    """

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> Tensor:
        import av

        width, height = self.size = self.size or (frame.width, frame.height)
        to_rgb24: dict[str, Any] = {"width": width, "height": height, "format": "rgb24", "threads": 1}
        try:
            rgb = self.reformatter.reformat(frame, **to_rgb24)
        except av.FFmpegError:
            frame.colorspace = 2  # unspecified; swscale refuses the reserved ones that some files state
            rgb = self.reformatter.reformat(frame, **to_rgb24)
        # frame.rotation is the turn, counterclockwise in degrees, that the display matrix asks for.
        return torch.rot90(torch.from_numpy(rgb.to_ndarray()), round(frame.rotation / 90) % 4, dims=(0, 1))
