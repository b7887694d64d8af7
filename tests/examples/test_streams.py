"""Shards as a stream: every sample once, split over processes and workers, shuffled, the same again when resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import io
import tarfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from clips import ClipCutter, Sampling, collate
from guards import TooManyBadVideos
from made_videos import write_frames
from motion_videos import moving_shape
from torch.utils.data import DataLoader
from trainer import VideoTrainer, _Beginnings

datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
from streams import TrainingStream, find_held_out, is_shards, open_hub, open_shards, shards_of  # noqa: E402

SHARDS, EACH = 4, 3


def write_shard(path: Path, samples: dict[str, tuple[bytes, int | None]]) -> Path:
    """Key → (video, label)."""
    with tarfile.open(path, "w") as tar:
        for key, (video, label) in samples.items():
            for suffix, content in (("mp4", video), ("cls", None if label is None else str(label).encode())):
                if content is not None:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_frames(tmp_path_factory.mktemp("video") / "a.mp4", moving_shape("up", 0, size=(32, 32))).read_bytes()


@pytest.fixture(scope="module")
def shards(video: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of three samples, each labelled with its own number, 0 to 11; and two of two to test on."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * EACH, shard * EACH + EACH)
        write_shard(root / f"train-{shard:03}.tar", {f"clip{number:03}": (video, number) for number in numbers})
    write_shard(root / "test-000.tar", {"a": (video, 3), "b": (video, 0)})
    return root


def stream_of(shards: Path | str, *, size: int = 32, **settings: Any) -> TrainingStream:
    cut = ClipCutter(Sampling(2, 1), lambda clip, generator: clip[..., :size, :size])
    return TrainingStream(open_shards(str(shards), labelled=True), cut, **{"steps": 6, "batch": 2, **settings})


def labels(stream: TrainingStream, workers: int = 0) -> list[list[int]]:
    """Of each batch; [] of one that is skipped."""
    workers = min(workers, stream.most_workers)
    loader = DataLoader(stream, batch_size=stream.batch, num_workers=workers, collate_fn=collate)
    return [batch["labels"].flatten().tolist() if batch else [] for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


class TestTrainingStream:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_has_every_sample_once_in_another_order(self, shards, workers):
        stream = stream_of(shards)
        epochs = []
        for epoch in range(2):
            stream.set_epoch(epoch)
            epochs.append(labels(stream, workers))
        for batches in epochs:
            assert [len(batch) for batch in batches] == [2] * 6
            assert sorted(flat(batches)) == list(range(12))
        assert epochs[0] != epochs[1]
        assert flat(epochs[0]) != sorted(flat(epochs[0]))
        stream.set_epoch(0)
        assert labels(stream, workers) == epochs[0]
        assert labels(stream_of(shards, seed=1), workers) != epochs[0]

    @pytest.mark.parametrize("processes", [2, 3])
    def test_processes_share_it(self, shards, processes):
        """Two divide the four shards; three don't, so that each reads all and takes every third sample."""
        parts = [
            flat(labels(stream_of(shards, process=process, processes=processes, steps=12 // processes // 2)))
            for process in range(processes)
        ]
        assert sorted(flat(parts)) == list(range(12))

    def test_shards_are_read_by_one_process_alone(self, shards):
        parts = [flat(labels(stream_of(shards, process=process, processes=2, steps=3))) for process in range(2)]
        files = [{label // EACH for label in part} for part in parts]
        assert not files[0] & files[1]

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("skip", [1, 4, 6])
    def test_going_on_gives_the_rest(self, shards, workers, skip):
        whole = labels(stream_of(shards), workers)
        stream = stream_of(shards)
        stream.skip(skip)
        assert labels(stream, workers) == [[]] * skip + whole[skip:]

    def test_what_is_skipped_is_not_decoded(self, shards, monkeypatch):
        decoded = []
        original = ClipCutter.__call__
        monkeypatch.setattr(ClipCutter, "__call__", lambda self, *args: decoded.append(0) or original(self, *args))
        stream = stream_of(shards)
        stream.skip(4)
        labels(stream)
        assert len(decoded) == 4

    def test_a_longer_epoch_begins_anew(self, shards):
        batches = flat(labels(stream_of(shards, steps=12), 2))
        assert Counter(batches) == dict.fromkeys(range(12), 2)

    def test_a_shorter_epoch_leaves_some_for_others(self, shards):
        stream = stream_of(shards, steps=3)
        seen = set()
        for epoch in range(8):
            stream.set_epoch(epoch)
            part = flat(labels(stream))
            assert len(set(part)) == 6
            seen |= set(part)
        assert seen == set(range(12))

    def test_pixels_depend_on_the_place_alone(self, shards):
        def items() -> list[torch.Tensor]:
            cut = ClipCutter(Sampling(2, 3), lambda clip, generator: clip + torch.randint(9, (), generator=generator))
            stream = TrainingStream(open_shards(str(shards), labelled=True), cut, steps=6, batch=2)
            return [item["pixel_values"] for item in stream]

        assert all(map(torch.equal, items(), items()))

    def test_unreadable_samples_are_named_and_change_nothing_for_the_others(self, shards, video, tmp_path):
        for shard in range(SHARDS):
            numbers = range(shard * EACH, shard * EACH + EACH)
            content = {n: b"no video" if n in (4, 5) else video for n in numbers}
            write_shard(tmp_path / f"train-{shard:03}.tar", {f"clip{n:03}": (content[n], n) for n in numbers})
        good, bad = flat(labels(stream_of(shards))), list(stream_of(tmp_path))
        shown = [int(item["labels"]) for item in bad]
        for place, label in enumerate(good):
            if label not in (4, 5):
                assert shown[place] == label
        named = {name: reason for item in bad for name, reason in item["bad"]}
        assert named.keys() == {"clip004", "clip005"}
        assert all("everest-" not in reason for reason in named.values())
        stream = stream_of(tmp_path)
        stream.skip(4)
        assert [int(item["labels"]) for item in list(stream)[8:]] == shown[8:]

    def test_no_more_workers_than_shards(self, shards):
        assert stream_of(shards).most_workers == 4
        assert stream_of(shards, process=1, processes=2).most_workers == 2
        one_by_one = stream_of(shards, steps=12, batch=1)  # three for each worker, as many as its shard holds
        assert sorted(flat(labels(one_by_one, 9))) == list(range(12))

    def test_without_labels(self, video, tmp_path):
        write_shard(tmp_path / "a.tar", {"x": (video, None), "y": (video, None)})
        cut = ClipCutter(Sampling(2, 1), lambda clip, generator: clip)
        stream = TrainingStream(open_shards(str(tmp_path), labelled=False), cut, steps=2, batch=1)
        assert [item.keys() for item in stream] == [{"pixel_values", "bad"}] * 2
        with pytest.raises(ValueError, match="no column of labels"):
            open_shards(str(tmp_path), labelled=True)


class TestElsewhere:
    def test_shards_behind_a_server(self, shards):
        handler = functools.partial(QuietHandler, directory=str(shards))
        with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                stream = stream_of(f"http://localhost:{server.server_port}/train-{{000..003}}.tar")
                assert sorted(flat(labels(stream))) == list(range(12))
            finally:
                server.shutdown()

    def test_a_data_set_without_downloading_it(self, video, tmp_path):
        """From a folder here, which `load_dataset` streams as it does what lies on the hub."""
        features = datasets.Features(
            {"clip": datasets.Video(), "kind": datasets.ClassLabel(names=[str(number) for number in range(12)])}
        )
        rows = {"clip": [{"path": None, "bytes": video}] * 12, "kind": list(range(12))}
        table = datasets.Dataset.from_dict(rows, features=features)
        for shard in range(4):
            table.shard(4, shard).to_parquet(tmp_path / f"train-{shard:05}-of-00004.parquet")
        opened = open_hub(str(tmp_path), labelled=True)
        assert opened.labels == [str(number) for number in range(12)]
        cut = ClipCutter(Sampling(2, 1), lambda clip, generator: clip)
        stream = TrainingStream(opened, cut, steps=6, batch=2)
        assert sorted(flat(labels(stream, 2))) == list(range(12))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class TestShards:
    def test_paths_globs_and_brace_ranges(self, shards):
        files = [str(shards / f"train-{shard:03}.tar") for shard in range(SHARDS)]
        assert shards_of(str(shards))["train"] == files
        assert shards_of(str(shards / "train-{000..003}.tar"))["train"] == files
        assert shards_of(str(shards / "train-00{1,3}.tar"))["train"] == files[1::2]
        assert [Path(name.removeprefix("file://")) for name in shards_of(str(shards / "train-*.tar"))["train"]] == [
            Path(file) for file in files
        ]
        assert shards_of(files[0])["train"] == files[:1]
        assert shards_of("https://host/{00..01}.tar")["train"] == ["https://host/00.tar", "https://host/01.tar"]
        assert all(map(is_shards, (str(shards), files[0], str(shards / "train-{000..003}.tar"))))
        assert not is_shards(str(shards.parent))

    def test_missing_ones_are_an_error(self, shards):
        with pytest.raises(ValueError, match=r"no shard .*train-004\.tar"):
            shards_of(str(shards / "train-{000..004}.tar"))
        with pytest.raises(ValueError, match="no shards match"):
            shards_of(str(shards / "valid-*.tar"))

    def test_a_glob_streams(self, shards):
        assert sorted(flat(labels(stream_of(shards / "train-*.tar")))) == list(range(12))

    def test_held_out_shards_are_read_by_number(self, shards):
        found = find_held_out(str(shards), [str(number) for number in range(12)])
        assert [row.label for row in found.test] == [3, 0]
        assert found.val == []
        with pytest.raises(ValueError, match="a label in test that is not among 0, 1: 3"):
            find_held_out(str(shards), ["0", "1"])


class TestLabelsOfSamples:
    @pytest.mark.parametrize("label", [-1, 12, None])
    def test_one_that_the_model_does_not_have_is_named(self, shards, label):
        stream = stream_of(shards, num_labels=12)
        rows = [{"mp4": {"path": "x", "bytes": b""}, "cls": label, "__key__": "clip007"}]
        stream.samples = mock.MagicMock(__iter__=lambda _: iter(rows))
        with pytest.raises(ValueError, match=f"the label of clip007 must be from 0 to 11, got {label}"):
            next(iter(stream))

    def test_all_that_it_has_pass(self, shards):
        assert sorted(flat(labels(stream_of(shards, num_labels=12)))) == list(range(12))
        with pytest.raises(ValueError, match=r"the label of clip011 must be from 0 to 10, got 11"):
            labels(stream_of(shards, num_labels=11))


class TestTooManyBad:
    @pytest.mark.parametrize(("steps", "length", "fails"), [(5, None, True), (6, None, False), (7, 12, True)])
    def test_of_the_samples_drawn_in_all_epochs(self, shards, steps, length, fails):
        """Three of 4 · steps, of which an epoch has 12; at most an eighth may be bad."""
        stream = stream_of(shards)
        stream.stream = dataclasses.replace(stream.stream, length=length)
        trainer = SimpleNamespace(
            bad=dict.fromkeys("abc", "broken"), train_dataset=stream, max_bad_fraction=1 / 8,
            state=SimpleNamespace(global_step=steps), args=SimpleNamespace(world_size=1, gradient_accumulation_steps=2),
        )  # fmt: skip
        stated = f"3 of {length or 4 * steps} videos"
        with pytest.raises(TooManyBadVideos, match=stated) if fails else contextlib.nullcontext():
            VideoTrainer.check_bad_videos(trainer, videos=12)


@pytest.mark.parametrize(("ignored", "skipped"), [(False, 2), (True, 0)])
def test_what_an_epoch_had_before_is_given_again_where_that_is_asked_for(shards, ignored, skipped):
    """Trainer passes over no batches then: empty ones would reach the model."""
    stream = stream_of(shards)
    loader = DataLoader(stream, batch_size=2, collate_fn=collate)
    args = SimpleNamespace(ignore_data_skip=ignored, gradient_accumulation_steps=1)
    state = SimpleNamespace(epoch=1 + 2 / 6, global_step=8)
    _Beginnings().on_epoch_begin(args, state, None, train_dataloader=loader)
    assert sum(not batch for batch in loader) == skipped
