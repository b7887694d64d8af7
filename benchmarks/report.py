"""Turns benchmarks/results/*.json into RESULTS.md and its figures. Nothing is measured here, and no number is typed in.

    python benchmarks/report.py

results/notes.md is included below the targets: what remains where one is missed, and why.

A number in RESULTS.md was measured by the named script on the named device, or it is the paper's and marked † so.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
from documents import RESULTS
from motion_clips import DIRECTIONS, Task, share_with_motion
from step_cost import MEMORY_TARGETS, PHASES, SIZES, STEP_TARGET, targets_of
from tqdm import tqdm

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


def documents(folder: Path, stem: str) -> list[dict[str, Any]]:
    """The results files of one script, each with its name."""
    return [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob(f"{stem}*.json"))]


def rows_of(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Their runs, each knowing its device and file."""
    keys = ("device", "file", "world_size", "settings")
    for document in found:
        if "runs" not in document:
            raise ValueError(f"{document['file']} has no runs: written by an older script, measure again")
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


def training(report: Report, folder: Path) -> None:
    """Step time and memory: Figure 1 (b), Tables 3 to 5, sweeps, and the targets."""
    found = documents(folder, "step_cost")
    rows = mark_cases(rows_of(found))
    report.add(
        [
            "## Training steps",
            "",
            "Forward, backward and fused AdamW. Ratios are to the unpatched model: all tokens in fine-tuning, "
            "VideoMAE's 90 % tube mask in pre-training (decoder depth 4). Methods of a case take turns on one set of "
            "weights; a ratio is the median over the turns, quartiles in brackets. The limit is the ratio of forward "
            f"GFLOPs; the target is a step at most {STEP_TARGET} × that. Peaks are summed over the GPUs of a run. What "
            "a compiled graph saves for backward isn't counted; compiled, the unpatched pre-training model breaks its "
            "graph at its boolean masks, a patched one is one graph.",
            "",
        ]
    )
    for caption, mine in grouped(rows, circumstances).items():
        main = [row for row in mine if row["frames"] == 16 and row["usual"]]
        report.add([f"### {caption}", ""])
        name = slug(caption)
        fast = [row for row in main if not row["out_of_memory"] and row["step_ratio"] is not None]
        if fast:
            report.draw(f"speedup-{name}", figures.speedup(fast, caption), "Realised speed-up against the FLOPs' limit")
            largest = sorted(largest_batches(fast), key=lambda row: list(SIZES).index(row["size"]))
            if all(figures.memory_of(row) for row in largest):
                figure = figures.memory_by_size(largest, caption)
                report.draw(f"memory-{name}", figure, "Memory of a training step by size")
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
        sweeps(report, [row for row in mine if not row["out_of_memory"]], caption, name)
    report.add(targets(rows))
    notes = folder / "notes.md"
    if notes.is_file():
        report.add([*notes.read_text().splitlines(), ""])
    report.add(paper_tables([row for row in rows if row["usual"]]))
    report.add(table_3(rows))
    report.add(sources(found))


def mark_cases(rows: Sequence[Row]) -> list[Row]:
    """Number the cases, and mark those at the paper's keep ratios: a sweep measures the baseline anew in each case."""
    cases: list[list[Row]] = []
    for row in rows:
        cases += [[]] if row["baseline"] else []
        cases[-1].append(row)
    return [
        row | {"case": number, "usual": all(map(usual_ratio, case))}
        for number, case in enumerate(cases)
        for row in case
    ]


def model_of(row: Row) -> str:
    return f"ViT-{row['size']} {row['phase']}, {figures.clips(row)}"


def circumstances(row: Row) -> str:
    several = "" if row["world_size"] == 1 else f"{row['world_size']} × "
    return f"{several}{row['device']}, {row['dtype']}, {row['mode']}"


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
    spread = "" if low is None else f" ({number(low)}–{number(high)})"
    cells += [f"{row['median_seconds']:.3g}", f"{number(row['step_ratio'])}{spread}", f"{row['clips_per_second']:.3g}"]
    cells += [gigabytes(row["saved_bytes"]), number(row["saved_ratio"])]
    return [*cells, gigabytes(row["peak_allocated_bytes"])]


def largest_batches(rows: Sequence[Row]) -> list[Row]:
    """Of each size and phase the rows at the largest batch that all of its methods could run."""
    chosen: list[Row] = []
    for _, mine in grouped(rows, lambda r: (r["size"], r["phase"])).items():
        most = max(row["batch_size"] for row in mine)
        chosen += [row for row in mine if row["batch_size"] == most]
    return chosen


