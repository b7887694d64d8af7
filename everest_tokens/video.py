"""A clip of a video file as a VideoMAE takes it; frames are numbered in the order in which they are shown.

PyAV reads whatever FFmpeg reads. What feeds a GPU in training, by torchcodec where it can be trusted, and what goes on
with damaged files is examples/decoding.py.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTRA = "in a clone, pip install -e '.[video]'"


def load_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int = 16,
    stride: int = 4,
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    start: int | None = None,
    generator: torch.Generator | None = None,
    processor: Any = None,
) -> Tensor:
    """Load one clip of a local video file for a transformers VideoMAE: float32 (1, num_frames, 3, *size).

    The frames `dense_indices` are resized to just cover the crop (bilinear, antialiased), cropped in the centre, scaled
    to [0, 1] and normalised, to the pixel as transformers' VideoMAE processors do.

    Args:
        size: of the crop, (height, width), or one number for a square.
        mean, std: a number a channel; ImageNet's by default, as the published VideoMAE checkpoints were trained.
        processor: a transformers VideoMAE processor, or anything with image_mean, image_std, size and crop_size, in
            place of `size`, `mean` and `std`. Its do_* switches are not looked at.

    Raises:
        ValueError: an argument is out of its range, the path is missing, a directory, empty or without video, or a
            frame of the clip doesn't decode.
        ImportError: the `video` extra is not installed.
    """

    def choose(length: int) -> list[int]:
        return dense_indices(length, num_frames, stride, start=start, generator=generator)

    look = Look(size, mean, std, processor)
    return look.crops(_read(os.fsdecode(path), choose), [0.5])[None]


def load_views(
    path: str | os.PathLike[str],
    *,
    clips: int = 5,
    crops: int = 3,
    num_frames: int = 16,
    stride: int = 4,
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    processor: Any = None,
) -> Tensor:
    """Load several views of a video for a test: float32 (clips·crops, num_frames, 3, *size), a clip's crops in turn.

    Arguments that aren't listed are `load_clip`'s, and so is what is raised.

    Args:
        clips: of `view_indices`.
        crops: 1 in the middle, or 3 at the ends and in the middle of what the crop leaves over.
        stride: 0 takes a frame from each of `num_frames` equal segments.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {crops!r}")
    look = Look(size, mean, std, processor)

    def choose(length: int) -> list[int]:
        return [number for view in view_indices(length, num_frames, stride, clips) for number in view]

    frames = look.crops(
        _read(os.fsdecode(path), choose), [0.5] if crops == 1 else [0.0, 0.5, 1.0]
    )  # (crops·clips·T, …)
    views = frames.unflatten(0, (crops, clips, num_frames))
    return views.transpose(0, 1).flatten(0, 1).contiguous()


