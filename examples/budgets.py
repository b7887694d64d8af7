"""What a model gives and costs at several keep ratios, so that its user chooses: a table, and a picture of it.

keep_ratios.csv   a row for each selector and keep ratio: tokens, GFLOPs and speed of a clip's forward, accuracies in %
keep_ratios.png   top-1 against GFLOPs and against clips a second, a line for each selector

Clips a second are those of the model's forward alone, the median of five or more with all ways in turn, so that a
machine's slow moments fall on all of them alike.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import everest_tokens as et
from everest_tokens.comparing import seconds_of
from everest_tokens.selectors import TokenSelector

Way = tuple[str, float]  # selector's name, keep ratio

_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))  # Okabe and Ito's, as in benchmarks/


def name_of(selector: TokenSelector) -> str:
    """Its class, with the settings that aren't the class's own: ReRoSelector(distance='l1')."""
    usual = type(selector)(selector.keep_ratio).settings
    changed = [f"{key}={value!r}" for key, value in selector.settings.items() if value != usual.get(key)]
    return type(selector).__name__ + (f"({', '.join(changed)})" if changed else "")


def costs(model: Any, ways: Mapping[Way, TokenSelector], batch: int, repeats: int = 5) -> dict[Way, dict[str, Any]]:
    """Count and measure a model's forward.

    Args:
        model: patched, without wrappers.
        batch: random clips in a forward.
        repeats: timed runs of each way, after two that warm up; more where all together take less than three seconds.

    Returns:
        way → tokens, gflops, clips_per_second, device. The model keeps the selector that it had.
    """
    policy, device = model.everest, next(model.parameters()).device
    own, (shape, grid, _) = policy.selector, policy.host.example(model)
    clips = torch.randn(batch, *shape[1:], device=device)
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    found = {}
    try:
        turns = 0
        while turns < 2 + repeats or sum(map(sum, seconds.values())) < 3.0:
            turns += 1
            for way, selector in ways.items():
                policy.selector = selector
                with torch.inference_mode():
                    seconds[way].append(seconds_of(lambda: model(pixel_values=clips), device))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for way, selector in ways.items():
            policy.selector = selector
            found[way] = {
                "tokens": selector.num_kept(grid),
                "gflops": round(et.count_flops(model).total / 1e9, 4),
                "clips_per_second": float(f"{batch / statistics.median(seconds[way][2:]):.4g}"),
                "device": name,
            }
    finally:
        policy.selector = own
    return found


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """keep_ratios.csv and keep_ratios.png of rows with selector, keep_ratio, what `costs` found, and top1."""
    with open(folder / "keep_ratios.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(folder / "keep_ratios.png", dpi=130)


def draw(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib Figure of two panels; the first line has its keep ratios beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, cost in zip(panels, ("gflops", "clips_per_second"), strict=True):
        for number, name in enumerate(dict.fromkeys(row["selector"] for row in rows)):
            colour, marker = _STYLES[number % len(_STYLES)]
            line = sorted((row for row in rows if row["selector"] == name), key=lambda row: row["keep_ratio"])
            xs, ys = [row[cost] for row in line], [row["top1"] for row in line]
            axis.plot(xs, ys, color=colour, marker=marker, label=name)
            for x, y, row in zip(xs, ys, line, strict=True) if number == 0 else ():
                axis.annotate(f"{row['keep_ratio']:g}", (x, y), (3, 4), textcoords="offset points", fontsize=8)
        axis.grid(color="0.9")
    panels[0].set(xlabel="GFLOPs of a clip (multiply–accumulates)", ylabel=f"top-1 of {rows[0]['videos']} videos, %")
    panels[1].set(xlabel=f"clips a second, {rows[0]['device']}")
    panels[0].legend(fontsize=8)
    return figure
