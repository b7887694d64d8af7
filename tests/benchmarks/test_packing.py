"""benchmarks/packing.py: equally many tokens on both sides, and its arithmetic."""

from __future__ import annotations

import json
import statistics

import hosts
import packing
import pytest
import torch


def test_equally_many_tokens_are_compared():
    chosen = packing.selections(6, (8, 14, 14), "cpu")
    uniform, packed = chosen["uniform"].visible, chosen["packed"]
    assert int(packed.lengths.sum()) == uniform.numel()
    assert (int(packed.lengths[0]), int(packed.lengths[-1])) == (110, pytest.approx(1004, abs=6))
    for row, length in zip(packed.visible, packed.lengths.tolist(), strict=True):
        assert len(set(row[:length].tolist())) == length
        assert (row[length:] == 1568).all()


def test_a_run(tmp_path, monkeypatch, capsys):
    widths = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 5}
    monkeypatch.setattr(hosts, "SHARED", widths)
    out = tmp_path / "out.json"
    for host in ("VideoMAE", "Vivit"):
        size = ["--image-size", "64", "--layers", "1", "--frames", "8", "--batch-size", "3", "--device", "cpu"]
        packing.main([*size, "--host", host, "--repeats", "3", "--out", str(out)])
        (run,) = json.loads(out.read_text())["runs"]
        assert run["model"] == f"{host}ForVideoClassification"
        assert 1 < run["flops_ratio"] < 1.5
        assert 0.9 < run["bytes_ratio"] < 1.3
        for kind in ("training", "inference"):
            seconds = run[kind]["seconds"]
            assert run[kind]["ratio"] == statistics.median(
                a / b for a, b in zip(seconds["packed"], seconds["uniform"], strict=True)
            )
        assert "packed / uniform" in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32
