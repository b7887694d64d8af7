"""The page of examples/space with a tiny model, and a clip of which it is known what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import app
import numpy as np
import pytest
from made_videos import write_frames

TINY = {
    "image_size": 64,
    "num_frames": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 7,
}  # grid (4, 4, 4): 64 tokens
MODEL, RERO, FIRST, CAMERA, RANDOM, TUBE, CELL = "tiny, random weights", *app.SELECTORS


def with_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RANDOM", {MODEL: TINY})
    app.load.cache_clear()


def half_moving(path: Path, length: int = 40) -> Path:
    """64×64 pixels in blocks of the tokens' size: the left half stays as it is, the right half is new in each frame."""
    draw = np.random.default_rng(0)
    still = draw.integers(20, 235, (1, 4, 2, 3))
    blocks = np.concatenate([np.repeat(still, length, 0), draw.integers(20, 235, (length, 4, 2, 3))], axis=2)
    return write_frames(path, blocks.astype(np.uint8).repeat(16, 1).repeat(16, 2))


def settings(video: Path | None, selector: str = RERO, ratio: float = 0.5, model: str = MODEL) -> list[Any]:
    return [None if video is None else str(video), 0, model, selector, ratio]
