"""Figures that README and docs/ repeat are those of benchmarks/results."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import report
from documents import RESULTS
from motion_clips import Task
from motion_runs import ALL, DRAWN, DRAWN_RATIOS, LARGE, MIXTURE, PANS
from pages import documents, on_gpu, rows_of
from report_beyond import matching
from report_motion import completed
from report_steps import newest
from step_rows import mark_cases
from table_text import grouped

ROOT = Path(report.__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHOOSING, HOSTS = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("choosing", "hosts"))
README_ROW = re.compile(
    r"\| ViT-(?P<size>\w), (?P<phase>[a-z-]+), keep ratio (?P<ratio>[\d.]+), (?P<clips>\d+) clips"
    r"(?P<where>, compiled|, CPU)? \|(?P<cells>.*→.*)\|"
)
SELECTORS = {"ReRo": "rero", "ReRo, first step whole": "rero first", "random": "random"}


def section_of(text: str, title: str) -> str:
    return text.split(f"{title}\n")[1].split("\n#")[0]


def cells_of(text: str, *first: str) -> list[str]:
    """The other cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [row[len(first) :] for row in rows if row[: len(first)] == list(first)]
    return found


def test_costs_and_the_headline_is_the_worst_of_the_sizes_that_it_names():
    found: dict = {}
    rows = newest(mark_cases(rows_of(documents(RESULTS, "step_cost"))))
    for row in [row for row in rows if row["method"] == "rero" and row["usual"] and row["frames"] == 16]:
        whole = next(one for one in rows if one["case"] == row["case"] and one["baseline"])
        where = ", compiled" if row["mode"] == "compile" else None if on_gpu(row) else ", CPU"
        digits = 0 if on_gpu(row) else 2
        clips = " → ".join(f"{one['clips_per_second']:.{digits}f}" for one in (whole, row))
        memory = row["memory_ratio"] if on_gpu(row) else row["saved_ratio"]
        key = (row["size"], row["phase"], row["keep_ratio"], row["batch_size"], where)
        found[key] = [row["gflops_ratio"], row["step_ratio"], memory, clips]
    said = {}
    for row in README_ROW.finditer(README):
        key = (row["size"], row["phase"], float(row["ratio"]), int(row["clips"]), row["where"])
        said[key] = [cell.strip() for cell in row["cells"].split("|")]
    assert {(size, phase) for size, phase, *_ in said} == {
        (s, p) for s in "SBL" for p in ("fine-tuning", "pre-training")
    }
    assert said == {key: [*(f"{ratio:.3f}" for ratio in found[key][:3]), found[key][3]] for key in said}
    headline = re.search(
        r"a training step of ViT-B or\s+ViT-L takes at most (\d+) % of the time and (\d+) % of the memory", README
    )
    worst = [cells for (size, phase, *_, where), cells in found.items()
             if size in "BL" and phase != "inference" and where != ", CPU"]  # fmt: skip
    assert [int(group) for group in headline.groups()] == [
        math.ceil(100 * max(cells[index] for cells in worst)) for index in (1, 2)
    ]


def test_a_moving_camera():
    rows = [row for row in rows_of(documents(RESULTS, "camera_motion")) if not on_gpu(row)]
    moving = [row for row in rows if row["part"] == "real" and row["way"] != "at rest" and row["keep_ratio"] == 0.15]
    ignored, compensated, known = (
        f"{100 * fmean(row[how] for row in moving):.0f} %" for how in ("ignore", "compensate", "exact")
    )
    said = " ".join(section_of(CHOOSING, "## A moving camera").split())
    assert f"agrees with what moves by itself in {ignored} of the kept tokens (15 % of all)" in said
    assert f"in {compensated}, and with the known motion undone in {known}" in said
    (cost,) = [row for row in rows if row["part"] == "cost"]
    assert f"{100 * cost['share']:.1f} % of a fine-tuning step of ViT-{cost['size']} on a CPU" in said
    assert f"agree with what moves by itself in {compensated}, else {ignored}" in README


def motion_rows(task: Task) -> list[dict]:
    rows = [completed(row) for row in rows_of(documents(RESULTS, "motion_accuracy"))]
    return [row for row in rows if row["task"] == asdict(task)]


