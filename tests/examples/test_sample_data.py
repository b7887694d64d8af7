"""The made folder: a label for each shot of a real film, and no frame both to train and to test on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sample_data
from decoding import read_frames
from own_videos import find_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    assert sample_data.main([str(root), "--train", "3", "--test", "2"]) == 0
    return root


def test_it_is_a_folder_that_is_split(folder):
    found = find_videos(folder, labelled=True)
    assert found.labels == ["shot1", "shot2", "shot3", "shot4"]
    assert [entry.label for entry in found.train] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [entry.label for entry in found.test] == [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2
    assert read_frames(found.test[0].path, list(range(16))).shape == (16, 3, 128, 128)


def test_no_frame_is_in_both(monkeypatch, tmp_path):
    """A film whose frames say their numbers: three shots of 50, told apart by their brightness."""
    film = np.zeros((150, 140, 160, 3), np.uint8)
    film[:, 0, :, 0] = np.arange(150)[:, None]  # on every window's first row, wherever it lies
    film[:] = film[:, :1]
    film[..., 1] = np.repeat([0, 250, 0], 50)[:, None, None]
    written: dict[str, set[int]] = {"train": set(), "test": set()}
    monkeypatch.setattr(
        sample_data, "write", lambda path, frames: written[path.parts[-3]].update(frames[:, 0, 0, 0].tolist())
    )
    assert [len(shot) for shot in sample_data.shots(film)] == [50, 50, 50]
    monkeypatch.setattr(sample_data, "shots", lambda frames: np.split(film, 3))
    sample_data.main([str(tmp_path)])
    assert written["train"]
    assert written["test"]
    assert not written["train"] & written["test"]
