"""What goes beyond the paper on the motion task, in RESULTS.md: what never moves, one checkpoint, budgets, cameras."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import figures
import numpy as np
from motion_clips import DIRECTIONS
from motion_runs import ALL, BUDGETS, DRAWN, DRAWN_RATIOS, LARGE, MIXTURE, STILL
from pages import Page
from step_rows import NAMES
from table_text import Row, grouped, number, percent, table

LABELS = (("accuracy", "motion"), ("colour_accuracy", "colour"))


def beyond(page: Page, rows: Sequence[Row], caption: str, suffix: str) -> None:
    """The sections of which there are runs, of completed records."""
    coloured = [row for row in rows if row["task"]["colours"]]
    appearance(page, coloured, caption, suffix)
    page.add(one_checkpoint(coloured))
    budgets(page, matching(rows, task=asdict(MIXTURE)), caption, suffix)
    page.add(camera(rows))


def scores(rows: Sequence[Row]) -> list[str]:
    """Of both labels, over the seeds."""
    return [percent([row[key] for row in rows]) for key, _ in LABELS]


def matching(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def appearance(page: Page, rows: Sequence[Row], caption: str, suffix: str) -> None:
    """Motion and colour by selector and keep ratio: trained with the selector, and on a model that saw all tokens."""
    shown = [row for row in rows if row["trained"] != DRAWN and row["method"] in (ALL, *STILL)]
    ways = {
        trained: [row for row in shown if row["trained"] == trained and row["method"] != ALL] for trained in (None, ALL)
    }
    if not any(ways.values()):
        return
    whole, colours = matching(shown, method=ALL), shown[0]["task"]["colours"]
    page.add(
        [
            "### What never moves: the colour of a disc at rest",
            "",
            f"The resting disc has one of {colours} tints, a second label that every frame shows and no change does; "
            f"one model answers both. Chance is {1 / DIRECTIONS:.1%} for the motion and "
            f"{1 / colours:.1%} for the colour. *Trained with it*: the selector in training and test. *At test alone*: "
            "one model, trained on all tokens, to which the selector is given afterwards.",
            "",
        ]
    )
    for trained, name, how in ((None, "", "trained with each selector"), (ALL, "-at-test", "selectors at test alone")):
        if ways[trained]:
            groups = grouped(ways[trained], lambda row: row["method"])
            chances = (1 / DIRECTIONS, 1 / colours)
            figure = figures.appearance(groups, whole, chances, f"motion task with colours, {how}; {caption}")
            page.draw(f"motion-appearance{name}{suffix}", figure, f"Motion and colour accuracy, {how}")
    both = [row for mine in ways.values() for row in mine]
    lines = [[NAMES[ALL], "–", f"{whole[0]['kept']}/{whole[0]['tokens']}", *scores(whole), "–", "–"]] if whole else []
    order = sorted(both, key=lambda row: (STILL.index(row["method"]), row["keep_ratio"]))
    for (method, ratio), mine in grouped(order, lambda row: (row["method"], row["keep_ratio"])).items():
        cells = [NAMES[method], number(ratio, ".2f"), f"{mine[0]['kept']}/{mine[0]['tokens']}"]
        lines.append([*cells, *scores(matching(mine, trained=None)), *scores(matching(mine, trained=ALL))])
    titles = [f"{label}, {how}" for how in ("trained with it", "at test alone") for _, label in LABELS]
    page.add(table(["tokens", "ρ", "kept", *titles], lines))


def one_checkpoint(rows: Sequence[Row]) -> Iterator[str]:
    """One model for every ratio against a model each."""
    drawn = matching(rows, trained=DRAWN)
    if not drawn:
        return
    yield "### One checkpoint for every keep ratio"
    yield ""
    yield (
        f"One model, whose keep ratio was drawn from {', '.join(f'{ratio:g}' for ratio in DRAWN_RATIOS)} in each step "
        "of its training, tested at each of them, beside models trained at that one ratio for as many steps (at 1, on "
        "all tokens)."
    )
    yield ""
    order = sorted(drawn, key=lambda row: (STILL.index(row["method"]), row["keep_ratio"]))
    lines = []
    for (method, ratio), mine in grouped(order, lambda row: (row["method"], row["keep_ratio"])).items():
        alone = {"method": ALL} if ratio == 1 else {"method": method, "keep_ratio": ratio}
        cells = [NAMES[method], f"{ratio:.2f}", f"{mine[0]['kept']}/{mine[0]['tokens']}"]
        lines.append([*cells, *scores(mine), *scores(matching(rows, trained=None, **alone))])
    titles = [f"{label}, {how}" for how in ("one model", "a model a ratio") for _, label in LABELS]
    yield from table(["tokens", "ρ", "kept", *titles], lines)


def budgets(page: Page, rows: Sequence[Row], caption: str, suffix: str) -> None:
    """As many tokens as each clip needs, or the same share of each: accuracy against their mean."""
    if not rows:
        return
    order = sorted(rows, key=lambda row: (list(BUDGETS).index(row["method"]), row["keep_ratio"]))
    lines, lines_of = [], {}
    for (method, setting), mine in grouped(order, lambda row: (row["method"], row["keep_ratio"])).items():
        kept = sum(row["kept"] for row in mine) / len(mine)
        accuracy = [row["accuracy"] for row in mine]
        lines_of.setdefault(method, []).append((kept, accuracy))
        lines.append([NAMES[method], f"{setting:g}", f"{kept:.1f}/{mine[0]['tokens']}", percent(accuracy)])
    page.add(
        [
            "### As many tokens as each clip needs",
            "",
            f"Of {MIXTURE.resting:.0%} of the clips the camera rests, of the others it moves by {MIXTURE.camera:g} "
            "pixels a frame, so that little changes in some and everything in others. The setting is the keep ratio of "
            "ReRo, the share that an `EnergyBudget` covers, the threshold of a `RunLengthSelector`; kept is the mean "
            "over test clips and models.",
            "",
        ]
    )
    panel = {f"tokens kept of {rows[0]['tokens']}, mean of the test clips": lines_of}
    figure = figures.failures(panel, 1 / DIRECTIONS, f"motion task, camera of half the clips moving; {caption}")
    page.draw(f"motion-budgets{suffix}", figure, "Accuracy against the mean number of tokens")
    page.add(table(["tokens", "setting", "kept", "accuracy"], lines))
    means = {name: sorted((kept, sum(each) / len(each)) for kept, each in its) for name, its in lines_of.items()}
    tokens, accuracy = zip(*means.pop("rero"), strict=True)
    over = {name: [100 * (own - np.interp(kept, tokens, accuracy)) for kept, own in its] for name, its in means.items()}
    beside = "; ".join(f"{NAMES[name]} {min(its):+.1f} to {max(its):+.1f} points" for name, its in over.items())
    page.add([f"Beside ReRo's line at as many tokens on average: {beside}.", ""])


def camera(rows: Sequence[Row]) -> Iterator[str]:
    """ReRo as it is and with the camera's motion taken out, on frames that are large enough for it."""
    large = [row for row in rows if row["task"] == asdict(LARGE) | {"camera": row["task"]["camera"]}]
    by_pan = grouped(sorted(large, key=_pan), _pan)
    if not by_pan:
        return
    first = large[0]
    yield f"### A moving camera, frames of {LARGE.size} pixels"
    yield ""
    models = len({row["seed"] for row in large})
    yield (
        f"{first['steps']} steps of training, {models} model{'s' * (models > 1)} of a kind; {first['kept']} of "
        f"{first['tokens']} tokens are kept. *Compensated*: a token is scored against what its place showed one step "
        'earlier as the camera saw it then (`camera="compensate"`).'
    )
    yield ""
    methods = ("rero", "rero compensated")
    lines = [
        [f"{pan:g}", *(percent([row["accuracy"] for row in matching(mine, method=method)]) for method in methods)]
        for pan, mine in by_pan.items()
    ]
    yield from table(["camera, pixels a frame", *(NAMES[method] for method in methods)], lines)


def _pan(row: Row) -> float:
    return row["task"]["camera"]
