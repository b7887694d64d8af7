"""Turns benchmarks/results/*.json into RESULTS.md and its figures. Nothing is measured here, and no number is typed in.

    python benchmarks/report.py

A number in RESULTS.md was measured by the named script on the named device, or it is the paper's and marked † so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
from documents import RESULTS
from motion_clips import DIRECTIONS, Task
from tqdm import tqdm
from train_step import MEMORY_TARGETS, PHASES

Row = dict[str, Any]
# Whole-node figures of the paper: Table 4 (ViT-B, pre-training, batch of 128), Table 5 (ViT-B, fine-tuning, 128) and
# Table 3 (pre-training, GB over eight A100s by effective batch size; None is out of memory). Quoted, always marked †.
TABLE_3 = {
    ("videomae", "S"): (71.9, 117.4, 233.6, 443.6),
    ("videomae", "B"): (258.4, 486.4, None, None),
    ("videomae", "L"): (353.9, 634.1, None, None),
    ("rero", "S"): (31.9, 59.9, 95.6, 173.1),
    ("rero", "B"): (60.0, 91.2, 151.2, 273.6),
    ("rero", "L"): (117.3, 164.1, 258.9, 428.4),
}
EFFECTIVE_BATCHES = (128, 256, 512, 1024)
TABLE_4 = {"seconds": (18 * 60 + 42, 8 * 60 + 18), "memory": (150.3, 66.3)}
TABLE_5 = {"memory": (362.5, 178.4)}
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
STEP_TARGET = 1.05  # × the ratio of forward GFLOPs


def documents(folder: Path, stem: str) -> list[dict[str, Any]]:
    """The results files of one script, each with its name."""
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob(f"{stem}*.json"))]


def rows_of(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Their runs, each knowing its device and file."""
    keys = ("device", "file", "world_size", "settings")
    return [run | {key: document.get(key) for key in keys} for document in found for run in document["runs"]]


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """In order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; columns after the first stand to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def sources(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where the numbers of a section come from: command, device, versions, date."""
    for one in found:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        device = f"{one['device']}; " if "device" in one else ""
        yield f"- `{one['command']}` → `results/{one['file']}`: {device}{versions}" + (
            f"; {one['date']}" if "date" in one else ""
        )
    yield ""


def number(value: float | None, digits: str = ".3f") -> str:
    return "–" if value is None else format(value, digits)


def gigabytes(value: float | None) -> str:
    return number(None if value is None else value / 1e9, ".2f")


def percent(values: Sequence[float]) -> str:
    """Mean over the seeds, and the least and the largest of them."""
    if not values:
        return "–"
    mean, low, high = figures.mean_and_spread(values)
    return f"{mean:.1%}" if len(values) == 1 else f"{mean:.1%} ({low:.1%}–{high:.1%})"


