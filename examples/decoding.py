"""Frames of video files by number: what feeds the data sets of clips.py, made for speed and for files that are damaged.

Frames are numbered in the order in which they are shown, as decoding the file from its start gives them. PyAV reads
whatever FFmpeg reads; torchcodec, where it is asked for, decodes the common kinds of files to the same frames
(by_torchcodec.py). Neither is imported before a file is opened. Files are local: a path, no URL.
"""

from __future__ import annotations

import math
import os
import warnings
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import by_torchcodec
import torch
from by_torchcodec import reduced_size
from torch import Tensor

from everest_tokens.video import ToRGB, integer, number_frames, open_video, read_errors

BACKENDS = ("pyav", "torchcodec")

# How many packets behind the end of a part are read, in case one of the part's comes late.
_MAX_REORDER = 32

# Codecs whose FFmpeg decoders leave out exactly the frames that no other frame refers to when told NONREF. (HEVC's goes
# by a mark that binds the frames of one temporal layer only.)
_SKIPS_UNREFERENCED = ("h264", "mpeg4", "mpeg2video", "mpeg1video")

Part = tuple[float, float]

T = TypeVar("T")


def video_length(path: str | os.PathLike[str], *, backend: str | None = None) -> int:
    """How many frames of a video file can be addressed, counted by reading its packets without decoding them.

    The count in a container's header is not used: it includes what an edit list hides and what a cut-off file lacks.
    In a damaged file some of the addressable frames may turn out not to decode (see `read_frames`).

    Raises:
        ValueError: as `read_frames`. ImportError: as `read_frames`.
    """
    return _with_reader(path, backend, lambda reader: reader.length)


def read_frames(
    path: str | os.PathLike[str],
    indices: Iterable[int] | Callable[[int], Iterable[int]],
    *,
    short_side: int | None = None,
    part: tuple[float, float] | None = None,
    max_lost: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Read frames by number.

    Decoding starts at the key frame before a wanted frame and stops at it; frames between that nothing refers to are
    left out where the decoder can; only wanted frames become RGB. Where time stamps don't number a file's frames (AVI,
    raw streams), it is decoded from the start and counted. Rotation metadata are honoured in steps of 90 degrees.
    FFmpeg decodes with `torch.get_num_threads()` threads, which is 1 in the workers of a DataLoader. At full size the
    backends agree to the bit: torchcodec refuses what it would seek wrongly or convert to other colours.

    Args:
        path: a local video file.
        indices: frame numbers from 0, in any order, repeated at will. One beyond the end gives the last frame. Or a
            function from the number of frames to such numbers, which saves a call of `video_length`.
        short_side: resize frames whose short side is longer to this, keeping the aspect ratio (bilinear, antialiased);
            smaller frames stay as they are.
        part: (from, to) in seconds from the start of the video: frames are numbered from the one that is shown at
            `from`, and the last one begins before `to`, whatever the rate does in between. Only that part of the file
            is read, where its format allows.
        max_lost: the share, 0 to 1, of the frames asked for that may fail to decode.
        backend: "pyav" (also None), which is the faster one at reduced size, or "torchcodec".

    Returns:
        uint8 (T, 3, H, W), RGB, in the order of `indices`; the channels lie next to each other in memory (not
        contiguous), as decoders give them and torchvision resizes them fastest. If the video changes its size, all have
        that of its first frame.

    Frames that a damaged or cut-off file promises but that don't decode are replaced by the last decodable one before
    them, with one warning. (Matroska and MPEG-TS promise no number of frames: cut off, they are just shorter.)

    Raises:
        ValueError: indices are empty, negative or not integers; another argument is out of its range; the path is
            missing, a directory, empty (0 bytes), without video (audio only) or undecodable; `part` has no frames; more
            than `max_lost` don't decode; or torchcodec was asked for and cannot be trusted with this file (a container
            other than MP4, QuickTime and Matroska, time stamps that don't number the frames, more than 8 bits, fields,
            odd sides, damage) or with a part of a file.
        ImportError: PyAV, or torchcodec where it is asked for, is not installed.
    """
    if short_side is not None:
        short_side = integer("short_side", short_side, least=1)
    if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] < math.inf):
        raise ValueError(f"part must be (from, to) in seconds, 0 <= from < to, got {part!r}")
    if not 0 <= max_lost <= 1:
        raise ValueError(f"max_lost must be a share from 0 to 1, got {max_lost!r}")
    if callable(indices):
        choose = indices
        return _with_reader(
            path, backend, lambda reader: reader.read(_numbers(choose(reader.length)), short_side, max_lost), part
        )
    numbers = _numbers(indices)
    return _with_reader(path, backend, lambda reader: reader.read(numbers, short_side, max_lost), part)


def _numbers(indices: Any) -> list[int]:
    try:
        # Arrays and tensors become Python numbers first: a tensor's elements would let booleans through.
        values = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        numbers = [integer("a frame index", value, least=0) for value in values]
    except TypeError as error:
        raise ValueError(f"expected frame indices, got {indices!r}") from error
    if not numbers:
        raise ValueError(f"expected at least one frame index, got {indices!r}")
    return numbers


def _with_reader(
    path: str | os.PathLike[str],
    backend: str | None,
    use: Callable[[_Reader], T],
    part: Part | None = None,
) -> T:
    """use(reader of the file, or of a part of it), with the backend that `read_frames` documents."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    if backend == "torchcodec" and by_torchcodec.torchcodec_decoder() is None:
        raise ImportError("torchcodec is not installed, or doesn't find FFmpeg's shared libraries on this system")
    return use(_Reader(os.fsdecode(path), part, backend))