def sweeps(report: Report, rows: Sequence[Row], caption: str, name: str) -> None:
    """Time and memory against keep ratio, and against frames, where several were measured."""
    by_case = grouped(rows, lambda r: (r["file"], r["size"], r["batch_size"], r["frames"]))
    for (_, size, _, frames), mine in by_case.items():
        if len({row["keep_ratio"] for row in mine if row["method"] == "rero"}) > 2:
            title = f"{caption}; ViT-{size}, {figures.clips(mine[0])} of {frames} frames"
            figure = figures.sweep(mine, "keep_ratio", "keep ratio ρ_pre", title, lambda row: row["keep_ratio"] or 0)
            report.draw(f"keep-ratio-{size.lower()}-{name}", figure, "Time and memory of a step against the keep ratio")
    for (_, size, _), mine in grouped(rows, lambda r: (r["file"], r["size"], r["batch_size"])).items():
        paper = [row for row in mine if row["usual"]]
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
    lines, measured = [], set()
    for row in rows:
        for what, value, most, digits in targets_of(row):
            where = f"{model_of(row)}, {circumstances(row)}"
            met = value is not None and value <= most
            cells = ["out of memory" if value is None else format(value, digits), "met" if met else "**missed**"]
            lines.append([where, what, f"≤ {most:{digits}}", *cells])
            if what.startswith("peak"):
                measured.add((row["phase"], row["size"], row["batch_size"]))
    yield from table(["where", "what", "target", "measured", ""], lines)
    missing = [
        f"ViT-{size} {phase} at {batch} clips a GPU ≤ {most / 1e9:g} GB"
        for (phase, size, batch), most in MEMORY_TARGETS.items()
        if (phase, size, batch) not in measured
    ]
    if missing:
        yield (
            f"Not measured yet, for want of a GPU: peaks in bfloat16 ({', '.join(missing)})"
            + ("" if measured else ", and the ratios of step time there")
            + ". `python benchmarks/step_cost.py --sizes B L --batch-sizes 16 32 --dtypes bfloat16` measures them on "
            "one, `benchmarks/slurm/step_cost.sbatch` Table 3 on a node."
        )
        yield ""