class Report:
    """RESULTS.md as it grows, and the figures beside it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lines: list[str] = []

    def add(self, lines: Iterable[str]) -> None:
        self.lines += lines

    def draw(self, name: str, figure: Any, alt: str) -> None:
        path = self.out.parent / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        self.lines += [f"![{alt}](figures/{name}.png)", ""]

    def write(self) -> None:
        self.out.write_text("\n".join(self.lines).rstrip() + "\n")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def compute(report: Report, folder: Path) -> None:
    """Tables 1, 5, 10, 11, 12, 15 and Figure 1 (a)."""
    for document in documents(folder, "gflops"):
        rows = document["figures"]
        worst = max(rows, key=lambda row: abs(row["difference_percent"]))
        report.add(
            [
                "## GFLOPs of every table",
                "",
                "One forward of one clip, in multiply–accumulates of linear and attention products, which is what the "
                "paper calls GFLOPs. Models are on the meta device; torch's `FlopCounterMode` counts the same forward. "
                f"Largest difference from the paper: {worst['difference_percent']:+.2f} % ({len(rows)} figures). "
                "Pre-training has decoder depth 4; VideoMAE's encoder sees 160 of 1568 tokens (392 at 75 %), EVEREST's "
                "156. Table 1's pre-training column is keep ratio 0.4, Tables 10, 12 and 15 are 0.3. ST-MAE's 46.1† "
                "and other methods' rows are not counted: their configuration isn't given.",
                "",
            ]
        )
        report.draw("gflops", figures.gflops(rows), "GFLOPs of VideoMAE and EVEREST, counted, beside the paper's")

        def cells(row: Row) -> list[str]:
            name = f"{row['what']}, ViT-{row['size']}" + (f", {row['frames']} frames" if row["frames"] != 16 else "")
            ratio = "–" if row["keep_ratio"] is None else f"{row['keep_ratio']:.1f}"
            counted = [f"{row[key]:.2f}" for key in ("gflops", "flop_counter_mode")]
            return [
                row["table"],
                name,
                row["phase"],
                ratio,
                *counted,
                f"{row['paper']:g}†",
                f"{row['difference_percent']:+.2f} %",
            ]

        titles = ["table", "what", "phase", "ρ_pre", "counted", "FlopCounterMode", "paper", "difference"]
        report.add(table(titles, map(cells, rows)))
        report.add(sources([document]))


def case_of(row: Row) -> tuple[Any, ...]:
    """What the methods that took turns share; random and ReRo of one sweep differ in their keep ratio."""
    return tuple(row[key] for key in ("device", "dtype", "mode", "size", "phase", "frames", "batch_size", "image_size"))


def training(report: Report, folder: Path) -> None:
    """Step time and memory: Figure 1 (b), Tables 3 to 5, sweeps, and the targets."""
    found = documents(folder, "train_step")
    rows = rows_of(found)
    usual = usual_cases(rows)
    report.add(
        [
            "## Training steps",
            "",
            "Forward, backward and fused AdamW. Ratios are to the unpatched model: all tokens in fine-tuning, "
            "VideoMAE's 90 % tube mask in pre-training (decoder depth 4). Methods of a case take turns on one set of "
            "weights; a ratio is the median over the turns, quartiles in brackets. The limit is the ratio of forward "
            f"GFLOPs; the target is a step at most {STEP_TARGET} × that.",
            "",
        ]
    )
    for (device, dtype, mode), mine in grouped(rows, lambda r: (r["device"], r["dtype"], r["mode"])).items():
        caption = f"{device}, {dtype}, {mode}"
        main = [row for row in mine if row["frames"] == 16 and row in usual]
        report.add([f"### {caption}", ""])
        name = slug(caption)
        fast = [row for row in main if not row["out_of_memory"] and row["step_ratio"] is not None]
        if fast:
            report.draw(f"speedup-{name}", figures.speedup(fast, caption), "Realised speed-up against the FLOPs' limit")
            largest = largest_batches(fast)
            report.draw(f"memory-{name}", figures.memory_by_size(largest, caption), "Memory of a training step by size")
        titles = [
            "",
            "ρ",
            "kept",
            "GFLOPs",
            "ratio",
            "step, s",
            "ratio",
            "clips/s",
            "saved for backward, GB",
            "ratio",
            "peak, GB",
        ]
        report.add(table(titles, (step_cells(row) for row in main)))
        sweeps(report, [row for row in mine if not row["out_of_memory"]], usual, caption, name)
    report.add(targets(rows))
    report.add(paper_tables(usual))
    report.add(sources(found))


def usual_cases(rows: Sequence[Row]) -> list[Row]:
    """The rows of cases at the paper's keep ratios: a sweep measures the baseline anew beside each of the others."""
    cases: list[list[Row]] = []
    for row in rows:
        cases += [[]] if row["baseline"] else []
        cases[-1].append(row)
    return [row for case in cases if all(map(usual_ratio, case)) for row in case]


def model_of(row: Row) -> str:
    return f"ViT-{row['size']} {row['phase']}, {figures.clips(row)}"