class _Packet(NamedTuple):
    pts: Any
    duration: int
    is_keyframe: bool
    is_discard: bool  # an edit list discards frames after their decoding
    random_access: bool


class _Reader:
    """Frames by number, of a file or of its `part` (from, to) in seconds.

    Every pass opens the file anew: a millisecond, and it works where seeking back doesn't.
    """

    def __init__(self, path: str, part: Part | None = None, backend: str | None = None) -> None:
        self.path, self.part, self.backend = path, part, backend
        self.first = 0  # the number of the part's first frame
        # Where a part's frames can't be numbered by what lies around it, all of the file is.
        if part is None or not self._number(part):
            self._number(None)
        if part is not None:
            self._cut(part)

    def _number(self, around: Part | None) -> bool:
        """Number the frames of the file, or those around a part of it, by reading packets. False: not by the latter."""
        self.packets: list[_Packet] = []
        self.seek: int | None = None  # the time stamp to seek before anything is read
        container, stream = open_video(self.path)
        context, self.format = stream.codec_context, container.format.name
        codec, configuration = context.codec.canonical_name, context.extradata
        self.size, self.stream_index = (context.height, context.width), stream.index
        self.plain_colours = self.backend == "torchcodec" and by_torchcodec.has_plain_colours(self.path, context)
        # Reading errors come up again in `_frames`, if it gets as far as that.
        with container, suppress(*read_errors()):
            promised = stream.frames
            self.origin, self.clock, self.rate = stream.start_time or 0, stream.time_base, stream.average_rate
            if around is not None:
                from_time, to_time = self._ticks(around)
                early = from_time - round(1 / self.clock)  # seeking may go by the times of decoding, which are earlier
                if early > self.origin:
                    self.seek = early
                    container.seek(early, stream=stream)
            beyond = 0
            for packet in container.demux(stream):
                if packet.size:
                    state = (packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
                    asked = self.backend == "torchcodec" and packet.is_keyframe
                    usable = asked and by_torchcodec.random_access(packet, codec, configuration)
                    self.packets.append(_Packet(*state, usable))
                    beyond += around is not None and packet.pts is not None and packet.pts >= to_time
                if beyond > _MAX_REORDER:
                    break
        packets = [(packet.pts, packet.is_discard) for packet in self.packets]
        if around is not None and all(hidden for _, hidden in packets):
            return False
        whole = self.seek is None
        self.length, self.times, self.numbers = number_frames(self.path, container, stream, packets, whole=whole)
        self.promised = max(self.length, promised - (len(self.packets) - self.length))
        self.positions = {packet.pts: position for position, packet in enumerate(self.packets)}
        self.keys = [
            (packet.pts, position)
            for position, packet in enumerate(self.packets)
            if packet.is_keyframe and packet.pts is not None
        ]
        return around is None or (self.numbers is not None and any(pts <= from_time for pts, _ in self.keys))

    def _ticks(self, part: Part) -> tuple[int, int]:
        """A part in the time stamps of the video stream."""
        return self.origin + round(part[0] / self.clock), self.origin + round(part[1] / self.clock)

    def _cut(self, part: Part) -> None:
        """Leave the frames of the part: from the one that is shown at its beginning to the last that begins in it."""
        if self.times:
            from_time, to_time = self._ticks(part)
            self.first, end = max(bisect_right(self.times, from_time) - 1, 0), bisect_left(self.times, to_time)
            lasts = max(packet.duration for packet in self.packets if packet.pts == self.times[-1])
            if from_time >= self.times[-1] + max(lasts, 1):
                end = 0
        elif self.rate:
            first, end = (round(seconds * self.rate, 6) for seconds in part)
            self.first, end = math.floor(first), math.ceil(end)
        else:
            raise ValueError(f"{self.path}: states no frame rate to find the part from {part[0]:g} to {part[1]:g} s by")
        self.length = self.promised = min(end, self.length) - self.first
        if self.length <= 0:
            raise ValueError(f"{self.path}: it has no frames from {part[0]:g} to {part[1]:g} s")

    def read(self, numbers: list[int], short_side: int | None = None, max_lost: float = 1.0) -> Tensor:
        clamped = [self.first + min(number, self.length - 1) for number in numbers]
        wanted = sorted(set(clamped))
        if self.backend == "torchcodec":
            cut_off = max(numbers) >= self.length and self.promised > self.length
            return _in_order(by_torchcodec.frames_by_torchcodec(self, wanted, short_side, cut_off), wanted, clamped)
        found, missing, errors = self._decode(wanted, self._plan(wanted), torch.get_num_threads(), short_side)
        if missing or errors:
            # Several threads lose good frames around a broken packet, and the seek may be to blame.
            found, missing, errors = self._decode(wanted, None, 1, short_side)
        if missing and not errors and self.part is not None and self.seek is not None:
            # No damage: a key frame from which pictures become right only gradually. So from the file's start.
            self._number(None)
            self._cut(self.part)
            return self.read(numbers, short_side, max_lost)
        if not found:
            raise ValueError(f"{self.path}: undecodable, none of its frames could be decoded")
        asked = {number for number in numbers if number < self.promised}
        lost = {number for number in asked if self.first + number in missing or number >= self.length}
        # Where frames had to be counted, a packet without a frame is no damage: it may be a place-holder.
        if lost and (errors or self.numbers is not None or self.promised > self.length):
            problem = f"{len(asked) - len(lost)} of the {len(asked)} frames asked for could be decoded"
            if len(lost) > max_lost * len(asked):
                raise ValueError(f"{self.path}: damaged or cut off, {problem}")
            warnings.warn(
                f"{self.path} is damaged or cut off: {problem}, the others repeat the last decodable frame before them",
                stacklevel=5,  # the caller of read_frames
            )
        frames = torch.stack([found[number] for number in wanted])  # (distinct, H, W, 3)
        return _in_order(frames.permute(0, 3, 1, 2), wanted, clamped)

    def _plan(self, wanted: list[int]) -> list[tuple[int, int]] | None:
        """The packets to decode for the ascending frames `wanted`: (first, last) positions in the file, ascending.

        A frame needs what stands from the key frame before it to itself, and nothing behind it. None: all packets.
        """
        if self.numbers is None:
            return None
        plan: list[tuple[int, int]] = []
        for number in wanted:
            time = self.times[number]
            key = next((position for pts, position in reversed(self.keys) if pts <= time), None)
            if key is None:
                return None
            last = self.positions[time]
            # A frame shown later may be stored earlier: the last range may begin before or end behind this one.
            while plan and key <= plan[-1][1] + 1:
                before = plan.pop()
                key, last = min(key, before[0]), max(last, before[1])
            plan.append((key, last))
        return plan

    def _decode(
        self, wanted: list[int], plan: list[tuple[int, int]] | None, threads: int, short_side: int | None
    ) -> tuple[dict[int, Tensor], set[int], list[str]]:
        """Decode the packets of a plan (None: from the start) up to the last of the ascending numbers `wanted`.

        Returns the wanted frames, each (H, W, 3), a missing one replaced; the numbers that didn't come where they
        should have; and the errors.
        """
        found: dict[int, Tensor] = {}
        missing: set[int] = set()
        errors: list[str] = []
        queue = deque(wanted)
        last, last_frame = -1, None
        container, stream = open_video(self.path)
        to_rgb = _ToReducedRGB(self.path, stream, short_side)
        with container:
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            whole = plan is None or stream.codec_context.name not in _SKIPS_UNREFERENCED
            times = None if whole else {self.times[number] for number in wanted}
            for place, frame in enumerate(self._frames(container, stream, plan, times, errors)):
                number = place if self.numbers is None else self.numbers.get(frame.pts, -1)
                if number <= last:
                    missing.add(number)
                    continue
                while queue and queue[0] < number:
                    missing.add(queue[0])
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

    def _frames(
        self, container: Any, stream: Any, plan: list[tuple[int, int]] | None, times: set[int] | None, errors: list[str]
    ) -> Iterator[Any]:
        """The frames that decode, in the order in which they are shown, up to where the file ends or breaks off.

        Where `times` are given, the decoder may leave out frames of other times if no other frame refers to them.
        """

        context = stream.codec_context
        ranges = deque(plan or ())
        begun = plan is None
        skip = None
        try:
            if plan is not None and plan[0][0] > 0:
                container.seek(next(pts for pts, position in self.keys if position == plan[0][0]), stream=stream)
            elif self.seek is not None:
                container.seek(self.seek, stream=stream)
            for packet in container.demux(stream):
                if not packet.size:  # would tell the decoder that nothing follows
                    continue
                if plan is not None:
                    position = self.positions.get(packet.pts, len(self.positions))
                    if not begun and position > ranges[0][0]:
                        errors.append("the seek went beyond the key frame")
                        return
                    if position > ranges[0][1]:
                        ranges.popleft()
                        if not ranges:
                            break
                        yield from stream.decode(None)
                        context.flush_buffers()
                    if position < ranges[0][0]:
                        continue
                    begun = True
                if times is not None and skip != (packet.pts not in times):
                    skip = packet.pts not in times
                    context.skip_frame = "NONREF" if skip else "DEFAULT"
                try:
                    frames = stream.decode(packet)
                except read_errors() as error:
                    errors.append(str(error))
                else:
                    yield from frames
        except read_errors() as error:
            errors.append(str(error))
        try:
            held_back = stream.decode(None)  # for reordering
        except read_errors() as error:
            errors.append(str(error))
        else:
            yield from held_back


class _ToReducedRGB(ToRGB):
    """Reduces frames to `short_side` too: swscale resizes in the same pass, without aliasing."""

    def __init__(self, path: str, stream: Any, short_side: int | None) -> None:
        super().__init__(path, stream)
        self.short_side = short_side

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        return reduced_size(height, width, self.short_side)


def _in_order(frames: Tensor, wanted: list[int], numbers: list[int]) -> Tensor:
    """Of the frames `wanted` those of `numbers`, copied only where the two differ."""
    return frames if wanted == numbers else frames[[wanted.index(number) for number in numbers]]
