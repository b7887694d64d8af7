"""Turns benchmarks/results/*.json into RESULTS.md and its figures. Nothing is measured here, and no number is typed in.

    python benchmarks/report.py

results/notes.md is included below the targets: what remains where one is missed, and why. results/notes_NAME.md is
included where files *_NAME*.json are shown: what must be known of how they were measured.

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
from selection_cost import EMBEDDING_TARGET
from selection_cost import targets_of as embedding_targets_of
from step_cost import MEMORY_TARGETS, PHASES, SIZES, STEP_TARGET, STEP_TARGETS, targets_of
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
    """The results files of one script, each with its name; a GPU's come first."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob(f"{stem}*.json"))]
    return sorted(found, key=lambda document: not on_gpu(document))


def on_gpu(measured: dict[str, Any]) -> bool:
    """Whether a file or a row was measured on a GPU; what was counted from shapes has no device."""
    return not str(measured.get("device", "CPU")).startswith("CPU")


def notes_on(found: Iterable[dict[str, Any]], folder: Path) -> Iterator[str]:
    """The notes on files of one name, once for all of them."""
    files = [document["file"] for document in found]
    for path in sorted(folder.glob("notes_*.md")):
        name = path.stem.removeprefix("notes_")
        if any(f"_{name}" in file for file in files):
            yield from [*path.read_text().splitlines(), ""]