def test_accuracy_under_a_moving_camera():
    means = {}
    for pan in PANS:
        for method in ("rero", "rero compensated"):
            mine = matching(motion_rows(replace(LARGE, camera=pan)), method=method)
            assert len(mine) == 3
            means[pan, method] = f"{100 * fmean(row['accuracy'] for row in mine):.0f}"
    ignored, compensated = ([means[pan, method] for pan in PANS] for method in ("rero", "rero compensated"))
    said = " ".join(section_of(CHOOSING, "## A moving camera").split())
    pieces = (
        f"{ignored[0]} % at rest fall to {ignored[1]} % at 1.5 and {ignored[2]} % at 3 pixels a frame",
        f"compensated they are {compensated[0]}, {compensated[1]} and {compensated[2]} %",
    )
    assert "; ".join(pieces) in said
    piece = f"{ignored[2]} % at 3 pixels a frame become {compensated[2]} %, {ignored[0]} % at rest"
    assert piece in " ".join(README.split())


def test_budgets_for_each_clip():
    """Their accuracy beside ReRo's, read off its line at as many tokens."""
    rows = motion_rows(MIXTURE)
    lines: dict[str, list[tuple[float, float]]] = {}
    for (method, _), mine in grouped(rows, lambda row: (row["method"], row["keep_ratio"])).items():
        assert len({row["seed"] for row in mine}) == 3
        point = (fmean(row["kept"] for row in mine), fmean(row["accuracy"] for row in mine))
        lines.setdefault(method, []).append(point)
    kept, accuracy = zip(*sorted(lines["rero"]), strict=True)
    said = " ".join(section_of(CHOOSING, "## A budget for each clip").split())
    for method, name in (("energy", "`EnergyBudget`"), ("run length", "`RunLengthSelector`")):
        over = [100 * (own - np.interp(tokens, kept, accuracy)) for tokens, own in lines[method]]
        assert f"{name} {min(over):+.1f} to {max(over):+.1f} points" in said


def both(**wanted) -> str:
    """Motion and colour accuracy over three seeds, in %."""
    rows = [completed(row) for row in rows_of(documents(RESULTS, "motion_accuracy"))]
    mine = matching([row for row in rows if row["task"]["colours"]], **wanted)
    assert len(mine) == 3
    return " / ".join(f"{100 * fmean(row[key] for row in mine):.0f}" for key in ("accuracy", "colour_accuracy"))


def test_one_checkpoint():
    table = section_of(CHOOSING, "## One checkpoint for every budget")
    for ratio in DRAWN_RATIOS:
        expected = []
        for method in ("rero", "rero first"):
            alone = {"method": ALL} if ratio == 1 else {"method": method, "keep_ratio": ratio}
            expected += [both(method=method, keep_ratio=ratio, trained=DRAWN), both(**alone, trained=None)]
        assert cells_of(table, f"{ratio:g}") == expected


def test_what_to_set():
    table = section_of(CHOOSING, "## Start here")
    for name, method in SELECTORS.items():
        for ratio in (0.2, 0.3) if method == "random" else (0.2, 0.3, 0.6):
            wanted = {"method": method, "keep_ratio": ratio}
            expected = [both(**wanted, trained=None), both(**wanted, trained=ALL)]
            assert cells_of(table, name, f"{ratio:g}") == expected, (name, ratio)
    everything = f"all tokens {both(method=ALL)}"
    assert everything in README
    assert everything in table
    for selector, pieces in {
        "0.3": [both(method="rero", keep_ratio=0.3, trained=None),
                f"random tokens {both(method='random', keep_ratio=0.3, trained=None)}"],
        '0.3, anchor="first"': [both(method="rero first", keep_ratio=0.3, trained=None)],
        '0.6, anchor="first"': [both(method="rero first", keep_ratio=0.6, trained=None)],
    }.items():  # fmt: skip
        (line,) = [line for line in README.splitlines() if f"`et.ReRoSelector({selector})` |" in line]
        assert line.endswith(f"| {'; '.join(pieces)} |")


def test_other_encoders():
    (document,) = documents(RESULTS, "hosts")
    section = section_of(HOSTS, "### What they cost")
    for run in document["runs"]:
        ratios = [run["flops_ratio"], run["training"]["ratio"], run["inference"]["ratio"]]
        assert cells_of(section, f"`{run['model']}`") == [f"{ratios[0]:.3f}", f"{ratios[1]:.2f}", f"{ratios[2]:.2f}"]
    frames, size = document["frames"], document["image_size"]
    for piece in (
        f"at keep ratio {document['keep_ratio']:g} against",
        f"medians of {document['repeats']} pairs",
        f"{document['layers']} blocks, {frames} frames (TimeSformer {frames // 2}) of {size}²",
        f"{frames // 2 * (size // 16) ** 2:,} tokens",
        f"`{document['command']}`",
    ):
        assert piece in " ".join(section.split())