def paper_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Tables 3, 4 and 5: ours beside the paper's ratios, which other devices, precisions and batches gave."""
    yield "### Beside Tables 3, 4 and 5"
    yield ""
    yield (
        "ReRo's share of the unpatched model's time and memory. The paper's were measured on nodes of eight A6000s "
        "(Table 4) and A100s (Table 3), ours on what stands in the line; memory is what is saved for backward where no "
        "allocator's peak was measured. Table 4's time is that of an epoch. Table 3 at a batch of 256 is Table 1's "
        "memory, whose GFLOPs are those of keep ratio 0.4; ours is 0.3."
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
    for mine in grouped([row for row in rows if row["frames"] == 16], lambda row: row["case"]).values():
        for row in mine:
            if row["method"] == "rero" and row["step_ratio"] is not None:
                own, its = figures.memory_of(row), figures.memory_of(mine[0])
                where = f"{model_of(row)}, {circumstances(row)}"
                lines.append([where, number(row["step_ratio"]), number(own / its if own and its else None)])
    yield from table(["", "time", "memory"], lines)


def table_3(rows: Sequence[Row]) -> Iterator[str]:
    """Table 3 where GPUs were measured: memory over all of them by effective batch size."""
    measured = [
        row
        for row in rows
        if row["phase"] == "pre-training" and row["usual"] and row["frames"] == 16 and row["mode"] == "eager"
        if (row["method"], row["size"]) in TABLE_3 and (row["peak_allocated_bytes"] or row["out_of_memory"])
        if "CPU" not in row["device"]
    ]
    for where, mine in grouped(measured, circumstances).items():
        batches = sorted({row["world_size"] * row["batch_size"] for row in mine})
        yield f"### Table 3 on {where}: GB allocated over all GPUs, by effective batch size"
        yield ""
        lines = []
        for (method, size), paper in TABLE_3.items():
            own = {
                row["world_size"] * row["batch_size"]: "OOM"
                if row["out_of_memory"]
                else f"{row['peak_allocated_bytes'] / 1e9:.1f}"
                for row in mine
                if (row["method"], row["size"]) == (method, size)
            }
            quoted = dict(zip(EFFECTIVE_BATCHES, ("OOM" if gb is None else f"{gb:g}" for gb in paper), strict=True))
            cells = [own.get(batch, "–") + (f" ({quoted[batch]}†)" if batch in quoted else "") for batch in batches]
            lines.append([f"{figures.STYLES[method][2]}, ViT-{size}", *cells])
        yield from table(["", *map(str, batches)], lines)


def selection_cost(report: Report, folder: Path) -> None:
    """Selection's own cost, by distance."""
    found = documents(folder, "selection_cost")
    if not found:
        return
    report.add(
        [
            "## What selecting costs",
            "",
            "`policy.select` in whole (importance, top-k, the split into visible and target) and the gather of the "
            "kept embeddings, as a share of ReRo's training step, measured in the same run; milliseconds for a batch.",
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
    for document in documents(folder, "motion_accuracy"):
        motion_document(report, document)


def motion_document(report: Report, document: dict[str, Any]) -> None:
    """One file, so one device and the same settings for all; another file is another section."""
    found = [document]
    everything = rows_of(found)
    rows = [row for row in everything if row["steps"] is None]
    long = [row for row in everything if row["steps"] is not None]
    caption = found[0]["device"]
    report.add(
        [
            f"## Does the selection carry the signal? ({document['device']})",
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
    name = "" if document["file"] == "motion_accuracy.json" else "-" + slug(document["file"].removesuffix(".json"))
    report.draw("motion-clips", clips, "Clips of the motion task, and the 15 % of the tokens that change most")
    keep_ratios(report, usual_task(from_scratch(rows)), long, caption, name)
    report.add(ablations(rows))
    failures(report, rows, caption, name)
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


def keep_ratios(report: Report, rows: Sequence[Row], long: Sequence[Row], caption: str, suffix: str) -> None:
    """Figure 5 and Table 10: accuracy against the share of the tokens."""
    if not rows:
        return
    groups: dict[str, list[Any]] = {}
    lines = []
    shown = [row for row in rows if row["method"] in figures.STYLES]  # not the distances
    order = sorted(shown, key=lambda row: (list(figures.STYLES).index(row["method"]), row["keep_ratio"] or 1))
    for (method, keep_ratio), mine in grouped(order, lambda r: (r["method"], r["keep_ratio"])).items():
        first, values = mine[0], [row["accuracy"] for row in mine]
        groups.setdefault(method, []).append((1e3 * first["gflops"], mine))
        share = f"{first['kept']}/{first['tokens']}"
        cells = [number(keep_ratio, ".2f"), share, f"{1e3 * first['gflops']:.2f}", percent(values)]
        lines.append([figures.STYLES[method][2], *cells])
    steps = rows[0]["curve"][-1][0]
    report.add([f"### Accuracy against GFLOPs (Figure 5, Table 10), {steps} steps of training", ""])
    figure = figures.accuracy(groups, 1 / DIRECTIONS, f"motion task, {caption}; shaded: least to largest of the seeds")
    report.draw(f"motion-accuracy{suffix}", figure, "Accuracy against MFLOPs, and while training")
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
        yield "### ReRo or running cells in pre-training, then fine-tuning (Table 17)"
        yield ""
        names = {"none": "none", "running cell": "running cell (V2)", "rero": "ReRo"}
        lines = [
            [
                name,
                percent(of(pretrained, pretraining=pretraining, method="all tokens")),
                percent(of(pretrained, pretraining=pretraining, method="rero", keep_ratio=0.3)),
                f"{TABLE_17[pretraining]} %†" if pretraining in TABLE_17 else "–",
            ]
            for pretraining, name in names.items()
        ]
        yield from table(["pre-training", "with all tokens", "with ReRo, 30 %", "paper, UCF101"], lines)
    windows = [row for row in rows if row["window"] is not None]
    if windows:
        yield "### InfoFrameSampler: the action fills a third of a video of 48 frames (Table 13)"
        yield ""
        yield (
            "A longer window holds more of the action, whoever draws from it: `best possible` is what a perfect model "
            "would reach, since a window without motion leaves a guess among eight. The sampler's own part is its "
            "distance to uniform draws from the same window. With a sampler all candidates are embedded, which the "
            "MFLOPs include."
        )
        yield ""
        lines = []
        by_window = grouped(windows, lambda r: (r["window"], r["every"], r["uniform"], r["alpha"]))
        for (window, every, uniform, alpha), mine in sorted(by_window.items(), key=lambda item: item[0][:3]):
            how = "drawn uniformly from" if uniform else "drawn by their kept tokens from" if alpha else "all"
            how = f"every second of {window}" if every == 2 else f"{how} {window}"
            paper = f"{TABLE_13[alpha]} %†" if every == 1 and not uniform and alpha in TABLE_13 else "–"
            seen = share_with_motion(Task(**mine[0]["task"]), window)
            best, mflops = f"{seen + (1 - seen) / DIRECTIONS:.1%}", f"{1e3 * mine[0]['gflops']:.2f}"
            lines.append([number(alpha, ".1f"), how, mflops, percent([row["accuracy"] for row in mine]), best, paper])
        yield from table(["α", "16 frames", "MFLOPs", "accuracy", "best possible", "paper, OSCC"], lines)
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


def failures(report: Report, rows: Sequence[Row], caption: str, suffix: str) -> None:
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
    report.add(
        [
            "### Harder clips: camera motion, flicker, noise",
            "",
            "ReRo looks at change between neighbouring tubelets and at nothing else, here at 15 % of the tokens. Both "
            "lines fall as the task gets harder; what selection costs shows in the distance between them. All tokens "
            "are trained for the same steps, at the end of which some still improve (the curves are in the JSON).",
            "",
        ]
    )
    figure = figures.failures(panels, 1 / DIRECTIONS, f"motion task, {caption}")
    report.draw(f"motion-failures{suffix}", figure, "Accuracy under camera motion, flicker and noise")
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