def rows_of(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Their runs, each knowing its device and file."""
    keys = ("device", "file", "world_size", "settings", "versions")
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


def versions_of(measured: dict[str, Any]) -> str:
    """Of what a time depends on."""
    names = ("torch", "transformers")
    return ", ".join(f"{name} {measured['versions'][name]}" for name in names if name in measured["versions"])


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


def steps(report: Report, folder: Path) -> None:
    """Step time and memory: Figure 1 (b), Tables 3 to 5, sweeps, and the targets."""
    found = documents(folder, "step_cost")
    rows = mark_cases(rows_of(found))
    report.add(
        [
            "## What a step costs",
            "",
            "In training forward, backward and fused AdamW, in inference a classifier's forward alone. Ratios are to "
            "the unpatched model: all tokens in fine-tuning and inference, VideoMAE's 90 % tube mask in pre-training "
            "(decoder depth 4). Methods of a case take turns on one set of weights; a ratio is the median over the "
            "turns, quartiles in brackets. The limit is the ratio of forward GFLOPs; the target is a step at most "
            f"{STEP_TARGET} × that, and on a GPU what stands below. Peaks are summed over the GPUs of a run. What a "
            "compiled graph saves for backward isn't counted; compiled, the unpatched pre-training model breaks its "
            "graph at its boolean masks, a patched one is one graph. `train_step.py` in a command is `step_cost.py` "
            "by its former name.",
            "",
        ]
    )
    report.add(notes_on(found, folder))
    for caption, mine in grouped(rows, circumstances).items():
        main = [row for row in mine if row["frames"] == 16 and row["usual"]]
        report.add([f"### {caption}", ""])
        report.add(sources([one for one in found if one["file"] in {row["file"] for row in mine}]))
        name = slug(caption)
        fast = [row for row in main if not row["out_of_memory"] and row["step_ratio"] is not None]
        several = len({(row["size"], row["phase"]) for row in fast}) > 1  # one pair of numbers needs no picture
        if several and any(not row["baseline"] for row in fast):
            report.draw(f"speedup-{name}", figures.speedup(fast, caption), "Realised speed-up against the FLOPs' limit")
        largest = sorted(largest_batches(fast), key=lambda row: list(SIZES).index(row["size"]))
        largest = [row for row in largest if figures.memory_of(row)]
        if several and largest:
            report.draw(f"memory-{name}", figures.memory_by_size(largest, caption), "Memory of a step by size")
        report.add(step_table(main))
        others = [row for row in mine if row not in main]
        if others:
            report.add(["Other keep ratios and clips of other lengths:", ""])
            report.add(step_table(others))
        sweeps(report, [row for row in mine if not row["out_of_memory"]], caption, name)
    report.add(targets(rows, rows_of(documents(folder, "selection_cost"))))
    notes = folder / "notes.md"
    if notes.is_file():
        report.add([*notes.read_text().splitlines(), ""])
    report.add(paper_tables([row for row in rows if row["usual"]]))
    report.add(table_3(rows))


def mark_cases(rows: Sequence[Row]) -> list[Row]:
    """Number the cases, and mark those at the paper's keep ratios: a sweep measures the baseline anew in each case."""
    cases: list[list[Row]] = []
    for row in rows:
        cases += [[]] if row["baseline"] else []
        cases[-1].append(row)
    return [
        row | {"case": number, "usual": all(map(usual_ratio, case)), "memory_ratio": memory_ratio(row, case[0])}
        for number, case in enumerate(cases)
        for row in case
    ]


def memory_ratio(row: Row, baseline: Row) -> float | None:
    """The row's share of the baseline's memory: of the allocator's peak, or of what is saved for backward."""
    own, its = figures.memory_of(row), figures.memory_of(baseline)
    return own / its if own and its else None


def model_of(row: Row) -> str:
    frames = f" of {row['frames']} frames" if row.get("frames", 16) != 16 else ""
    return f"ViT-{row['size']} {row['phase']}, {figures.clips(row)}{frames}"


def circumstances(row: Row) -> str:
    several = "" if row["world_size"] == 1 else f"{row['world_size']} × "
    return f"{several}{row['device']}, {row['dtype']}, {row['mode']}"


def usual_ratio(row: Row) -> bool:
    """Whether a method runs at the paper's keep ratio, or at one of its own."""
    return row["method"] not in ("rero", "random") or row["keep_ratio"] == PHASES[row["phase"]][1]


def step_table(rows: Sequence[Row]) -> Iterator[str]:
    """Seconds, or milliseconds where no step takes a second."""
    short = all(row["median_seconds"] < 1 for row in rows if not row["out_of_memory"])
    unit, scale = ("ms", 1e3) if short else ("s", 1)
    titles = ["", "ρ", "kept", "GFLOPs", "ratio", f"step, {unit}", "ratio", "clips/s"]
    titles += ["saved for backward, GB", "ratio", "peak, GB", "ratio"]
    yield from table(titles, (step_cells(row, scale) for row in rows))


def step_cells(row: Row, scale: float) -> list[str]:
    what = f"{model_of(row)}, {figures.STYLES[row['method']][2]}"
    what += " (without CUDA graphs)" if row.get("cuda_graphs") is False else ""
    cells = [what, number(row["keep_ratio"], ".2f"), f"{row['kept']}/{row['tokens']}"]
    cells += [f"{row['gflops']:.1f}", number(row["gflops_ratio"])]
    if row["out_of_memory"]:
        return [*cells, "out of memory", *["–"] * 6]
    low, high = row["step_ratio_quartiles"] or (None, None)
    spread = "" if low is None else f" ({number(low)}–{number(high)})"
    cells += [figures.three_digits(scale * row["median_seconds"]), f"{number(row['step_ratio'])}{spread}"]
    cells += [figures.three_digits(row["clips_per_second"]), gigabytes(row["saved_bytes"]), number(row["saved_ratio"])]
    peak = row["peak_allocated_bytes"]
    return [*cells, gigabytes(peak), number(None if peak is None else row["memory_ratio"])]


def largest_batches(rows: Sequence[Row]) -> list[Row]:
    """Of each phase the rows at the largest batch that all sizes ran; without one, at the largest of each size."""
    chosen: list[Row] = []
    for mine in grouped(rows, lambda r: r["phase"]).values():
        batches = {size: {row["batch_size"] for row in its} for size, its in grouped(mine, lambda r: r["size"]).items()}
        shared = set.intersection(*batches.values())
        chosen += [row for row in mine if row["batch_size"] == max(shared or batches[row["size"]])]
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


def targets(rows: Sequence[Row], selections: Sequence[Row]) -> Iterator[str]:
    """Every target that was measured, met or missed, and which were not measured."""
    yield "### Targets"
    yield ""
    found = [(row, target) for row in rows for target in targets_of(row, on_gpu(row))]
    found += [(row, target) for row in selections for target in embedding_targets_of(row, on_gpu(row))]
    lines = []
    for row, (what, value, most, digits) in found:
        where = f"{model_of(row)}, {circumstances(row)}"
        where += "" if row["keep_ratio"] == PHASES[row["phase"]][1] else f", keep ratio {row['keep_ratio']:g}"
        met = value is not None and value <= most
        cells = ["out of memory" if value is None else format(value, digits), "met" if met else "**missed**"]
        lines.append([where, what, f"≤ {most:{digits}}", *cells])
    yield from table(["where", "what", "target", "measured", ""], lines)
    yield from unmeasured([(row, what) for row, (what, *_) in found if on_gpu(row) and row["dtype"] == "bfloat16"])


def unmeasured(found: Sequence[tuple[Row, str]]) -> Iterator[str]:
    """The targets that are set for a GPU and that no row has."""
    places = {(row["phase"], row["size"], row["batch_size"], row["keep_ratio"], row["mode"]) for row, _ in found}
    peaks = {(row["phase"], row["size"], row["batch_size"]) for row, what in found if what.startswith("peak")}
    missing = [
        f"{phase}, ViT-{size}, {clips} clips, keep ratio {ratio}, {mode}: step ≤ {most} of the unpatched model's"
        for (phase, size, clips, ratio, mode), most in STEP_TARGETS.items()
        if (phase, size, clips, ratio, mode) not in places
    ]
    missing += [
        f"{phase}, ViT-{size}, {clips} clips: peak ≤ {most / 1e9:.2f} GB"
        for (phase, size, clips), most in MEMORY_TARGETS.items()
        if (phase, size, clips) not in peaks
    ]
    if not any(what.startswith("embedding") for _, what in found):
        missing.append(f"embedding and selection, ViT-B, 32 clips: ≤ {1e3 * EMBEDDING_TARGET:g} ms")
    if missing:
        yield "Not measured yet, in bfloat16 on one GPU (`benchmarks/gpu.sh` measures them all):"
        yield ""
        yield from (f"- {one}" for one in missing)
        yield ""


def paper_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Tables 3, 4 and 5: ours beside the paper's, which other devices, precisions and batches gave."""
    yield "### Beside Tables 3, 4 and 5"
    yield ""
    yield (
        "ReRo's share of the unpatched model's time and memory, and both models' memory on one device and clips a "
        "second. The paper's were measured on nodes of eight A6000s (Table 4) and A100s (Table 3), of whose memory an "
        "eighth is given here; Table 5 doesn't say on how many. Ours were measured on what stands in the line; the "
        "ratio of memory is of what is saved for backward where no allocator's peak was measured. Table 4's time is "
        "that of an epoch. Table 3 at a batch of 256 is Table 1's memory, whose GFLOPs are those of keep ratio 0.4; "
        "ours is 0.3."
    )
    yield ""
    seconds, memory = (after / before for before, after in (TABLE_4["seconds"], TABLE_4["memory"]))
    share = TABLE_5["memory"][1] / TABLE_5["memory"][0]
    node, cards = f"{eighths(*TABLE_4['memory'])}†", "8 × A6000†"
    lines = [["Table 4: ViT-B, pre-training, batch of 128", f"{seconds:.3f}†", f"{memory:.3f}†", node, "–", cards]]
    lines.append(["Table 5: ViT-B, fine-tuning, batch of 128", "–", f"{share:.3f}†", "–", "–", "–"])
    for size in "SBL":
        pairs = list(zip(TABLE_3["videomae", size], TABLE_3["rero", size], strict=True))
        shares = ", ".join(number(a / b) if b else "VideoMAE out of memory" for b, a in pairs)
        batches, node = ", ".join(map(str, EFFECTIVE_BATCHES)), ", ".join(eighths(*pair) for pair in pairs)
        what = f"Table 3: ViT-{size}, pre-training, batches of {batches}"
        lines.append([what, "–", f"{shares}†", f"{node}†", "–", "8 × A100†"])
    trained = [row for row in rows if row["frames"] == 16 and row["phase"] != "inference"]
    for baseline, *others in grouped(trained, lambda row: row["case"]).values():
        for row in others:
            if row["method"] == "rero" and row["step_ratio"] is not None:
                both = [one["peak_allocated_bytes_per_device"] for one in (baseline, row)]
                node = " → ".join(map(gigabytes, both)) if all(both) else "–"
                clips = " → ".join(figures.three_digits(one["clips_per_second"]) for one in (baseline, row))
                ratios = map(number, (row["step_ratio"], row["memory_ratio"]))
                lines.append([model_of(row), *ratios, node, clips, f"{circumstances(row)}; {versions_of(row)}"])
    yield from table(["", "time", "memory", "GB a device", "clips/s", "device and versions"], lines)


def eighths(before: float | None, after: float) -> str:
    """GB on each of a node's eight devices."""
    return f"{'OOM' if before is None else format(before / 8, '.1f')} → {after / 8:.1f}"


def table_3(rows: Sequence[Row]) -> Iterator[str]:
    """Table 3 where several GPUs were measured: memory over all of them by effective batch size."""
    measured = [
        row
        for row in rows
        if row["phase"] == "pre-training" and row["usual"] and row["frames"] == 16 and row["mode"] == "eager"
        if (row["method"], row["size"]) in TABLE_3 and (row["peak_allocated_bytes"] or row["out_of_memory"])
        if on_gpu(row) and row["world_size"] > 1
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
            "kept embeddings, as a share of ReRo's step, measured in the same run; milliseconds for a batch. "
            "Embedding is the model's whole one of the clips, with distance l2: tubelets, selection, gather, "
            "positions; launches are its operators, those that only view memory aside, and on a GPU its kernels.",
            "",
        ]
    )
    report.add(notes_on(found, folder))

    def cells(row: Row) -> list[str]:
        where = f"{model_of(row)}, {circumstances(row)}"
        parts = [f"{1e3 * row[f'{part}_seconds']:.2f}" for part in ("importance", "top_k", "gather", "select")]
        cells = [where, row["distance"], *parts, f"{row['share']:.3%}"]
        if row["distance"] != "l2" or row.get("embedding_seconds") is None:
            return [*cells, "–", "–"]
        counts = [(row["embedding_operators"], "operators"), (row["embedding_kernels"], "kernels")]
        launched = ", ".join(f"{count} {what}" for count, what in counts if count is not None)
        return [*cells, f"{1e3 * row['embedding_seconds']:.2f}", launched or "–"]

    titles = ["", "distance", "importance", "top-k", "gather", "select", "share of the step", "embedding", "launches"]
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


SECTIONS = (compute, steps, selection_cost, motion, loading)


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
