"""The figures of RESULTS.md and MOTION.md, each of rows that a benchmark measured; every one names its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from motion_clips import TEST_PHOTOS, Task, make_clips, photographs
from step_rows import NAMES, clips, memory_of
from table_text import Row, grouped
from torch import Tensor

import everest_tokens as et
from everest_tokens.visualization import draw, selection_part

# Okabe and Ito's colours, which the colour-blind tell apart, and a marker each for print.
STYLES = {
    "rero": ("#0072B2", "o"),
    "rero first": ("#D55E00", "P"),
    "rero middle": ("#CC79A7", "X"),
    "random": ("#E69F00", "s"),
    "tube": ("#009E73", "^"),
    "running cell": ("#CC79A7", "D"),
    "energy": ("#D55E00", "P"),
    "run length": ("#009E73", "^"),
    "ascending": ("#56B4E9", "v"),
    "all tokens": ("#000000", "*"),
    "videomae": ("#000000", "*"),
    "paper": ("#D55E00", "x"),
}
PHASES = ("pre-training", "fine-tuning", "inference")  # as panels stand
BASELINE = "0.55"  # of bars: a grey
GB = 1e9


def panels(count: int, caption: str, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A row of axes as wide as a README shows, with what was measured where below them."""
    figure = Figure(figsize=(max(9.0, 4.2 * count), height), dpi=130, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    figure.supxlabel(caption, fontsize=9, color="0.35")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    return figure, axes


def plot(axis: Axes, method: str, xs: Sequence[float], ys: Sequence[float], **more: Any) -> None:
    """A method's points, joined, in its own colour and marker."""
    colour, marker = STYLES[method]
    more = {"markersize": 10 if marker == "*" else 6, "linewidth": 1.6, "label": NAMES[method]} | more
    axis.plot(xs, ys, color=colour, marker=marker, **more)


def bars(axis: Axes, groups: Sequence[str], series: dict[str, Sequence[float]], digits: str) -> None:
    """Bars side by side in each group, labelled with their values."""
    width = 0.8 / len(series)
    for place, (method, values) in enumerate(series.items()):
        at = [i + (place - (len(series) - 1) / 2) * width for i in range(len(groups))]
        colour = STYLES[method][0] if method == "rero" else BASELINE
        drawn = axis.bar(at, values, width * 0.92, color=colour, label=NAMES[method])
        axis.bar_label(drawn, [format(value, digits) for value in values], fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), groups)
    axis.margins(y=0.35)  # the legend stands above the bars


def gflops(rows: Iterable[Row]) -> Figure:
    """Figure 1 (a): GFLOPs of one forward, VideoMAE and EVEREST, Table 1's settings; crosses are the paper's."""
    table = [row for row in rows if row["table"] == "1"]
    figure, axes = panels(2, "counted by count_flops from shapes, no device; pre-training at keep ratio 0.4, depth 4")
    for axis, phase in zip(axes, ("pre-training", "fine-tuning"), strict=True):
        sizes = list(dict.fromkeys(row["size"] for row in table))
        found = {(r["what"], r["size"]): r for r in table if r["phase"] == phase}
        series = {
            m: [found[w, s]["gflops"] for s in sizes] for m, w in (("all tokens", "VideoMAE"), ("rero", "EVEREST"))
        }
        bars(axis, [f"ViT-{size}" for size in sizes], series, ".1f")
        axis.containers[0].set_label("VideoMAE")
        colour, marker = STYLES["paper"]
        for place, what in ((-0.2, "VideoMAE"), (0.2, "EVEREST")):
            paper = [found[what, size]["paper"] for size in sizes]
            at = [i + place for i in range(len(sizes))]
            axis.scatter(
                at, paper, color=colour, marker=marker, zorder=3, label="the paper's figure" if place > 0 else None
            )
        axis.set_title(phase)
        axis.set_ylabel("GFLOPs (multiply–accumulates) a clip")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def phases_of(rows: Sequence[Row]) -> list[str]:
    return [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]


