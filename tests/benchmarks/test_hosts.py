"""benchmarks/hosts.py: the same weights and clips on both sides, and its arithmetic."""

from __future__ import annotations

import json
import statistics

import hosts
import pytest
import torch
import transformers

import everest_tokens as et

NAMES = ["VideoMAE", "Vivit", "Timesformer", *(["VJEPA2"] if hasattr(transformers, "VJEPA2Model") else [])]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    widths = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 5}
    monkeypatch.setattr(hosts, "SHARED", widths)


def test_a_run(tmp_path, capsys):
    out = tmp_path / "out.json"
    size = ["--image-size", "32", "--layers", "1", "--frames", "8"]
    hosts.main([*size, "--repeats", "3", "--keep-ratio", "0.5", "--out", str(out), "--hosts", *NAMES])
    document = json.loads(out.read_text())
    assert document["command"].startswith("python benchmarks/hosts.py --image-size 32")
    assert (document["layers"], document["repeats"], document["keep_ratio"]) == (1, 3, 0.5)
    assert [run["model"] for run in document["runs"]] == [f"{name}ForVideoClassification" for name in NAMES]
    for run in document["runs"]:
        assert run["tokens"] == 8  # of 4 × 2 × 2
        assert 0.5 < run["flops_ratio"] < 1  # of these widths the embedding is much
        for kind in ("training", "inference"):
            seconds = run[kind]["seconds"]
            ratios = [a / b for a, b in zip(seconds["patched"], seconds["unpatched"], strict=True)]
            assert run[kind]["ratio"] == statistics.median(ratios)
            assert run[kind]["quartiles"] == [min(ratios), max(ratios)]
            assert len(ratios) == 3
    assert "VivitForVideoClassification: {'training'" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_what_is_timed_trains_and_infers(name):
    model = et.patch_videomae(hosts.build(name, layers=1, image_size=32, frames=8), et.ReRoSelector(0.5))
    clips = torch.randn(1, 4 if name == "Timesformer" else 8, 3, 32, 32)
    train, infer = hosts.steps_of(model, clips)
    before = model.classifier.weight.clone()
    infer()
    assert torch.equal(model.classifier.weight, before)
    train()
    assert not torch.equal(model.classifier.weight, before)
    assert model.classifier.weight.grad is None