def view_indices(length: int, num_frames: int, stride: int, clips: int) -> list[list[int]]:
    """Number the frames of `clips` temporal views, spread evenly over a video of `length` frames.

    Dense: starts from 0 to the last one that fits (one clip: the middle). With stride 0 the video is cut into
    `num_frames` equal segments, each into `clips` equal parts, and clip c takes the middle of each part c (TSN, Wang et
    al., 2016).

    Raises:
        ValueError: as `dense_indices`, or clips is not a positive integer.
    """
    clips = integer("clips", clips, least=1)
    if stride == 0:
        parts = 2 * integer("num_frames", num_frames, least=1) * clips
        middles = [(2 * part + 1) * integer("length", length, least=1) // parts for part in range(parts // 2)]
        return [middles[clip::clips] for clip in range(clips)]
    if clips == 1:
        return [dense_indices(length, num_frames, stride)]
    last = max(length - (num_frames - 1) * stride - 1, 0)
    return [dense_indices(length, num_frames, stride, start=clip * last // (clips - 1)) for clip in range(clips)]


class Look:
    """How frames become what a model sees: resized to just cover the crop, cropped, scaled to [0, 1], normalised."""

    def __init__(self, size: Any, mean: Sequence[float], std: Sequence[float], processor: Any = None) -> None:
        try:
            from torchvision.transforms.v2 import functional
        except ImportError as error:
            raise ImportError(f"preparing a clip needs torchvision: {EXTRA}") from error
        self.functional, self.mean, self.std, short_side = functional, list(mean), list(std), None
        if processor is not None:
            size, short_side = _geometry(processor)
            self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.crop = (integer("size", height, least=1), integer("size", width, least=1))
        self.least = self.crop if short_side is None else (integer("short_side", short_side, least=max(self.crop)),) * 2

    def crops(self, frames: Tensor, places: Sequence[float]) -> Tensor:
        """uint8 (T, 3, H, W) → float32 (places·T, 3, *crop); places: 0 for the top or left, 0.5 for the middle."""
        (height, width), (old_height, old_width) = self.least, frames.shape[-2:]
        if height * old_width >= width * old_height:  # the height decides; the other side is rounded down
            width = max(width, height * old_width // old_height)
        else:
            height = max(height, width * old_height // old_width)
        frames = self.functional.resize(frames, [height, width], antialias=True)
        slack = height - self.crop[0], width - self.crop[1]
        cut = []
        for place in places:
            top, left = (int(place * each) for each in slack)  # as the processors do; v2.CenterCrop rounds otherwise
            cut.append(frames[..., top : top + self.crop[0], left : left + self.crop[1]])
        pixels = self.functional.to_dtype(torch.cat(cut), torch.float32, scale=True)
        return self.functional.normalize(pixels, self.mean, self.std).contiguous()


def dense_indices(
    length: int,
    num_frames: int = 16,
    stride: int = 4,
    *,
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Number the frames of a clip: `num_frames` of them, `stride` apart, from a video of `length` frames.

    The clip starts at `start`, or at random (uniformly over all starts at which it fits) where a generator is given, or
    else so that it lies in the middle. Where it doesn't fit, the last frame is repeated.

    Raises:
        ValueError: length, num_frames or stride is not a positive integer; start is not in [0, length); both start and
            generator are given.
    """
    length = integer("length", length, least=1)
    num_frames = integer("num_frames", num_frames, least=1)
    stride = integer("stride", stride, least=1)
    slack = max(length - (num_frames - 1) * stride - 1, 0)
    if start is None and generator is None:
        start = slack // 2
    elif start is None and generator is not None:
        start = int(torch.randint(slack + 1, (), generator=generator, device=generator.device))
    elif generator is not None:
        raise ValueError("expected start or generator, got both")
    else:
        start = integer("start", start, least=0)
    if start >= length:
        raise ValueError(f"start must be below the video's length {length}, got {start}")
    return [min(start + i * stride, length - 1) for i in range(num_frames)]


def integer(name: str, value: Any, *, least: int) -> int:
    """Return an argument as an int, or raise ValueError where it is none or below `least`."""
    with suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _geometry(processor: Any) -> tuple[tuple[int, int], int | None]:
    """(height, width) of a processor's crop and the short side before it. Both sizes may be a number or a mapping."""
    size, crop = (getattr(processor, name, None) for name in ("size", "crop_size"))
    sizes = [{"shortest_edge": side} if isinstance(side, int) else dict(side or {}) for side in (size, crop)]
    source = sizes[0 if crop is None else 1]
    height, width = (source.get(side) or source.get("shortest_edge") for side in ("height", "width"))
    if height is None or width is None:
        raise ValueError(f"expected a processor with a crop_size or a size, got size={size!r}, crop_size={crop!r}")
    return (height, width), sizes[0].get("shortest_edge")


def _read(path: str, choose: Callable[[int], list[int]]) -> Tensor:
    """Decode the frames that `choose` picks out of the file's number of frames: uint8 (T, 3, H, W), RGB."""
    length, times, numbers = look_through(path)
    wanted = choose(length)
    for seeks in (True, False) if numbers else (False,):
        found: dict[int, Tensor] = {}
        container, stream = open_video(path)  # anew: seeking back doesn't work everywhere
        to_rgb = ToRGB(path, stream)
        with container, suppress(*read_errors()):
            stream.thread_type, stream.codec_context.thread_count = "AUTO", torch.get_num_threads()
            if seeks:
                container.seek(times[min(wanted)], stream=stream)
            for place, frame in enumerate(decode(container, stream)):
                number = numbers.get(frame.pts, -1) if numbers else place
                if seeks and place == 0 and (number > min(wanted) or not frame.key_frame):
                    break  # the seek went too far: once more from the start
                if number in wanted:
                    found[number] = to_rgb(frame)
                if number >= max(wanted):
                    break
        if len(found) == len(set(wanted)):
            return torch.stack([found[number] for number in wanted]).permute(0, 3, 1, 2)
    raise ValueError(f"{path}: damaged or cut off, not all frames of the clip could be decoded")


def decode(container: Any, stream: Any) -> Iterator[Any]:
    """Decode the frames of a stream from where its container stands."""
    # An empty packet in between would tell the decoder that nothing follows, as None does at the end.
    packets = chain((packet for packet in container.demux(stream) if packet.size), [None])
    return chain.from_iterable(map(stream.decode, packets))


def look_through(path: str) -> tuple[int, list[int], dict[int, int] | None]:
    """Number a file's frames without decoding them, as `number_frames` does."""
    container, stream = open_video(path)
    packets: list[tuple[Any, bool]] = []
    with container, suppress(*read_errors()):  # which come up again if decoding gets as far as that
        packets.extend((packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size)
    return number_frames(path, container, stream, packets)


def open_video(path: str) -> tuple[Any, Any]:
    """Open a file with PyAV: (container, video stream), the stream being the one that FFmpeg deems best."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: {'a directory, expected a video file' if os.path.isdir(path) else 'no such file'}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading a video needs PyAV: {EXTRA}") from error
    try:
        # An absolute path is no URL, whatever the name begins with, and a playlist leads to no other protocol.
        options = {"protocol_whitelist": "file"}
        container = av.open(os.path.abspath(path), metadata_errors="ignore", options=options)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: undecodable, FFmpeg can't open it ({error.strerror})") from error
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a piece of music
        problem = "no video stream, audio only" if container.streams.audio else "undecodable, no video stream"
    elif stream.codec_context is None:
        problem = "undecodable, this FFmpeg has no decoder for its video stream"
    else:
        return container, stream
    container.close()
    raise ValueError(f"{path}: {problem}")


def number_frames(
    path: str, container: Any, stream: Any, packets: list[tuple[Any, bool]], *, whole: bool = True
) -> tuple[int, list[int], dict[int, int] | None]:
    """Count the frames of packets (time stamp, hidden by an edit list) in the file's order, from its start if `whole`.

    Returns their number, their time stamps in the order in which they are shown ([] where not known), and time stamp →
    number, None where all frames must be decoded and counted instead.
    """
    shown = [pts for pts, hidden in packets if not hidden]
    if not shown:
        raise ValueError(f"{path}: undecodable, its video stream contains no frames")
    guessed = "avi" in container.format.name.split(",")  # by FFmpeg
    hides = stream.codec_context.codec.canonical_name in ("vp8", "vp9")
    # Cut at a key frame, a file has frames behind it that are shown before it but refer to what is gone.
    early = list(takewhile(lambda pts: pts is None or pts <= shown[0], shown[1:] if shown[0] is not None else []))
    first = first_frame(path) if early and whole and not (packets[0][1] or guessed) else None
    if first is not None:
        decodable = [pts for pts in early if not first.key_frame and pts is not None and pts >= first.pts]
        shown = [shown[0], *decodable, *shown[1 + len(early) :]]
    length = len(shown)
    if hides:  # a frame that isn't shown is stored before the one shown next, under its time stamp
        length = 1 + sum(pts is None or pts != following for pts, following in pairwise(shown))
    if guessed or None in shown:
        return length, [], None
    times = sorted(shown)
    numbers = {pts: number for number, pts in enumerate(times)}
    # H.264 and HEVC reorder a frame by at most 16 places; one further off means that the clock jumped or began again.
    if any(abs(numbers[pts] - place) > 32 for place, pts in enumerate(shown)):
        return length, [], None
    if len(numbers) < len(shown):
        return length, sorted(numbers) if hides else times, None
    return length, times, numbers


def first_frame(path: str) -> Any:
    """Decode the first frame that a file shows; None where nothing decodes."""
    container, stream = open_video(path)
    with container, suppress(*read_errors()):
        return next(container.decode(stream), None)
    return None


class ToRGB:
    """Converts frames to uint8 (H, W, 3), turned upright and all of the size of the file's first one.

    One reformatter for all: setting one up costs more than the conversion, and so do threads.
    """

    def __init__(self, path: str, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self.reformatter = path, VideoReformatter()
        self.stated = (stream.codec_context.height, stream.codec_context.width)
        self.size: tuple[int, int] | None = None

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Give the size to convert to, before a turn, for a video of that size."""
        return height, width

    def __call__(self, frame: Any) -> Tensor:
        if self.size is None:
            changes = (frame.height, frame.width) != self.stated
            first = (first_frame(self.path) if changes else None) or frame
            self.size = self.choose_size(first.height, first.width)
        height, width = self.size
        to_rgb24: dict[str, Any] = {"width": width, "height": height, "format": "rgb24", "threads": 1}
        try:
            rgb = self.reformatter.reformat(frame, **to_rgb24)
        except read_errors():
            frame.colorspace = 2  # unspecified; swscale refuses the reserved ones that some files state
            rgb = self.reformatter.reformat(frame, **to_rgb24)
        # frame.rotation is the turn, counterclockwise in degrees, that the display matrix asks for.
        turns, pixels = round(frame.rotation / 90) % 4, torch.from_numpy(rgb.to_ndarray())
        return torch.rot90(pixels, turns, dims=(0, 1)) if turns else pixels  # rot90 copies even by 0 turns


def read_errors() -> tuple[type[Exception], ...]:
    """Name what PyAV raises where a file is damaged; IndexError where damage pretends to be a new stream."""
    import av

    return av.FFmpegError, IndexError
