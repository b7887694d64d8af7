"""transformers' video-classification pipeline where its decoder, torchcodec, isn't usable."""

from __future__ import annotations

from typing import Any

import pytest


def let_pyav_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where the pipeline can decode; else its video processors decode with PyAV, which transformers can too."""
    try:
        from transformers.utils.import_utils import is_torchcodec_usable
        from transformers.video_processing_utils import BaseVideoProcessor
        from transformers.video_utils import load_video
    except ImportError:  # an older one, which decodes with PyAV in its pipeline
        return
    if is_torchcodec_usable(decode="video"):
        return

    def fetch_videos(self: Any, videos: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(videos, list):
            return list(zip(*(fetch_videos(self, video, sample_indices_fn) for video in videos), strict=True))
        return load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn)

    monkeypatch.setattr(BaseVideoProcessor, "fetch_videos", fetch_videos)
