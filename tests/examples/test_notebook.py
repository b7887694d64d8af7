"""The notebook runs in a clone and shows what it says; the repository holds it without outputs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_output

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "everest_tokens.ipynb"
# What the text says of the figures that come before it.
CLAIMS = """
assert selections["keep ratio 0.3"].frame_counts.sum() == 470
assert round(et.count_flops(et.patch_videomae(vit, et.ReRoSelector(1.0))).total / whole_flops, 2) == 1
assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
few, all_of_them = shares.index(0.2), shares.index(1.0)
assert found["ReRoSelector"][few] > found["RandomSelector"][few] + 0.15
assert found["ReRoSelector"][few] > 0.6
assert found["ReRoSelector"][all_of_them] == found["RandomSelector"][all_of_them] > 0.5
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_in(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count") is not None]


def test_it_holds_no_outputs(notebook):
    assert outputs_in(notebook) == []
    with_one = copy.deepcopy(notebook)
    with_one.cells[1].outputs = [new_output("stream", text="a")]
    assert outputs_in(with_one) == with_one.cells[1:2]


def test_it_runs_and_keeps_its_word(notebook, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run = copy.deepcopy(notebook)
    run.cells.append(new_code_cell(CLAIMS))
    NotebookClient(run, timeout=400, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [output for cell in run.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    assert [output for output in shown if output.get("name") == "stderr"] == []
