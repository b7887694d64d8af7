"""Clips from video files: frames by number, dense sampling, and the transform to what a VideoMAE takes.

Frames are numbered in the order in which they are shown. PyAV (in a clone, `pip install -e '.[video]'`) reads whatever
FFmpeg reads; torchcodec, where it is installed and finds the system's FFmpeg libraries, reads the common containers
faster and gives the same frames. Neither is imported before a file is opened. Files are local: a path, no URL.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.decoding import with_reader

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def video_length(path: str | os.PathLike[str], *, backend: str | None = None) -> int:
    """How many frames of a video file can be addressed, counted by reading its packets without decoding them.

    The count in a container's header is not used: it includes what an edit list hides and what a cut-off file lacks.
    In a damaged file some of the addressable frames may turn out not to decode (see `read_frames`).

    Raises:
        ValueError: as `read_frames`. ImportError: as `read_frames`.
    """
    return with_reader(path, backend, lambda reader: reader.length)


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
    backends agree to the bit, but for the chroma of interlaced video.

    Args:
        path: a local video file.
        indices: frame numbers from 0, in any order, repeated at will. One beyond the end gives the last frame. Or a
            function from the number of frames to such numbers, which saves a call of `video_length`.
        short_side: resize frames whose short side is longer to this, keeping the aspect ratio (bilinear, antialiased);
            smaller frames stay as they are.
        part: (from, to) in seconds from the start of the video: frames are numbered from the first one at or after
            `from`, and the last one is before `to`. Only that part of the file is read, where its format allows.
        max_lost: the share, 0 to 1, of the frames asked for that may fail to decode.
        backend: "pyav", "torchcodec" or None: torchcodec where it works and can be trusted with the file, else PyAV.

    Returns:
        uint8 (T, 3, H, W), RGB, in the order of `indices`; the channels lie next to each other in memory (not
        contiguous), as decoders give them and torchvision resizes them fastest. If the video changes its size, all have
        that of the first.

    Frames that a damaged or cut-off file promises but that don't decode are replaced by the last decodable one before
    them, with one warning. (Matroska and MPEG-TS promise no number of frames: cut off, they are just shorter.)

    Raises:
        ValueError: indices are empty, negative or not integers; another argument is out of its range; the path is
            missing, a directory, empty (0 bytes), without video (audio only) or undecodable; `part` has no frames; more
            than `max_lost` don't decode; or torchcodec was asked for and cannot be trusted with this file (a container
            other than MP4, QuickTime and Matroska, VP8 video, damage) or with a part of a file.
        ImportError: no backend, or not the one asked for, is installed.
    """
    if short_side is not None:
        short_side = _integer("short_side", short_side, least=1)
    if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] < math.inf):
        raise ValueError(f"part must be (from, to) in seconds, 0 <= from < to, got {part!r}")
    if not 0 <= max_lost <= 1:
        raise ValueError(f"max_lost must be a share from 0 to 1, got {max_lost!r}")
    if callable(indices):
        choose = indices
        return with_reader(
            path, backend, lambda reader: reader.read(_numbers(choose(reader.length)), short_side, max_lost), part
        )
    numbers = _numbers(indices)
    return with_reader(path, backend, lambda reader: reader.read(numbers, short_side, max_lost), part)


def _numbers(indices: Any) -> list[int]:
    try:
        # Arrays and tensors become Python numbers first: a tensor's elements would let booleans through.
        values = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        numbers = [_integer("a frame index", value, least=0) for value in values]
    except TypeError as error:
        raise ValueError(f"expected frame indices, got {indices!r}") from error
    if not numbers:
        raise ValueError(f"expected at least one frame index, got {indices!r}")
    return numbers


