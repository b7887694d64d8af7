"""What camera="compensate" brings under a moving camera, and what it costs, in RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import figures
from pages import Page, documents, on_gpu, rows_of
from step_rows import circumstances, model_of
from table_text import Row, grouped, percent, table
from targets import CAMERA_TARGETS, camera_target

INTRODUCTION = """## A moving camera

`ReRoSelector(camera="compensate")` compares a token with what the camera saw at its place before. Real clips whose \
camera rests are seen through a window that moves along a known path, so that what changes by itself is known: the \
frames a tubelet earlier, seen through the later frames' windows. Agreement is the share of the tokens that this truth \
keeps which are kept too when the camera is ignored, when its estimated motion is undone, and when the known one is, \
the most that an estimate could reach. A token is its pixels, a distance L2; no model is in it.
"""
MADE = """The task below at 128 pixels a frame, its discs as much larger, the photograph moving behind them: the \
share of the moving disc's tokens (those that it fills by half or more, {tokens:.1%} of all) that are kept; {clips} \
clips. The other disc rests in the frame, and so moves against the photograph: where the camera is compensated it \
takes places too, rightly. The photograph wraps at its edges, and moves by whole pixels.
"""
COST = """What compensating adds to the patched model's embedding of the clips, and to a step of fine-tuning that it \
is a part of: medians over turns of both embeddings and the step, quartiles in brackets. It takes the same time on any \
clip. Operators are those of the embedding that write memory; on a GPU kernels.
"""


def camera(page: Page, folder: Path) -> None:
    found = documents(folder, "camera_motion")
    if not found:
        return
    page.add([*INTRODUCTION.splitlines(), ""])
    parts = grouped(rows_of(found), lambda row: row["part"])
    if real := parts.get("real"):
        page.draw("camera-motion", figures.camera(real), "Agreement with what moves by itself, by the camera's path")
        page.add(by_path(real))
        page.add(by_clip(real))
    if made := parts.get("made"):
        page.add([*MADE.format(tokens=made[0]["disc_tokens"], clips=made[0]["clips"]).splitlines(), ""])
        page.add(discs(made))
    if costs := parts.get("cost"):
        page.add([*COST.splitlines(), ""])
        titles = ["", "ignored, ms", "compensated, ms", "added, ms", "share of the step", "operators", "kernels"]
        page.add(table([*titles, "target"], map(cost_cells, costs)))
        if not any(camera_target(row, True) for row in costs if on_gpu(row)):
            page.add([f"Not measured yet on a GPU: ≤ {CAMERA_TARGETS['cuda']:g} ms with 32 clips in bfloat16.", ""])
    page.cite(found)


def by_path(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each path: means over the clips, for what is compensated the least and the largest too."""
    ratios = list(dict.fromkeys(row["keep_ratio"] for row in rows))
    titles = [f"{ratio:.0%}: {how}" for ratio in ratios for how in ("ignored", "compensated", "known path")]
    lines = []
    for way, mine in grouped(rows, lambda row: row["way"]).items():
        cells = [way]
        for ratio in ratios:
            its = [row for row in mine if row["keep_ratio"] == ratio]
            ignored, compensated, exact = ([row[how] for row in its] for how in ("ignore", "compensate", "exact"))
            cells += [f"{fmean(ignored):.1%}", percent(compensated), f"{fmean(exact):.1%}"]
        lines.append([*cells, f"{fmean(row['pixels_off'] for row in mine):.2f}", f"{most_off(mine):.1f}"])
    yield from table(["the camera's path, a frame", *titles, "corners off, px", "at most, px"], lines)


def most_off(rows: Sequence[Row]) -> float:
    return max(row["most_pixels_off"] for row in rows)


def by_clip(rows: Sequence[Row]) -> Iterator[str]:
    """The same rows by clip, over all paths on which the camera moves, and how often rest was found at rest."""
    lines = []
    for (video, start), mine in grouped(rows, lambda row: (row["video"], row["start"])).items():
        moving = [row for row in mine if row["way"] != "at rest"]
        resting = next(row for row in mine if row["way"] == "at rest")
        cells = [f"{video}, from frame {start}"]
        for its in grouped(moving, lambda row: row["keep_ratio"]).values():
            cells += [f"{fmean(row[how] for row in its):.1%}" for how in ("ignore", "compensate", "exact")]
        cells += [f"{fmean(row['pixels_off'] for row in moving):.2f}", f"{most_off(moving):.1f}"]
        lines.append([*cells, f"{resting['found_at_rest']:.0%}"])
    ratios = dict.fromkeys(row["keep_ratio"] for row in rows)
    titles = [f"{ratio:.0%}: {how}" for ratio in ratios for how in ("ignored", "compensated", "known path")]
    head = ["clip, over all moving paths", *titles, "corners off, px", "at most, px", "rest found at rest"]
    yield from table(head, lines)


def discs(rows: Sequence[Row]) -> Iterator[str]:
    ratios = list(dict.fromkeys(row["keep_ratio"] for row in rows))
    titles = [f"{ratio:.0%}: {how}" for ratio in ratios for how in ("ignored", "compensated")]
    lines = [
        [f"{speed:g}", *(f"{row[how]:.1%}" for row in mine for how in ("ignore", "compensate"))]
        for speed, mine in grouped(rows, lambda row: row["camera"]).items()
    ]
    yield from table(["camera, pixels a frame", *titles], lines)


def cost_cells(row: Row) -> list[str]:
    target = camera_target(row, on_gpu(row))
    low, high = row["share_quartiles"]
    counts = [
        "–" if row[f"ignore_{what}"] is None else f"{row[f'ignore_{what}']} → {row[f'compensate_{what}']}"
        for what in ("operators", "kernels")
    ]
    return [
        f"{model_of(row)}, {circumstances(row)}",
        *(f"{1e3 * row[f'{name}_seconds']:.1f}" for name in ("ignore", "compensate", "added")),
        f"{row['share']:.2%} ({low:.2%}–{high:.2%})",
        *counts,
        "" if target is None else str(target),
    ]
