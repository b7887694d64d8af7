"""transformers' video-classification pipeline where its decoder, torchcodec, isn't usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def decodes() -> bool:
    """Whether the pipeline takes paths here: older ones decode with PyAV, newer ones with torchcodec alone."""
    try:
        from transformers.utils.import_utils import is_torchcodec_usable
    except ImportError:
        return True
    return is_torchcodec_usable(decode="video")


def for_pipeline(video: Path, num_frames: int) -> Any:
    """The path, or the frames that docs/using-a-model.md gives to the pipeline."""
    if decodes():
        return str(video)
    from transformers.video_utils import load_video

    return load_video(str(video), num_frames=num_frames)[0]