def dense_indices(
    length: int,
    num_frames: int = 16,
    stride: int = 4,
    *,
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Frame numbers of one clip: `num_frames` of them, `stride` apart, from a video of `length` frames.

    The clip starts at `start`, or at random (uniformly over all starts at which it fits) where a generator is given, or
    else so that it lies in the middle. Where it doesn't fit, numbers beyond the end become `length - 1`: the last frame
    is repeated.

    Raises:
        ValueError: length, num_frames or stride is not a positive integer; start is not in [0, length); both start and
            generator are given.
    """
    length = _integer("length", length, least=1)
    num_frames = _integer("num_frames", num_frames, least=1)
    stride = _integer("stride", stride, least=1)
    slack = max(length - (num_frames - 1) * stride - 1, 0)
    if start is not None:
        if generator is not None:
            raise ValueError("expected start or generator, got both")
        start = _integer("start", start, least=0)
        if start >= length:
            raise ValueError(f"start must be below the video's length {length}, got {start}")
    elif generator is not None:
        start = int(torch.randint(slack + 1, (), generator=generator, device=generator.device))
    else:
        start = slack // 2
    return [min(start + i * stride, length - 1) for i in range(num_frames)]


def clip_transform(
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    short_side: int | None = None,
) -> nn.Module:
    """A torchvision pipeline from uint8 (..., C, H, W) to normalised float32 (..., C, *size).

    Resizes (bilinear, antialiased, keeping the aspect ratio), crops the centre, scales to [0, 1], normalises, and so
    gives what transformers' VideoMAE processors give, to the pixel (v2.CenterCrop may differ by one where the margin is
    odd).

    `mean` and `std` are ImageNet's by default. The published VideoMAE checkpoints were trained so, their
    preprocessor_config.json says so, and transformers' VideoMAEForPreTraining undoes just this normalisation to get at
    its pixel targets. The class defaults of transformers' VideoMAE processors, met when one is constructed rather than
    loaded, are 0.5 and 0.5 instead.

    Args:
        size: of the result, (height, width), or one number for a square.
        mean, std: of the normalisation, a number a channel, for pixels in [0, 1].
        short_side: length that the short side is resized to. By default the frame just covers the crop, which for a
            square is the same as `short_side=size`.

    Raises:
        ValueError: a size is not a positive integer, or short_side is below the crop's longer side.
        ImportError: torchvision is not installed.
    """
    from torchvision.transforms import v2

    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    crop = (_integer("size", height, least=1), _integer("size", width, least=1))
    cover = crop if short_side is None else (_integer("short_side", short_side, least=max(crop)),) * 2
    geometry = _ResizeAndCrop(cover, crop)
    return v2.Compose([geometry, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


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
    backend: str | None = None,
) -> Tensor:
    """One clip of a video file, ready for a transformers VideoMAE: float32 (1, num_frames, 3, *size).

    The clip is `dense_indices`'s, read by `read_frames` and prepared by `clip_transform`; see there for the arguments
    and errors. A `processor` (a transformers VideoMAE image or video processor, or anything with image_mean, image_std,
    size and crop_size) takes the place of `size`, `mean` and `std`. Its do_* switches are not looked at.
    """
    short_side = None
    if processor is not None:
        size, short_side = _processor_geometry(processor)
        mean, std = processor.image_mean, processor.image_std
    transform = clip_transform(size, mean, std, short_side=short_side)

    def choose(length: int) -> list[int]:
        return dense_indices(length, num_frames, stride, start=start, generator=generator)

    return transform(read_frames(path, choose, backend=backend)).unsqueeze(0).contiguous()


def _processor_geometry(processor: Any) -> tuple[tuple[int, int], int | None]:
    """(height, width) of a processor's crop and the short side before it. Both sizes may be a number or a mapping."""

    def entry(size: Any, key: str) -> int | None:
        if size is None or isinstance(size, int):
            return size
        return dict(size).get(key)

    size = getattr(processor, "size", None)
    crop = getattr(processor, "crop_size", None)
    short_side = entry(size, "shortest_edge")
    source = size if crop is None else crop
    height = entry(source, "height") or entry(source, "shortest_edge")
    width = entry(source, "width") or entry(source, "shortest_edge")
    if height is None or width is None:
        raise ValueError(f"expected a processor with a crop_size or a size, got size={size!r}, crop_size={crop!r}")
    return (height, width), short_side


class _ResizeAndCrop(nn.Module):
    """Resizes so that the frame just covers `cover`, then crops the centre; both are (height, width).

    A module because workers couldn't unpickle a lambda.
    """

    def __init__(self, cover: tuple[int, int], crop: tuple[int, int]) -> None:
        super().__init__()
        self.cover, self.crop = cover, crop

    def forward(self, clip: Tensor) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode, functional

        (old_height, old_width), (height, width) = clip.shape[-2:], self.cover
        if height * old_width >= width * old_height:  # the height decides; the other side is rounded down
            width = max(width, height * old_width // old_height)
        else:
            height = max(height, width * old_height // old_width)
        clip = functional.resize(clip, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return clip[..., top : top + self.crop[0], left : left + self.crop[1]]


def _integer(name: str, value: Any, *, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number
