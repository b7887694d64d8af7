"""benchmarks/shard_loading.py: files and shards have the same content, and its figures by hand."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from everest_tokens.demo import sample_video

pytest.importorskip("datasets", reason="the data extra is not installed")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "shard_loading.py"
    spec = importlib.util.spec_from_file_location("shard_loading", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_and_shards_have_the_same_content(benchmark, tmp_path):
    entries = benchmark.make(tmp_path, sample_video())
    assert len(entries) == 100
    shards = sorted((tmp_path / "shards").iterdir())
    assert len(shards) == 50
    with tarfile.open(shards[-1]) as tar:
        assert tar.getnames() == ["0098.mp4", "0098.cls", "0099.mp4", "0099.cls"]
        assert tar.extractfile("0099.mp4").read() == entries[99].path.read_bytes() == sample_video().read_bytes()


def test_what_is_timed(benchmark, monkeypatch):
    """One clip a round: two rounds are timed, of which shards take twice as long as files."""
    monkeypatch.setattr(benchmark, "CLIPS", 1)
    monkeypatch.setattr(benchmark, "SHARDS", 2)
    ticks = iter([0, 9, 20, 21, 30, 32, 40, 41, 50, 52])  # the first two are the warm-up's
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(ticks))
    made = benchmark.measure(sample_video(), 2, lambda: None)
    assert made["seconds"] == {"files": [1, 1], "shards": [2, 2]}
    assert made["clips_per_cpu_second"] == {"files": 1, "shards": 0.5}
    assert made["ratio"] == 0.5
