"""benchmarks/gflops.py: its arithmetic, its settings, and that it covers the paper's tables."""

from __future__ import annotations

import json

import gflops
import pytest
import torch
from transformers.models.videomae import modeling_videomae


@pytest.fixture(autouse=True)
def _tables_come_back(monkeypatch):
    """The script replaces transformers' slow filling of position tables."""
    monkeypatch.setattr(modeling_videomae, "get_sinusoid_encoding_table", lambda n, width: torch.zeros(1, n, width))


def test_covers_every_figure_of_the_tables():
    by_table: dict[str, int] = {}
    for figure in gflops.figures():
        by_table[figure.table] = by_table.get(figure.table, 0) + 1
    # Table 1: 3 backbones × 2 methods × 2 phases; 5: two figures, repeated for three methods; 10: 6 + 5; 11: 3 × 2;
    # 12: 3 × 2; 15: 3 × 2.
    assert by_table == {"1": 12, "5": 2, "10": 11, "11": 6, "12": 6, "15": 6}


def test_a_run_writes_figures_within_one_percent(tmp_path, capsys):
    out = tmp_path / "gflops.json"
    gflops.main(["--tables", "15", "--out", str(out)])
    rows = json.loads(out.read_text())["figures"]
    assert [row["paper"] for row in rows] == [19.8, 98.1, 34.6, 112.9, 38.3, 116.6]
    for row in rows:
        assert row["difference_percent"] == pytest.approx(100 * (row["gflops"] - row["paper"]) / row["paper"])
        assert abs(row["difference_percent"]) < 1
        assert row["gflops"] == pytest.approx(row["flop_counter_mode"], rel=0.005)
    printed = capsys.readouterr().out
    assert f"{rows[2]['gflops']:.2f}" in printed
    assert "6 figures" in printed


@pytest.mark.parametrize(
    ("layers", "later"),
    [
        (1, []),
        (2, [1568 * 768 * 768 * 16]),
        (3, [8 * 28 * 28 * 768 * 768 * 4, 1568 * 768 * 768 * 4]),
    ],
)
def test_stacked_embeddings_by_hand(layers, later):
    """Multiply–accumulates of each layer's output places × its kernel, for 16 × 224² and width 768."""
    first = 8 * 56 * 56 * 768 * (3 * 2 * 4 * 4) if later else 1568 * 768 * (3 * 2 * 16 * 16)
    figure = next(figure for figure in gflops.figures() if figure.table == "15" and figure.layers == layers)
    assert gflops.et.count_flops(gflops.build(figure)).patch_embedding == first + sum(later)


def test_unknown_tables_are_refused(capsys):
    with pytest.raises(SystemExit):
        gflops.main(["--tables", "99"])
    assert "known are 1, 5, 10, 11, 12, 15" in capsys.readouterr().err