def memory_name(rows: Sequence[Row]) -> str:
    peak = all(row["peak_allocated_bytes"] is not None for row in rows)
    return "peak allocated, GB" if peak else "saved for backward, GB"


def memory_by_size(rows: Sequence[Row], caption: str) -> Figure:
    """Figure 1 (b): memory of a step, all tokens against ReRo, for each size."""
    figure, axes = panels(len(phases_of(rows)), caption)
    for axis, phase in zip(axes, phases_of(rows), strict=True):
        mine = [row for row in rows if row["phase"] == phase]
        groups: dict[str, dict[bool, float]] = {}
        for row in mine:
            if row["method"] == "rero" or row["baseline"]:
                groups.setdefault(f"ViT-{row['size']}\n{clips(row)}", {})[row["baseline"]] = (
                    memory_of(row) or 0.0
                ) / GB
        both = {name: pair for name, pair in groups.items() if len(pair) == 2}
        first = "videomae" if phase == "pre-training" else "all tokens"
        bars(
            axis,
            list(both),
            {first: [p[True] for p in both.values()], "rero": [p[False] for p in both.values()]},
            ".2f",
        )
        axis.set_title(phase)
        axis.set_ylabel(memory_name(mine))
        axis.legend(frameon=False, fontsize=9)
    return figure


def speedup(rows: Sequence[Row], caption: str) -> Figure:
    """How much faster a step is, against the ratio of the forwards' products (multiply–accumulates)."""
    figure, axes = panels(len(phases_of(rows)), caption, height=4.0)
    for axis, phase in zip(axes, phases_of(rows), strict=True):
        mine = [r for r in rows if r["phase"] == phase and not r["baseline"] and r["step_ratio"]]
        most = max([2.2, *(1 / r["gflops_ratio"] for r in mine), *(1 / r["step_ratio"] for r in mine)]) * 1.05
        axis.plot([1, most], [1, most], color="0.6", linewidth=1, label="the ratio of products")
        axis.plot([1, most], [1 / 1.05, most / 1.05], color="0.6", linewidth=1, linestyle=":", label="5 % below")
        for method in dict.fromkeys(r["method"] for r in mine):
            points = [(1 / r["gflops_ratio"], 1 / r["step_ratio"], r) for r in mine if r["method"] == method]
            plot(axis, method, [x for x, _, _ in points], [y for _, y, _ in points], linestyle="none")
            for x, y, row in points:
                if method == "rero":
                    batches = {r["batch_size"] for r in mine if r["size"] == row["size"]}
                    name = row["size"] if len(batches) == 1 else f"{row['size']}, {clips(row)}"
                    crowded = any(0 < u - x < 0.15 * most and abs(v - y) < 0.05 * most for u, v, _ in points)
                    where = {"xytext": (-6, -3), "ha": "right"} if crowded else {"xytext": (7, -3)}
                    axis.annotate(name, (x, y), textcoords="offset points", fontsize=8, **where)
        axis.set_title(phase)
        whose = "VideoMAE's" if phase == "pre-training" else "all tokens'"
        axis.set_xlabel(f"{whose} GFLOPs / the method's")
        axis.set_ylabel(f"{whose} step time / the method's")
        axis.legend(frameon=False, fontsize=8)
    return figure