def circumstances(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, {row['mode']}"


def usual_ratio(row: Row) -> bool:
    """Whether a method runs at the paper's keep ratio, or at one of its own."""
    return row["method"] not in ("rero", "random") or row["keep_ratio"] == PHASES[row["phase"]][1]


def step_cells(row: Row) -> list[str]:
    what = f"{model_of(row)}, {figures.STYLES[row['method']][2]}"
    cells = [what, number(row["keep_ratio"], ".2f"), f"{row['kept']}/{row['tokens']}"]
    cells += [f"{row['gflops']:.1f}", number(row["gflops_ratio"])]
    if row["out_of_memory"]:
        return [*cells, "out of memory", *["–"] * 5]
    low, high = row["step_ratio_quartiles"] or (None, None)
    cells += [f"{row['median_seconds']:.3g}", f"{number(row['step_ratio'])} ({number(low)}–{number(high)})"]
    cells += [f"{row['clips_per_second']:.3g}", gigabytes(row["saved_bytes"]), number(row["saved_ratio"])]
    return [*cells, gigabytes(row["peak_allocated_bytes"])]


def largest_batches(rows: Sequence[Row]) -> list[Row]:
    """Of each size and phase the rows at the largest batch that all of its methods could run."""
    chosen: list[Row] = []
    for _, mine in grouped(rows, lambda r: (r["size"], r["phase"])).items():
        most = max(row["batch_size"] for row in mine)
        chosen += [row for row in mine if row["batch_size"] == most]
    return chosen


def sweeps(report: Report, rows: Sequence[Row], usual: Sequence[Row], caption: str, name: str) -> None:
    """Time and memory against keep ratio, and against frames, where several were measured."""
    by_case = grouped(rows, lambda r: (r["size"], r["batch_size"], r["frames"]))
    for (size, _, frames), mine in by_case.items():
        if len({row["keep_ratio"] for row in mine if row["method"] == "rero"}) > 2:
            title = f"{caption}; ViT-{size}, {figures.clips(mine[0])} of {frames} frames"
            figure = figures.sweep(mine, "keep_ratio", "keep ratio ρ_pre", title, lambda row: row["keep_ratio"] or 0)
            report.draw(f"keep-ratio-{size.lower()}-{name}", figure, "Time and memory of a step against the keep ratio")
    for (size, _), mine in grouped(rows, lambda r: (r["size"], r["batch_size"])).items():
        paper = [row for row in mine if row in usual]
        if len({row["frames"] for row in paper}) > 2:
            title = f"{caption}; ViT-{size}, {figures.clips(mine[0])}"
            figure = figures.sweep(paper, "frames", "frames of a clip", title, lambda row: row["frames"])
            report.draw(
                f"frames-{size.lower()}-{name}", figure, "Time and memory of a step against the number of frames"
            )


def targets(rows: Sequence[Row]) -> Iterator[str]:
    """Every target that was measured, met or missed, and which were not measured."""
    yield "### Targets"
    yield ""
    lines = []
    for row in rows:
        usual = row["method"] == "rero" and row["frames"] == 16 and usual_ratio(row)
        if not usual or row["size"] not in ("B", "L"):
            continue
        where = f"{model_of(row)}, {circumstances(row)}"
        if row["step_ratio"] is not None:
            most = STEP_TARGET * row["gflops_ratio"]
            verdict = "met" if row["step_ratio"] <= most else "**missed**"
            lines.append([where, "step time ratio", f"≤ {most:.3f}", number(row["step_ratio"]), verdict])
        target = MEMORY_TARGETS.get((row["phase"], row["size"], row["batch_size"]))
        peak = row["peak_allocated_bytes_per_device"]
        if target and row["dtype"] == "bfloat16" and peak is not None:
            verdict = "met" if peak <= target else "**missed**"
            lines.append([where, "peak allocated, GB", f"≤ {target / 1e9:.1f}", gigabytes(peak), verdict])
    yield from table(["where", "what", "target", "measured", ""], lines)
    if not any(row["peak_allocated_bytes"] is not None for row in rows):
        yield (
            "No GPU has been measured yet: step ratios on a GPU, and peak memory in bfloat16 (ViT-B ≤ 5.0 GB and "
            "ViT-L ≤ 10.5 GB in pre-training at 32 clips a GPU, ViT-B ≤ 11 GB in fine-tuning at 16), are open. "
            "`python benchmarks/train_step.py --sizes B L --batch-sizes 16 32 --dtypes bfloat16` measures them on one, "
            "`benchmarks/slurm/train_step.sbatch` Table 3 on a node."
        )
        yield ""


def paper_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Tables 3, 4 and 5: ours beside the paper's ratios, which other devices, precisions and batches gave."""
    yield "### Beside Tables 3, 4 and 5"
    yield ""
    yield (
        "ReRo's share of the unpatched model's time and memory. The paper's were measured on nodes of eight A6000s "
        "(Table 4) and A100s (Table 3), ours on what stands in the line; memory is what is saved for backward where no "
        "allocator's peak was measured."
    )
    yield ""
    seconds, memory = (after / before for before, after in (TABLE_4["seconds"], TABLE_4["memory"]))
    lines = [["Table 4: ViT-B, pre-training, batch of 128", f"{seconds:.3f}†", f"{memory:.3f}†"]]
    lines.append(
        ["Table 5: ViT-B, fine-tuning, batch of 128", "–", f"{TABLE_5['memory'][1] / TABLE_5['memory'][0]:.3f}†"]
    )
    for size in "SBL":
        before, after = TABLE_3["videomae", size], TABLE_3["rero", size]
        shares = ", ".join(number(a / b) if b else "VideoMAE out of memory" for b, a in zip(before, after, strict=True))
        batches = ", ".join(map(str, EFFECTIVE_BATCHES))
        lines.append([f"Table 3: ViT-{size}, pre-training, batches of {batches}", "–", f"{shares}†"])
    for mine in grouped([row for row in rows if row["frames"] == 16], case_of).values():
        base = next((row for row in mine if row["baseline"]), None)
        for row in mine:
            if row["method"] == "rero" and usual_ratio(row) and base is not None and row["step_ratio"] is not None:
                ratio = (figures.memory_of(row) or 0) / (figures.memory_of(base) or math.inf)
                where = f"{model_of(row)}, {circumstances(row)}"
                lines.append([where, number(row["step_ratio"]), number(ratio)])
    yield from table(["", "time", "memory"], lines)


def selection_cost(report: Report, folder: Path) -> None:
    """Selection's own cost, by distance."""
    found = documents(folder, "selection_cost")
    if not found:
        return
    report.add(
        [
            "## What selecting costs",
            "",
            "`policy.select` in whole (importance, top-k, the split into visible and target) as a share of ReRo's "
            "training step, measured in the same run; milliseconds for a batch.",
            "",
        ]
    )

    def cells(row: Row) -> list[str]:
        where = f"{model_of(row)}, {circumstances(row)}"
        parts = [f"{1e3 * row[f'{part}_seconds']:.2f}" for part in ("importance", "top_k", "gather", "select")]
        return [where, row["distance"], *parts, f"{row['share']:.3%}"]

    titles = ["", "distance", "importance", "top-k", "gather", "select", "share of the step"]
    report.add(table(titles, map(cells, rows_of(found))))
    report.add(sources(found))


def motion(report: Report, folder: Path) -> None:
    """Accuracy on the motion task: Figure 5 and Tables 9, 10, 12, 13, 16 and 17, and where it fails."""
    found = documents(folder, "motion_accuracy")
    rows = [row for row in rows_of(found) if row["steps"] is None]
    long = [row for row in rows_of(found) if row["steps"] is not None]
    if not rows:
        return
    caption = found[0]["device"]
    report.add(
        [
            "## Does the selection carry the signal?",
            "",
            "A small VideoMAE learns which of eight ways a disc moves over a photograph; test clips are of other "
            f"photographs; chance is {1 / DIRECTIONS:.1%}. [MOTION.md](MOTION.md) says what the task is and isn't. "
            "Mean over the seeds, the least and the largest in brackets. The paper's accuracies (†) are of other "
            "models on real data and stand beside ours for the direction of an effect, not its size.",
            "",
        ]
    )
    tasks = {"the task": Task(), "camera, 3 pixels a frame": Task(camera=3), "noise of 64": Task(noise=64)}
    clips = figures.task_clips(tasks, 0.15, found[0]["settings"]["patch"])
    report.draw("motion-clips", clips, "Clips of the motion task, and the 15 % of the tokens that change most")
    keep_ratios(report, usual_task(from_scratch(rows)), long, caption)
    report.add(ablations(rows))
    failures(report, rows, caption)
    report.add(sources(found))


def of(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """The accuracies of the runs with these settings."""
    return [row["accuracy"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def from_scratch(rows: Iterable[Row]) -> list[Row]:
    """Trained with all labels, on all frames of the clip; a model stands once, whichever experiment asked for it."""
    return [row for row in rows if row["pretraining"] is None and row["window"] is None]


def usual_task(rows: Iterable[Row], but: str = "") -> list[Row]:
    """On the task as it is, all but for one of its settings."""
    same = [(name, getattr(Task(), name)) for name in Task.__dataclass_fields__ if name != but]
    return [row for row in rows if all(row["task"][name] == value for name, value in same)]


def keep_ratios(report: Report, rows: Sequence[Row], long: Sequence[Row], caption: str) -> None:
    """Figure 5 and Table 10: accuracy against the share of the tokens."""
    if not rows:
        return
    groups: dict[str, list[Any]] = {}
    lines = []
    shown = [row for row in rows if row["method"] in figures.STYLES]  # not the distances
    order = sorted(shown, key=lambda row: (list(figures.STYLES).index(row["method"]), row["keep_ratio"] or 1))
    for (method, keep_ratio), mine in grouped(order, lambda r: (r["method"], r["keep_ratio"])).items():
        first, values = mine[0], [row["accuracy"] for row in mine]
        groups.setdefault(method, []).append((keep_ratio, 1e3 * first["gflops"], values, first))
        share = f"{first['kept']}/{first['tokens']}"
        name = figures.STYLES[method][2]
        lines.append([name, number(keep_ratio, ".2f"), share, f"{1e3 * first['gflops']:.2f}", percent(values)])
    steps = rows[0]["curve"][-1][0]
    report.add([f"### Accuracy against GFLOPs (Figure 5, Table 10), {steps} steps of training", ""])
    figure = figures.accuracy(groups, 1 / DIRECTIONS, f"motion task, {caption}; shaded: least to largest of the seeds")
    report.draw("motion-accuracy", figure, "Accuracy against MFLOPs, and while training")
    report.add(table(["method", "ρ", "kept", "MFLOPs", "accuracy"], lines))
    if long:
        report.add(["With more steps, the same models otherwise:", ""])
        lines = [
            [figures.STYLES[method][2], number(ratio, ".2f"), str(count), percent([row["accuracy"] for row in mine])]
            for (method, ratio, count), mine in grouped(
                long, lambda r: (r["method"], r["keep_ratio"], r["steps"])
            ).items()
        ]
        report.add(table(["method", "ρ", "steps", "accuracy"], lines))


def ablations(rows: Sequence[Row]) -> Iterator[str]:
    """Tables 16, 9, 17, 13 and 12 in miniature."""
    order = {"ascending": "least changed", "rero": "most changed"}
    pretrained, scratch = [row for row in rows if row["pretraining"]], usual_task(from_scratch(rows))
    if of(pretrained, method="ascending"):
        yield "### Most or least changed (Table 16): keep ratio 0.3 in both phases"
        yield ""
        lines = []
        for (pretraining, method), paper in TABLE_16.items():
            values = of(pretrained, pretraining=pretraining, method=method, keep_ratio=0.3)
            lines.append([order[pretraining], order[method], percent(values), f"{paper} %†"])
        lines.append(["none", order["rero"], percent(of(pretrained, pretraining="none", method="rero")), "–"])
        yield from table(["pre-training", "fine-tuning", "accuracy", "paper, UCF101"], lines)
    if of(pretrained, pretraining="cosine"):
        yield "### Distances (Table 9)"
        yield ""
        lines = []
        for distance, paper in TABLE_9.items():
            first = of(pretrained, pretraining=distance, method="rero", keep_ratio=0.3)
            second = of(scratch, method=distance, keep_ratio=0.15)
            cells = [percent(values) if values else "–" for values in (first, second)]
            lines.append(["l2" if distance == "rero" else distance, *cells, f"{paper} %†"])
        yield from table(["distance", "in pre-training", "from scratch, 15 %", "paper, HMDB51"], lines)
    if of(pretrained, pretraining="running cell"):
        yield "### ReRo or running cells in pre-training, then fine-tuning with all tokens (Table 17)"
        yield ""
        names = {"none": "none", "running cell": "running cell (V2)", "rero": "ReRo"}
        lines = [
            [
                name,
                percent(of(pretrained, pretraining=pretraining, method="all tokens")),
                f"{TABLE_17[pretraining]} %†" if pretraining in TABLE_17 else "–",
            ]
            for pretraining, name in names.items()
        ]
        yield from table(["pre-training", "accuracy", "paper, UCF101"], lines)
    windows = [row for row in rows if row["window"] is not None]
    if windows:
        yield "### InfoFrameSampler: the action fills a third of a video of 48 frames (Table 13)"
        yield ""
        lines = []
        for (alpha, window, every), mine in grouped(windows, lambda r: (r["alpha"], r["window"], r["every"])).items():
            how = f"drawn out of {window}" if alpha else "in a row" if every == 1 else f"every second frame of {window}"
            paper = f"{TABLE_13[alpha]} %†" if every == 1 and alpha in TABLE_13 else "–"
            lines.append([number(alpha, ".1f"), how, percent([row["accuracy"] for row in mine]), paper])
        yield from table(["α", "16 frames", "accuracy", "paper, OSCC"], lines)
    lengths = [
        row for row in usual_task(from_scratch(rows), "frames") if (row["method"], row["keep_ratio"]) == ("rero", 0.3)
    ]
    by_length = grouped(lengths, lambda row: row["task"]["frames"])
    if len(by_length) > 1:
        yield "### 16 or 24 frames (Table 12), keep ratio 0.3"
        yield ""
        lines = []
        for frames, mine in by_length.items():
            paper = f"{TABLE_12[frames]} %†" if frames in TABLE_12 else "–"
            mflops = f"{1e3 * mine[0]['gflops']:.2f}"
            lines.append([str(frames), mflops, percent([row["accuracy"] for row in mine]), paper])
        yield from table(["frames", "MFLOPs", "accuracy", "paper, UCF101"], lines)


def _level(name: str, row: Row) -> tuple[float, str]:
    return row["task"][name], row["method"]


def failures(report: Report, rows: Sequence[Row], caption: str) -> None:
    """Camera motion, flicker, noise: from scratch, at 15 % of the tokens and with all."""
    names = {
        "camera": "camera, pixels a frame",
        "flicker": "flicker, % of the brightness",
        "noise": "noise, standard deviation of 255",
    }
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    lines = []
    for name, title in names.items():
        same = usual_task(from_scratch(rows), name)
        levels = grouped(
            [r for r in same if r["method"] == "all tokens" or (r["method"] == "rero" and r["keep_ratio"] == 0.15)],
            partial(_level, name),
        )
        if len({level for level, _ in levels}) < 2:
            continue
        for (level, method), mine in sorted(levels.items()):
            values = [row["accuracy"] for row in mine]
            scale = 100 if name == "flicker" else 1
            panels.setdefault(title, {}).setdefault(method, []).append((scale * level, values))
            lines.append([title, f"{scale * level:g}", figures.STYLES[method][2], percent(values)])
    if not panels:
        return
    report.add(["### Where it fails", ""])
    report.add(
        [
            "Change between neighbouring tubelets is all that ReRo looks at (here at 15 % of the tokens). Where "
            "everything changes, its choice says little about the action. All tokens are trained as long, with "
            "the same settings.",
            "",
        ]
    )
    report.draw(
        "motion-failures", figures.failures(panels, 1 / DIRECTIONS, f"motion task, {caption}"), "Where it fails"
    )
    report.add(table(["what", "how much", "tokens", "accuracy"], lines))


def loading(report: Report, folder: Path) -> None:
    """Clips a second of one data-loading worker."""
    found = documents(folder, "data_loading")
    if not found:
        return
    report.add(["## Data loading", "", "One worker, against decord, resizing and normalising in the worker.", ""])
    lines = [
        [
            f"{one['frames']}×{one['stride']}, {', '.join(one['videos'])}",
            *(f"{one[way]['clips_per_second']:.1f}" for way in ("usual", "everest")),
            f"{one['ratio']:.2f} ({one['ratio_quartiles'][0]:.2f}–{one['ratio_quartiles'][1]:.2f})",
        ]
        for document in found
        for one in document["results"]
    ]
    report.add(table(["clips", "usual, clips/s", "examples/clips.py, clips/s", "ratio"], lines))
    report.add(sources(found))


SECTIONS = (compute, training, selection_cost, motion, loading)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "RESULTS.md", help="figures go beside it")
    options = parser.parse_args(arguments)
    if not any(options.results.glob("*.json")):
        parser.error(f"--results: no JSON files in {options.results}")
    report = Report(options.out)
    report.add(
        [
            "# What was measured",
            "",
            "Written by `python benchmarks/report.py` from `benchmarks/results/*.json`; don't edit. A number was "
            "measured by the script and on the device that are named with it. **†: the paper's number, not measured "
            "here.**",
            "",
        ]
    )
    for section in tqdm(SECTIONS, desc="sections", unit="section"):
        section(report, options.results)
    report.write()
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
