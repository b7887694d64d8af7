"""Accuracy on the motion task, in RESULTS.md: Figure 5, Tables 9, 10, 12, 13, 16 and 17, and where it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
from motion_clips import DIRECTIONS, Task, share_with_motion
from motion_runs import completed
from pages import Page, documents, rows_of
from report_beyond import beyond
from step_rows import NAMES
from table_text import Row, grouped, number, percent, table

# The paper's accuracies, always marked †.
TABLE_9 = {"cosine": 33.53, "cka": 34.58, "l1": 42.22, "rero": 42.81}
TABLE_12 = {16: 93.39, 24: 94.42}
TABLE_13 = {None: 73.17, 1.3: 73.54, 1.5: 73.85, 1.8: 73.79, 2.0: 73.80}
TABLE_16 = {
    ("ascending", "ascending"): 60.93,
    ("ascending", "rero"): 73.49,
    ("rero", "ascending"): 75.60,
    ("rero", "rero"): 91.56,
}
TABLE_17 = {"running cell": 91.0, "rero": 93.4}
TASKS = {"the task": Task(), "camera, 3 pixels a frame": Task(camera=3), "noise of 64": Task(noise=64)}
HARDER = {
    "camera": ("camera, pixels a frame", 1),
    "flicker": ("flicker, % of the brightness", 100),
    "noise": ("noise, standard deviation of 255", 1),
}


def motion(page: Page, folder: Path) -> None:
    for document in documents(folder, "motion_accuracy"):
        motion_document(page, document)


def motion_document(page: Page, document: dict[str, Any]) -> None:
    """One file, so one device and the same settings for all; another file is another section."""
    everything = [completed(row) for row in rows_of([document])]
    rows = [row for row in everything if row["steps"] is None]
    caption = document["device"]
    page.add(
        [
            f"## Does the selection carry the signal? ({caption})",
            "",
            "A small VideoMAE learns which of eight ways a disc moves over a photograph; test clips are of other "
            f"photographs; chance is {1 / DIRECTIONS:.1%}. [MOTION.md](MOTION.md) says what the task is and isn't. "
            "Mean over the seeds, the least and the largest in brackets. The paper's accuracies (†) are of other "
            "models on real data and stand beside ours for the direction of an effect, not its size.",
            "",
        ]
    )
    clips = figures.task_clips(TASKS, 0.15, document["settings"]["patch"])
    suffix = document["file"].removeprefix("motion_accuracy").removesuffix(".json").replace("_", "-")
    page.draw(f"motion-clips{suffix}", clips, "Clips of the motion task, and the 15 % of the tokens that change most")
    keep_ratios(page, usual_task(from_scratch(rows)), caption, suffix)
    page.add(longer(usual_task(row for row in everything if row["steps"] is not None)))
    for ablation in (orders, distances, running_cells, frame_samplers, lengths):
        page.add(ablation(rows))
    failures(page, from_scratch(rows), caption, suffix)
    beyond(page, everything, caption, suffix)
    page.cite([document])


def of(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """The accuracies of the runs with these settings."""
    return [row["accuracy"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def accuracies(rows: Iterable[Row]) -> str:
    return percent([row["accuracy"] for row in rows])


def from_scratch(rows: Iterable[Row]) -> list[Row]:
    """Trained with all labels, on all frames of the clip; a model stands once, whichever experiment asked for it."""
    return [row for row in rows if row["pretraining"] is row["window"] is row["trained"] is None]


def usual_task(rows: Iterable[Row], but: str = "") -> list[Row]:
    """On the task as it is, all but for one of its settings."""
    same = [(name, getattr(Task(), name)) for name in Task.__dataclass_fields__ if name != but]
    return [row for row in rows if all(row["task"][name] == value for name, value in same)]


def section(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], text: str = "") -> Iterator[str]:
    yield f"### {title}"
    yield ""
    if text:
        yield text
        yield ""
    yield from table(header, lines)


def keep_ratios(page: Page, rows: Sequence[Row], caption: str, suffix: str) -> None:
    """Figure 5 and Table 10: accuracy against the share of the tokens."""
    groups: dict[str, list[Any]] = {}
    lines = []
    shown = [row for row in rows if row["method"] in NAMES]  # not the distances
    order = sorted(shown, key=lambda row: (list(NAMES).index(row["method"]), row["keep_ratio"] or 1))
    for (method, keep_ratio), mine in grouped(order, lambda row: (row["method"], row["keep_ratio"])).items():
        first = mine[0]
        groups.setdefault(method, []).append((1e3 * first["gflops"], mine))
        cells = [number(keep_ratio, ".2f"), f"{first['kept']}/{first['tokens']}", f"{1e3 * first['gflops']:.2f}"]
        lines.append([NAMES[method], *cells, accuracies(mine)])
    if not lines:
        return
    steps = rows[0]["curve"][-1][0]
    page.add([f"### Accuracy against GFLOPs (Figure 5, Table 10), {steps} steps of training", ""])
    figure = figures.accuracy(groups, 1 / DIRECTIONS, f"motion task, {caption}; shaded: least to largest of the seeds")
    page.draw(f"motion-accuracy{suffix}", figure, "Accuracy against MFLOPs, and while training")
    page.add(table(["method", "ρ", "kept", "MFLOPs", "accuracy"], lines))


def longer(rows: Sequence[Row]) -> Iterator[str]:
    by_model = grouped(rows, lambda row: (row["method"], row["keep_ratio"], row["steps"]))
    if by_model:
        yield "With more steps, the same models otherwise:"
        yield ""
        lines = [
            [NAMES[method], number(ratio, ".2f"), str(steps), accuracies(mine)]
            for (method, ratio, steps), mine in by_model.items()
        ]
        yield from table(["method", "ρ", "steps", "accuracy"], lines)


def orders(rows: Sequence[Row]) -> Iterator[str]:
    order = {"ascending": "least changed", "rero": "most changed"}
    lines = [
        [order[first], order[last], percent(of(rows, pretraining=first, method=last, keep_ratio=0.3)), f"{paper} %†"]
        for (first, last), paper in TABLE_16.items()
    ]
    lines.append(["none", order["rero"], percent(of(rows, pretraining="none", method="rero")), "–"])
    if of(rows, pretraining="ascending"):
        title = "Most or least changed (Table 16): keep ratio 0.3 in both phases"
        yield from section(title, ["pre-training", "fine-tuning", "accuracy", "paper, UCF101"], lines)


def distances(rows: Sequence[Row]) -> Iterator[str]:
    scratch, lines = usual_task(from_scratch(rows)), []
    for distance, paper in TABLE_9.items():
        pretrained = of(rows, pretraining=distance, method="rero", keep_ratio=0.3)
        cells = [percent(pretrained), percent(of(scratch, method=distance, keep_ratio=0.15)), f"{paper} %†"]
        lines.append(["l2" if distance == "rero" else distance, *cells])
    if of(rows, pretraining="cosine"):
        header = ["distance", "in pre-training", "from scratch, 15 %", "paper, HMDB51"]
        yield from section("Distances (Table 9)", header, lines)


def running_cells(rows: Sequence[Row]) -> Iterator[str]:
    lines = [
        [
            name,
            percent(of(rows, pretraining=pretraining, method="all tokens")),
            percent(of(rows, pretraining=pretraining, method="rero", keep_ratio=0.3)),
            f"{TABLE_17[pretraining]} %†" if pretraining in TABLE_17 else "–",
        ]
        for pretraining, name in (("none", "none"), ("running cell", "running cell (V2)"), ("rero", "ReRo"))
    ]
    if of(rows, pretraining="running cell"):
        title = "ReRo or running cells in pre-training, then fine-tuning (Table 17)"
        yield from section(title, ["pre-training", "with all tokens", "with ReRo, 30 %", "paper, UCF101"], lines)


def frame_samplers(rows: Sequence[Row]) -> Iterator[str]:
    windows = [row for row in rows if row["window"] is not None]
    by_window = grouped(windows, lambda row: (row["window"], row["every"], row["uniform"], row["alpha"]))
    lines = []
    for (window, every, uniform, alpha), mine in sorted(by_window.items(), key=lambda item: item[0][:3]):
        how = "drawn uniformly from" if uniform else "drawn by their kept tokens from" if alpha else "all"
        how = f"every second of {window}" if every == 2 else f"{how} {window}"
        paper = f"{TABLE_13[alpha]} %†" if every == 1 and not uniform and alpha in TABLE_13 else "–"
        seen = share_with_motion(Task(**mine[0]["task"]), window)
        best, mflops = f"{seen + (1 - seen) / DIRECTIONS:.1%}", f"{1e3 * mine[0]['gflops']:.2f}"
        lines.append([number(alpha, ".1f"), how, mflops, accuracies(mine), best, paper])
    if lines:
        yield from section(
            "InfoFrameSampler: the action fills a third of a video of 48 frames (Table 13)",
            ["α", "16 frames", "MFLOPs", "accuracy", "best possible", "paper, OSCC"],
            lines,
            "A longer window holds more of the action, whoever draws from it: `best possible` is what a perfect model "
            "would reach, since a window without motion leaves a guess among eight. The sampler's own part is its "
            "distance to uniform draws from the same window. With a sampler all candidates are embedded, which the "
            "MFLOPs include.",
        )


def lengths(rows: Sequence[Row]) -> Iterator[str]:
    any_length = usual_task(from_scratch(rows), "frames")
    rero = [row for row in any_length if (row["method"], row["keep_ratio"]) == ("rero", 0.3)]
    lines = [
        [str(frames), f"{1e3 * mine[0]['gflops']:.2f}", accuracies(mine), f"{TABLE_12[frames]} %†"]
        for frames, mine in grouped(rero, lambda row: row["task"]["frames"]).items()
    ]
    if len(lines) > 1:
        header = ["frames", "MFLOPs", "accuracy", "paper, UCF101"]
        yield from section("16 or 24 frames (Table 12), keep ratio 0.3", header, lines)


def _level(name: str, row: Row) -> float:
    return row["task"][name]


def failures(page: Page, rows: Sequence[Row], caption: str, suffix: str) -> None:
    """Camera motion, flicker, noise: from scratch, at 15 % of the tokens and with all."""
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    lines = []
    methods = {"rero": 0.15, "all tokens": None}
    wanted = [row for row in rows if methods.get(row["method"], 0) == row["keep_ratio"]]
    for name, (title, scale) in HARDER.items():
        levels = grouped(sorted(usual_task(wanted, name), key=partial(_level, name)), partial(_level, name))
        if len(levels) < 2:
            continue
        for level, mine in levels.items():
            both = {method: of(mine, method=method) for method in methods}
            for method, found in both.items():
                if found:
                    panels.setdefault(title, {}).setdefault(method, []).append((scale * level, found))
            if level != getattr(Task, name):  # the task as it is stands above
                lines.append([title, f"{scale * level:g}", *map(percent, both.values())])
    if not panels:
        return
    page.add(
        [
            "### Harder clips: camera motion, flicker, noise",
            "",
            "ReRo looks at change between neighbouring tubelets and at nothing else, here at 15 % of the tokens. Both "
            "lines fall as the task gets harder; what selection costs shows in the distance between them. All tokens "
            "are trained for the same steps, at the end of which some still improve (the curves are in the JSON). "
            "Where each line begins, on the task as it is, stands above.",
            "",
        ]
    )
    figure = figures.failures(panels, 1 / DIRECTIONS, f"motion task, {caption}")
    page.draw(f"motion-failures{suffix}", figure, "Accuracy under camera motion, flicker and noise")
    page.add(table(["what", "how much", *(NAMES[method] for method in methods)], lines))