def sweep(rows: Sequence[Row], along: str, name: str, caption: str) -> Figure:
    """Time, then memory, of a step along one setting: as multiples of the baseline's, or absolute for frames.

    There is no panel of memory where none was measured, as of inference on a CPU.
    """
    relative = along == "keep_ratio"

    def value(row: Row) -> float:
        return row[along] or 0

    measured = [row for row in rows if memory_of(row)]
    figure, axes = panels(2 if measured else 1, caption)
    for phase, line in (("fine-tuning", "-"), ("pre-training", "--"), ("inference", ":")):
        mine = [row for row in rows if row["phase"] == phase and not row["out_of_memory"]]
        for method in ("videomae", "all tokens", "rero"):
            points = sorted((row for row in mine if row["method"] == method), key=value)
            if not points or (relative and points[0]["baseline"]):
                continue
            xs, more = [value(row) for row in points], {"linestyle": line, "label": f"{NAMES[method]}, {phase}"}
            plot(axes[0], method, xs, [row["step_ratio" if relative else "median_seconds"] for row in points], **more)
            if relative:
                ratio = [row["gflops_ratio"] for row in points]
                axes[0].plot(xs, ratio, color="0.6", linestyle=line, linewidth=1, label=f"GFLOPs, {phase}")
            memory = [row["memory_ratio"] if relative else (memory_of(row) or 0) / GB for row in points]
            known = [(x, y) for x, y in zip(xs, memory, strict=True) if y]
            if known:
                plot(axes[1], method, [x for x, _ in known], [y for _, y in known], **more)
    axes[0].set_ylabel("step time / the unpatched model's" if relative else "seconds of a step")
    if measured:
        of_memory = memory_name(measured)
        axes[1].set_ylabel(f"{of_memory.removesuffix(', GB')} / its" if relative else of_memory)
    for axis in axes:
        axis.set_xlabel(name)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    return figure


def spread_plot(axis: Axes, method: str, points: Sequence[tuple[float, Sequence[float]]], **more: Any) -> None:
    """(x, accuracies over the seeds): their mean, and from the least to the largest."""
    ordered = sorted(points)
    means = [sum(values) / len(values) for _, values in ordered]
    xs = [x for x, _ in ordered]
    plot(axis, method, xs, [100 * mean for mean in means], **more)
    low, high = [100 * min(v) for _, v in ordered], [100 * max(v) for _, v in ordered]
    axis.fill_between(xs, low, high, color=STYLES[method][0], alpha=0.15, linewidth=0)


def accuracy(groups: dict[str, list[tuple[float, list[Row]]]], chance: float, caption: str) -> Figure:
    """Accuracy against MFLOPs, then accuracy while training, of all methods (Figure 5, Table 10).

    Args:
        groups: method → (MFLOPs of a forward, its records, one a seed) for each keep ratio.
    """
    figure, axes = panels(2, caption, height=4.2)
    for method, points in groups.items():
        ends = [(mflops, [record["accuracy"] for record in records]) for mflops, records in points]
        spread_plot(axes[0], method, ends)
    axes[0].set_xlabel("MFLOPs (multiply–accumulates) of a forward")
    for method, points in groups.items():
        # One curve a method: at the keep ratio with which it ends best.
        mflops, records = max(points, key=lambda point: sum(r["accuracy"] for r in point[1]) / len(point[1]))
        share = f", {records[0]['kept'] / records[0]['tokens']:.0%}" if method != "all tokens" else ""
        spent = 3 * mflops * records[0]["settings"]["batch_size"] / 1e6  # TFLOPs of a step
        curve = [
            (step * spent, [record["curve"][look][1] for record in records])
            for look, (step, _) in enumerate(records[0]["curve"])
        ]
        spread_plot(axes[1], method, curve, label=f"{NAMES[method]}{share}")
    axes[1].set_xlabel(
        "TFLOPs spent in training (3 × the forwards),\neach method at its best keep ratio by test accuracy"
    )
    for axis in axes:
        axis.axhline(100 * chance, color="0.6", linewidth=1, linestyle=":")
        axis.set_ylabel("accuracy, % (dotted: chance)")
        axis.set_ylim(0, 100)
        axis.legend(frameon=False, fontsize=8)
    return figure


