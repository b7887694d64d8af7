"""The frames of decoding.py by torchcodec: what it must be told, and which files it is not to be trusted with.

It takes every packet that a container marks as a key frame for one that decoding may begin at, numbers frames by rules
of its own and converts some colours in its own way. So it gets PyAV's numbers and is told which key frames are true
ones, and what it gives is checked by its time stamps.
"""

from __future__ import annotations

import inspect
import json
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from everest_tokens.video import first_frame


@lru_cache(maxsize=1)  # a failing import is not remembered by Python, and looking for FFmpeg takes a while
def torchcodec_decoder() -> Any:
    """torchcodec's VideoDecoder class, None where it isn't installed, too old or doesn't find FFmpeg."""
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    # Recent versions import without FFmpeg, say so here, and raise only when a file is opened.
    found = getattr(torchcodec, "ffmpeg_major_version", 0) is not None
    return VideoDecoder if found and "custom_frame_mappings" in inspect.signature(VideoDecoder).parameters else None


def frames_by_torchcodec(reader: Any, wanted: list[int], short_side: int | None, cut_off: bool) -> Tensor:
    """The frames of ascending numbers, (N, 3, H, W), at the places and from the key frames that PyAV's reader found.

    Raises:
        ValueError: torchcodec fails on this file, or would give other frames than PyAV; PyAV can say what is wrong.
    """
    try:
        return _decode(reader, wanted, short_side, cut_off)
    except _Refusal as error:
        raise ValueError(f"{reader.path}: not for torchcodec ({error}); backend='pyav' may read it") from error


class _Refusal(Exception):
    pass


def _decode(reader: Any, wanted: list[int], short_side: int | None, cut_off: bool) -> Tensor:
    if reader.part is not None:
        raise _Refusal("it reads all of a long file to number the frames of a part")
    if not {"mp4", "matroska"} & {*reader.format.split(",")}:
        raise _Refusal("it is reliable in MP4, QuickTime and Matroska files alone")
    if reader.numbers is None:
        raise _Refusal("its time stamps don't number its frames")
    if not reader.plain_colours:
        raise _Refusal("it converts video of more than 8 bits, fields or odd sides to other colours")
    if cut_off:
        raise _Refusal("the file seems to be cut off")
    shown = sorted((packet for packet in reader.packets if packet.pts in reader.numbers), key=lambda packet: packet.pts)
    frames = [{"pts": each.pts, "duration": each.duration, "key_frame": int(each.random_access)} for each in shown]
    try:
        decoder = torchcodec_decoder()(
            os.path.abspath(reader.path),
            stream_index=reader.stream_index,
            num_ffmpeg_threads=torch.get_num_threads(),
            custom_frame_mappings=json.dumps({"frames": frames}),
        )
        batch = decoder.get_frames_at(wanted)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _Refusal(str(error)) from error
    expected = torch.tensor([float(reader.times[number] * reader.clock) for number in wanted], dtype=torch.float64)
    if ((batch.pts_seconds - expected).abs() > float(reader.clock) / 2).any():
        raise _Refusal("it gave frames of other times")
    height, width = batch.data.shape[-2:]
    if sorted((height, width)) != sorted(reader.size):
        raise _Refusal("the video changes its size")
    reduced = reduced_size(height, width, short_side)
    if reduced == (height, width):
        return batch.data
    from torchvision.transforms.v2 import functional

    return functional.resize(batch.data, [*reduced], antialias=True)


def has_plain_colours(path: str, context: Any) -> bool:
    """Whether every converter gives the same colours: 8 bits, no fields, even sides where colours have half of them."""
    components = context.format.components if context.format else ()
    halved = any((part.width, part.height) != (context.width, context.height) for part in components)
    odd = halved and (context.width % 2 or context.height % 2)
    if hasattr(context, "field_order"):
        fields = context.field_order > 1
    else:  # before PyAV 18
        fields = getattr(first_frame(path), "interlaced_frame", False)
    return all(part.bits <= 8 for part in components) and not odd and not fields


def reduced_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """The size (height, width) with this short side and the same aspect ratio; never a larger one."""
    short = min(height, width)
    if short_side is None or short_side >= short:
        return height, width
    return round(height * short_side / short), round(width * short_side / short)


def random_access(packet: Any, codec: str, configuration: bytes | None) -> bool:
    """Whether decoding may begin at a key packet: H.264 and HEVC mark those too where a gradual refresh only begins."""
    if codec not in ("h264", "hevc"):
        return True
    h264, data = codec == "h264", bytes(packet)
    if configuration and configuration[0] == 1:  # of MP4 and Matroska: a unit's size is in front of it
        units, place, bytes_of_size = [], 0, 1 + (configuration[4 if h264 else 21] & 3)
        while place + bytes_of_size < len(data):
            size = int.from_bytes(data[place : place + bytes_of_size], "big")
            units.append(data[place + bytes_of_size : place + bytes_of_size + size])
            place += bytes_of_size + size
    else:
        units = [unit for unit in data.split(b"\0\0\1")[1:] if unit]
    if not h264:
        return any(16 <= unit[0] >> 1 & 63 <= 23 for unit in units if unit)  # IRAP pictures
    # An instantaneous refresh, or a picture from which on all are right.
    return any(unit[0] & 31 == 5 or (unit[0] & 31 == 6 and _recovers_at_once(unit)) for unit in units if unit)


def _recovers_at_once(unit: bytes) -> bool:
    """Whether a unit of H.264's supplemental information says that pictures are right from here on."""
    numbers, place = [], 1
    while place < len(unit):
        total = 0
        while place < len(unit) - 1 and unit[place] == 255:  # a number is a sum of bytes up to the first that isn't 255
            total, place = total + 255, place + 1
        numbers.append(total + unit[place])
        place += 1
        if len(numbers) == 2:  # a message's kind and size
            kind, size = numbers
            if kind == 6 and place < len(unit):
                return bool(unit[place] & 128)  # recovery_frame_cnt, in an Exp-Golomb code, is 0
            numbers, place = [], place + size
    return False
