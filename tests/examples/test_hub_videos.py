"""Hugging Face data sets as lists: rows, labels, splits, and frames that are the files' own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import Sampling, TestViews, TrainingClips
from decoding import read_frames
from in_memory import file_of
from made_videos import write_frames
from motion_videos import moving_shape
from own_videos import split_off

datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
from hub_videos import find_parts, find_rows, is_data_set, rows_of  # noqa: E402

LABELS = ["down", "up"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """down/0.mp4, up/0.mp4, down/1.mp4, …: embedded, two of them have the same name."""
    root = tmp_path_factory.mktemp("files")
    return [
        write_frames(root / LABELS[number % 2] / f"{number // 2}.mp4", moving_shape(LABELS[number % 2], number))
        for number in range(6)
    ]


def table(files: list[Path], embedded: bool, labels: list[Any], feature: Any) -> Any:
    videos = [{"path": path.name, "bytes": path.read_bytes()} if embedded else str(path) for path in files]
    features = datasets.Features({"id": datasets.Value("int64"), "clip": datasets.Video(), "label": feature})
    rows = {"id": list(range(len(files))), "clip": videos, "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


class TestRows:
    @pytest.mark.parametrize("embedded", [False, True])
    def test_frames_are_the_files(self, files, embedded):
        found = rows_of(
            {"train": table(files, embedded, [0, 1] * 3, datasets.ClassLabel(names=LABELS))}, "it", labelled=True
        )
        assert found.labels == LABELS
        assert [row.label for row in found.train] == [0, 1] * 3
        assert len({row.path for row in found.train}) == 6
        before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        for row, path in zip(found.train, files, strict=True):
            with row.local() as local:
                assert torch.equal(read_frames(local, [0, 5, 11]), read_frames(path, [0, 5, 11]))
        assert not [name for name in before ^ set(os.listdir("/dev/shm") if before else ()) if "everest-" in name]

    @pytest.mark.parametrize(
        ("labels", "feature", "names", "numbers"),
        [
            (["up", "down"] * 3, "string", ["down", "up"], [1, 0] * 3),
            ([2, 0] * 3, "int64", ["0", "1", "2"], [2, 0] * 3),
        ],
    )
    def test_labels_without_names_stated(self, files, labels, feature, names, numbers):
        found = rows_of({"train": table(files, True, labels, datasets.Value(feature))}, "it", labelled=True)
        assert found.labels == names
        assert [row.label for row in found.train] == numbers

    def test_splits_and_hidden_labels(self, files):
        kind = datasets.ClassLabel(names=LABELS)
        splits = {"train": table(files[:4], True, [0, 1, 0, 1], kind), "validation": table(files[4:5], True, [0], kind),
                  "test": table(files[4:], True, [-1, 1], kind)}  # fmt: skip
        found = rows_of(splits, "it", labelled=True)
        assert [len(part) for part in (found.train, found.val, found.test)] == [4, 1, 1]
        assert found.test[0].label == 1
        assert found.skipped == {"rows without a label": 1}
        unlabelled = rows_of(splits, "it", labelled=False)
        assert [row.label for row in unlabelled.train + unlabelled.test] == [None] * 6

    def test_labels_of_a_model_say_the_places(self, files):
        splits = {"test": table(files, True, [0, 1] * 3, datasets.ClassLabel(names=LABELS))}
        found = find_parts(splits, "it", ["up", "left", "down"])
        assert [row.label for row in found.test] == [2, 0] * 3

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (lambda files: {"all": table(files, True, [0, 1] * 3, datasets.Value("int64"))}, "no split train, but all"),
            (lambda files: {"train": table(files, True, [0] * 6, datasets.Value("int64"))}, "fewer than two labels: 0"),
            (
                lambda files: {
                    "train": table(files, True, ["a", "b"] * 3, datasets.Value("string")),
                    "test": table(files, True, ["c"] * 6, datasets.Value("string")),
                },
                "a label in test that is not among a, b: c",
            ),
            (lambda files: {"train": datasets.Dataset.from_dict({"label": [0, 1]})}, "one column of videos"),
            (
                lambda files: {
                    "train": table(files, True, [0] * 6, datasets.Value("int64")).rename_column("label", "kind")
                },
                "no column of labels",
            ),
        ],
    )
    def test_what_cannot_be_trained_on_is_an_error(self, files, splits, message):
        with pytest.raises(ValueError, match=message):
            rows_of(splits(files), "it", labelled=True)

    def test_an_unreadable_row_is_named(self, files, tmp_path):
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(b"no video")
        found = rows_of(
            {"train": table([broken, *files], True, [0, 1] * 3 + [0], datasets.ClassLabel(names=LABELS))},
            "it",
            labelled=True,
        )
        item = TrainingClips(found.train, Sampling(2, 1), lambda clip, generator: clip)[0]
        [(name, reason)] = item["bad"]
        assert name == "train-000000-broken.mp4"
        assert name in reason
        assert "everest-" not in reason
        assert TestViews(found.train, Sampling(2, 1), 1, 1, 32)[0]["problem"].startswith(name)


class TestFindRows:
    def test_saved_to_disk(self, files, tmp_path):
        kind = datasets.ClassLabel(names=LABELS)
        datasets.DatasetDict(train=table(files, True, [0, 1] * 3, kind)).save_to_disk(str(tmp_path / "set"))
        assert is_data_set(tmp_path / "set")
        found = find_rows(str(tmp_path / "set"), labelled=True)
        assert [row.label for row in found.train] == [0, 1] * 3
        rest, held_out = split_off(found.train, 0.34, 0)
        assert sorted(row.label for row in held_out) == [0, 1]
        assert len(rest) == 4

    def test_a_folder_of_parquet(self, files, tmp_path):
        (tmp_path / "set").mkdir()
        table(files, True, [0, 1] * 3, datasets.ClassLabel(names=LABELS)).to_parquet(tmp_path / "set" / "train.parquet")
        assert is_data_set(tmp_path / "set")
        clips = TrainingClips(find_rows(str(tmp_path / "set"), labelled=True).train, Sampling(2, 1), lambda c, g: c)
        assert clips[1]["labels"].tolist() == [1]
        assert clips[1]["bad"] == []

    def test_videofolder_with_metadata(self, files, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        lines = []
        for number, path in enumerate(files):
            (folder / f"{number}.mp4").write_bytes(path.read_bytes())
            lines.append(json.dumps({"file_name": f"{number}.mp4", "label": LABELS[number % 2]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        assert is_data_set(folder)
        found = find_rows(str(folder), labelled=True)
        assert found.labels == LABELS
        assert [(row.path.name, row.label) for row in found.train] == [(f"{n}.mp4", n % 2) for n in range(6)]

    def test_a_plain_folder_is_no_data_set(self, files):
        assert not is_data_set(files[0].parents[1])

    def test_no_such_data_set_is_one_line(self):
        with pytest.raises(ValueError, match=r"data: nobody/nothing is no folder, and no data set[^\n]*$"):
            find_rows("nobody/nothing", labelled=True)


class TestInMemory:
    def test_it_is_there_while_it_is_read(self):
        with file_of(b"content", ".mp4") as path:
            assert path.read_bytes() == b"content"
            assert path.suffix == ".mp4"
        assert not path.exists()

    def test_it_goes_when_reading_fails(self):
        with pytest.raises(RuntimeError, match="reading"), file_of(b"content", ".mp4") as path:
            raise RuntimeError("reading")
        assert not path.exists()

    def test_without_room_in_memory_it_lies_elsewhere(self, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
        with file_of(b"content", ".mp4") as path:
            assert not str(path).startswith("/dev/shm")
            assert path.read_bytes() == b"content"