def camera(rows: Sequence[Row]) -> Figure:
    """Agreement with what moves by itself for each path of the camera: each clip a mark of its own."""
    ratios = list(dict.fromkeys(row["keep_ratio"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    names = list(dict.fromkeys((row["video"], row["start"]) for row in rows))
    figure, axes = panels(len(ratios), "compared by pixels, no model and no device in it", height=5.2)
    looks = {
        "ignore": ("all tokens", "ignored"),
        "compensate": ("rero", "compensated"),
        "exact": ("tube", "known path"),
    }
    for axis, ratio in zip(axes, ratios, strict=True):
        for place, (how, (method, label)) in enumerate(looks.items()):
            colour = STYLES[method][0]
            for marker, name in zip("osD^v<>", names, strict=False):
                its = [r for r in rows if r["keep_ratio"] == ratio and (r["video"], r["start"]) == name]
                at = [ways.index(row["way"]) + 0.25 * (place - 1) for row in its]
                more = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5}
                axis.plot([100 * row[how] for row in its], at, **more, label=label if marker == "o" else None)
        axis.set_yticks(range(len(ways)), ways if axis is axes[0] else [""] * len(ways))
        axis.invert_yaxis()
        axis.set_xlim(0, 102)
        axis.set_xlabel("agreement with what moves by itself, %")
        axis.set_title(f"{ratio:.0%} of the tokens kept")
        axis.grid(axis="x", color="0.9")
    for marker, (video, start) in zip("osD^v<>", names, strict=False):
        label = f"{video}, from frame {start}"
        axes[0].plot([], [], color="0.5", marker=marker, linestyle="none", markersize=5, label=label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def appearance(
    groups: dict[str, list[Row]], whole: Sequence[Row], chances: tuple[float, float], caption: str
) -> Figure:
    """Accuracy of both labels against the keep ratio, a line a selector.

    Args:
        groups: method → its records, of all ratios and seeds.
        whole: the records of all tokens, drawn as a level.
        chances: of the motion and of the colour.
    """
    figure, axes = panels(2, caption, height=4.2)
    labels = (("motion", "accuracy"), ("colour of what rests", "colour_accuracy"))
    for axis, (title, key), chance in zip(axes, labels, chances, strict=True):
        for method, rows in groups.items():
            ratios = grouped(rows, lambda row: row["keep_ratio"])
            spread_plot(axis, method, [(ratio, [row[key] for row in mine]) for ratio, mine in ratios.items()])
        if whole:
            level = sum(row[key] for row in whole) / len(whole)
            axis.axhline(100 * level, color=STYLES["all tokens"][0], linewidth=1.2, label=NAMES["all tokens"])
        axis.axhline(100 * chance, color="0.6", linewidth=1, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("keep ratio")
        axis.set_ylabel("accuracy, % (dotted: chance)")
        axis.set_ylim(0, 100)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def failures(
    panels_of: dict[str, dict[str, list[tuple[float, Sequence[float]]]]], chance: float, caption: str
) -> Figure:
    """Accuracy along what each panel's name says: camera motion, flicker, noise, the tokens of a budget."""
    figure, axes = panels(len(panels_of), caption)
    for axis, (name, methods) in zip(axes, panels_of.items(), strict=True):
        for method, points in methods.items():
            spread_plot(axis, method, points)
        axis.axhline(100 * chance, color="0.6", linewidth=1, linestyle=":")
        axis.set_xlabel(name)
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("accuracy, % (dotted: chance)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def task_clips(tasks: dict[str, Task], keep_ratio: float, patch: int) -> Figure:
    """What the clips look like, and what ReRo keeps of them (by L2 between pixels, as no model is trained here)."""
    parts = []
    selector = et.ReRoSelector(keep_ratio)
    for title, task in tasks.items():
        clips, _ = make_clips(task, photographs(TEST_PHOTOS), 1, torch.Generator().manual_seed(3))
        grid = (task.frames // 2, task.size // patch, task.size // patch)
        tokens = tubelets(clips[0], patch)
        chosen = et.TokenSelection(selector(tokens, grid), None, grid)
        parts.append(selection_part(clips[0], {"kept": chosen}, title=title))
    return draw(parts)


def tubelets(frames: Tensor, patch: int) -> Tensor:
    """Pixels of every tubelet in t-major order: (T, 3, H, W) → (1, N, 6·patch²) float32 in [0, 1]."""
    t, c, h, w = frames.shape
    blocks = frames.float().div(255).reshape(t // 2, 2, c, h // patch, patch, w // patch, patch)
    return blocks.permute(0, 3, 5, 1, 2, 4, 6).reshape(1, -1, 2 * c * patch * patch)
