"""Videos made on the spot: a textured shape that moves in one of four directions over a textured background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made_videos import write_frames

DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def moving_shape(direction: str, seed: int, frames: int = 12, size: tuple[int, int] = (72, 72)) -> np.ndarray:
    """uint8 (T, H, W, 3): a bright square of random texture that moves 4 pixels a frame, over a static background."""
    generator = np.random.default_rng(seed)
    height, width = size
    background = np.repeat(np.repeat(generator.integers(40, 110, (height // 8 + 1, width // 8 + 1, 3)), 8, 0), 8, 1)
    side, speed = 20, 4
    shape = generator.integers(150, 255, (side, side, 3))
    down, right = DIRECTIONS[direction]
    top, left = int(generator.integers(height)), int(generator.integers(width))
    clip = []
    for step in range(frames):
        frame = background[:height, :width].copy()
        y, x = (top + down * speed * step) % height, (left + right * speed * step) % width
        rows, columns = (y + np.arange(side)) % height, (x + np.arange(side)) % width  # comes in again
        frame[np.ix_(rows, columns)] = shape
        clip.append(frame)
    return np.stack(clip).astype(np.uint8)


def write_motion_set(root: Path, videos: int, seed: int = 0) -> list[tuple[Path, int]]:
    """`videos` files in folders named by direction: (path, label), the labels in turn."""
    written = []
    for number in range(videos):
        label = number % len(DIRECTIONS)
        direction = list(DIRECTIONS)[label]
        path = root / direction / f"v_{direction}_g{number:03d}.mp4"
        written.append((write_frames(path, moving_shape(direction, seed + number)), label))
    return written
