"""benchmarks/selection_cost.py: what it times is what the library runs, and its arithmetic."""

from __future__ import annotations

import json
import statistics

import cases
import pytest
import selection_cost
import step_cost
import targets
import torch
from launches import operators

import everest_tokens as et
from everest_tokens.distances import DISTANCES
from everest_tokens.policy import SelectionPolicy
from everest_tokens.tubelets import gather_tokens

GRID = ["--sizes", "T", "--frames", "8", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(cases.SIZES, "T", (32, 2, 2, 24, 2))


def run(out, *arguments: str) -> dict:
    selection_cost.main([*GRID, "--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_a_run_of_all_phases(tmp_path, capsys):
    document = run(tmp_path / "out.json", "--repeats", "5", "--step-repeats", "2", "--batch-sizes", "1", "3")
    assert document["command"].startswith("python benchmarks/selection_cost.py --sizes T")
    assert (document["repeats"], document["step_repeats"]) == (5, 2)
    rows = document["runs"]
    assert [(row["phase"], row["batch_size"], row["distance"]) for row in rows] == [
        (phase, batch, distance)
        for phase in ("fine-tuning", "pre-training", "inference")
        for batch in (1, 3)
        for distance in ("l2", "l1", "cosine", "cka")
    ]
    for row in rows:
        assert len(row["seconds"]) == 5
        assert row["select_seconds"] == statistics.median(row["seconds"])
        assert row["share"] == (row["select_seconds"] + row["gather_seconds"]) / row["step_seconds"]
        assert min(row[f"{part}_seconds"] for part in selection_cost.PARTS) > 0
        assert (row["size"], row["frames"], row["dtype"], row["mode"]) == ("T", 8, "float32", "eager")
        assert row["embedding_kernels"] is None  # of a GPU
        assert row["embedding_operators"] > 5
    assert len({row["step_seconds"] for row in rows}) == len({row["embedding_seconds"] for row in rows}) == 6  # a case
    printed = capsys.readouterr().out
    assert f"{100 * rows[0]['share']:.3f}%" in printed
    assert f"{1e3 * rows[-1]['select_seconds']:.3f}" in printed
    assert f"{1e3 * rows[-1]['embedding_seconds']:.3f} ms, {rows[-1]['embedding_operators']} operators" in printed


def test_operators_are_those_that_compute():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6)

    def views_and_three_more() -> torch.Tensor:
        rows = x.T.reshape(3, 8).unsqueeze(0)[0, 1:].view(-1)  # one copy, and views
        return rows.detach().sin_()[:6] @ weight  # sin_ and a product of vector and matrix

    assert operators(views_and_three_more) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operators(lambda: x @ weight) == 3  # two casts and a product
    assert operators(lambda: torch.nn.functional.linear(x, weight)) == 1


@pytest.mark.parametrize("phase", ["fine-tuning", "pre-training", "inference"])
def test_the_embedding_is_the_models_own_in_the_phases_mode(phase):
    case = step_cost.Case("T", phase, 8, 64, 0.5, 2, "bfloat16", "eager")
    model, inputs = step_cost.Shared(case, torch.device("cpu")).model_for("rero")
    seen = []
    model.videomae.embeddings.register_forward_hook(lambda module, given, out: seen.append(out))
    selection_cost.embedding_of(model, inputs["pixel_values"], case)()
    (tokens,) = seen
    assert tokens.shape == (2, 6 if phase == "pre-training" else 32, 32)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.is_inference(), tokens.requires_grad) == (phase == "inference", phase != "inference")


def test_the_embeddings_target_is_judged_where_it_is_set():
    row = {"size": "B", "phase": "inference", "batch_size": 32, "dtype": "bfloat16", "distance": "l2", "frames": 16}
    row |= {"embedding_seconds": 0.0012}
    assert list(map(str, targets.embedding_targets(row, gpu=True))) == ["embedding ≤ 1.00 ms: MISSED"]
    assert targets.embedding_targets(row, gpu=False) == []
    others = [{"size": "L"}, {"phase": "fine-tuning"}, {"batch_size": 16}, {"distance": "l1"}, {"frames": 64}]
    for other in (*others, {"embedding_seconds": None}):
        assert targets.embedding_targets(row | other, gpu=True) == []


@pytest.mark.parametrize("mode", ["eager", "compile"])
@pytest.mark.parametrize(("task", "phase"), [("encoder", "fine-tuning"), ("pretraining", "pre-training")])
def test_the_parts_are_the_librarys_own(monkeypatch, task, phase, mode):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compile_(function, backend="eager", **kw))
    case = step_cost.Case("T", phase, 8, 64, 0.5, 2, "float32", mode)
    tokens = torch.randn(2, 64, 32)
    policy = SelectionPolicy(task, et.ReRoSelector(0.5), 0.9, None, None)
    for distance in DISTANCES:
        parts = selection_cost.parts_of(policy, distance, tokens, case)
        selector = et.ReRoSelector(0.5, distance)
        kept = selector(tokens, (4, 4, 4))
        assert torch.equal(parts["importance"](), selector.importance(tokens, (4, 4, 4)))
        assert torch.equal(parts["top_k"](), kept)
        assert torch.equal(parts["gather"](), gather_tokens(tokens, kept))
        selected = parts["select"]()
        assert torch.equal(torch.cat(selected, dim=1).sort(dim=1).values, kept)
        assert [part.shape[1] for part in selected] == ([6, 26] if task == "pretraining" else [32])
    torch.compiler.reset()
