"""Animations from equally large images: GIF by Pillow, MP4 by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".gif", ".mp4")


def save_animation(images: Sequence[NDArray[np.uint8]], out: Path, fps: float = 5.0) -> None:
    """Write images (H, W, 3), RGB, as .gif, which repeats, or .mp4, whose sides become even numbers.

    Raises:
        ImportError: Pillow or PyAV is not installed (the `demo` extra).
    """
    try:
        if out.suffix.lower() == ".gif":
            _save_gif(images, out, fps)
        else:
            _save_mp4(images, out, fps)
    except ImportError as error:
        raise ImportError(f"{out.name} needs Pillow or PyAV: in a clone, pip install -e '.[demo]'") from error


def _save_gif(images: Sequence[NDArray[np.uint8]], out: Path, fps: float) -> None:
    from PIL import Image

    # One palette for all, and no dithering: what stands still must not flicker, and compresses away.
    palette = Image.fromarray(np.concatenate(images)).quantize(256)
    frames = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def _save_mp4(images: Sequence[NDArray[np.uint8]], out: Path, fps: float) -> None:
    import av

    height, width = (side // 2 * 2 for side in images[0].shape[:2])  # which the codec's halved colours need
    with av.open(str(out), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in images:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24"))
            )
        container.mux(stream.encode())
