"""What a step costs, in RESULTS.md: times, memory and targets by device, sweeps, and the paper's Tables 3 to 5."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import figures
from cases import PHASES, SIZES
from pages import Page, documents, on_gpu, rows_of
from step_rows import NAMES, circumstances, clips, mark_cases, memory_of, step_table
from table_text import Row, grouped, number, table
from targets import STEP_TARGET, unmeasured

# Whole-node figures of the paper: Table 3 (pre-training, GB over eight A100s by effective batch size; None is out of
# memory), Table 4 (ViT-B, pre-training, batch of 128) and Table 5 (ViT-B, fine-tuning, 128). Quoted, always marked †.
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
INTRODUCTION = f"""## What a step costs

In training forward, backward and fused AdamW, in inference a classifier's forward alone. A line says what the kept \
tokens make of the unpatched model's step, of all tokens in fine-tuning and inference, of VideoMAE's 90 % tube mask in \
pre-training (decoder depth 4). Where no other method is named, ReRo chooses. Methods of a case take turns on one set \
of weights; a share is the median over the turns, quartiles in brackets. The target is a step's share of at most \
{STEP_TARGET} × the GFLOPs', and on a GPU what stands in the line. Peaks are summed over the GPUs of a run. What a \
compiled graph saves for backward isn't counted; compiled, the unpatched pre-training model breaks its graph at its \
boolean masks, a patched one is one graph. Of a case that was measured again on a device the newest stands. \
`train_step.py` in a command is `step_cost.py` by its former name.
"""
BESIDE = """### The paper's Tables 3, 4 and 5

EVEREST's share of VideoMAE's time and memory, to be held against the ratios above, which other devices, precisions \
and batches gave. They were measured on nodes of eight A6000s (Table 4) and A100s (Table 3), of whose memory an \
eighth is given here; Table 5 doesn't say on how many. Table 4's time is that of an epoch. Table 3 at a batch of 256 \
is Table 1's memory, whose GFLOPs are those of keep ratio 0.4; ours is 0.3.
"""


def steps(page: Page, folder: Path) -> None:
    found = documents(folder, "step_cost")
    everything = mark_cases(rows_of(found))
    rows = newest(everything)
    page.add([*INTRODUCTION.splitlines(), ""])
    page.add_notes_on(found, folder)
    for phase in PHASES:
        mine = [row for row in rows if row["phase"] == phase]
        for more, usual in (("", True), (": other keep ratios and lengths", False)):
            shown = [row for row in mine if (row["usual"] and row["frames"] == 16) == usual]
            if shown:
                page.add([f"### {phase.capitalize()}{more}", "", *step_table(shown, on_gpu)])
    for caption, mine in grouped(everything, circumstances).items():  # a sweep is of one run
        pictures(page, [row for row in mine if not row["out_of_memory"]], caption)
    selections = rows_of(documents(folder, "selection_cost"))
    missing = list(unmeasured(filter(on_gpu, rows), filter(on_gpu, selections)))
    if missing:
        page.add(["Not measured yet, in bfloat16 on one GPU (`benchmarks/gpu.sh` measures them all):", ""])
        page.add([*(f"- {one}" for one in missing), ""])
    page.add_notes([folder / "notes.md"])
    page.add(paper_tables())
    page.add(table_3(rows))
    page.cite(found)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Each method of a case once for each device, precision and mode, with the baseline of its own run."""
    last: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        last[_case_of(row)] = row
    shown = {id(row) for row in last.values() if not row["baseline"]}
    cases = {row["case"] for row in last.values() if id(row) in shown}
    return [row for row in rows if id(row) in shown or (row["baseline"] and row["case"] in cases)]


def _case_of(row: Row) -> tuple[Any, ...]:
    names = ("size", "phase", "frames", "image_size", "batch_size", "method", "keep_ratio")
    return (circumstances(row), row.get("cuda_graphs"), *(row[name] for name in names))


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def pictures(page: Page, rows: Sequence[Row], caption: str) -> None:
    """Figure 1 (b) at the paper's keep ratios, and sweeps of keep ratios and lengths, where several were measured."""
    name = slug(caption)
    main = [row for row in rows if row["frames"] == 16 and row["usual"] and row["step_ratio"] is not None]
    if len({(row["size"], row["phase"]) for row in main}) > 1:  # one pair of numbers needs no picture
        if any(not row["baseline"] for row in main):
            alt = "How much faster a step is, against the ratio of products"
            page.draw(f"speedup-{name}", figures.speedup(main, caption), alt)
        largest = sorted(largest_batches(main), key=lambda row: list(SIZES).index(row["size"]))
        largest = [row for row in largest if memory_of(row)]
        if largest:
            page.draw(f"memory-{name}", figures.memory_by_size(largest, caption), "Memory of a step by size")
    for (_, size, _, frames), mine in grouped(
        rows, lambda row: (row["file"], row["size"], row["batch_size"], row["frames"])
    ).items():
        if len({row["keep_ratio"] for row in mine if row["method"] == "rero"}) > 2:
            title = f"{caption}; ViT-{size}, {clips(mine[0])} of {frames} frames"
            figure = figures.sweep(mine, "keep_ratio", "keep ratio ρ_pre", title)
            page.draw(f"keep-ratio-{size.lower()}-{name}", figure, "Time and memory of a step against the keep ratio")
    for (_, size, _), mine in grouped(rows, lambda row: (row["file"], row["size"], row["batch_size"])).items():
        paper = [row for row in mine if row["usual"]]
        if len({row["frames"] for row in paper}) > 2:
            figure = figures.sweep(paper, "frames", "frames of a clip", f"{caption}; ViT-{size}, {clips(mine[0])}")
            page.draw(f"frames-{size.lower()}-{name}", figure, "Time and memory of a step against the number of frames")


def largest_batches(rows: Sequence[Row]) -> list[Row]:
    """Of each phase the rows at the largest batch that all sizes ran; without one, at the largest of each size."""
    chosen: list[Row] = []
    for mine in grouped(rows, lambda row: row["phase"]).values():
        by_size = grouped(mine, lambda row: row["size"])
        batches = {size: {row["batch_size"] for row in its} for size, its in by_size.items()}
        shared = set.intersection(*batches.values())
        chosen += [row for row in mine if row["batch_size"] == max(shared or batches[row["size"]])]
    return chosen


def paper_tables() -> Iterator[str]:
    yield from (*BESIDE.splitlines(), "")
    seconds, memory = (after / before for before, after in (TABLE_4["seconds"], TABLE_4["memory"]))
    share = TABLE_5["memory"][1] / TABLE_5["memory"][0]
    node = eighths(*TABLE_4["memory"])
    lines = [["Table 4: ViT-B, pre-training, batch of 128", f"{seconds:.3f}†", f"{memory:.3f}†", f"{node}†"]]
    lines.append(["Table 5: ViT-B, fine-tuning, batch of 128", "–", f"{share:.3f}†", "–"])
    for size in "SBL":
        pairs = list(zip(TABLE_3["videomae", size], TABLE_3["rero", size], strict=True))
        shares = ", ".join(number(after / before) if before else "VideoMAE out of memory" for before, after in pairs)
        batches, node = ", ".join(map(str, EFFECTIVE_BATCHES)), ", ".join(eighths(*pair) for pair in pairs)
        lines.append([f"Table 3: ViT-{size}, pre-training, batches of {batches}", "–", f"{shares}†", f"{node}†"])
    yield from table(["", "time", "memory", "GB a device"], lines)


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
                row["world_size"] * row["batch_size"]: out_of_memory_or(row["peak_allocated_bytes"], 1e9)
                for row in mine
                if (row["method"], row["size"]) == (method, size)
            }
            quoted = dict(zip(EFFECTIVE_BATCHES, (out_of_memory_or(gb) for gb in paper), strict=True))
            cells = [own.get(batch, "–") + (f" ({quoted[batch]}†)" if batch in quoted else "") for batch in batches]
            lines.append([f"{NAMES[method]}, ViT-{size}", *cells])
        yield from table(["", *map(str, batches)], lines)


def out_of_memory_or(value: float | None, unit: float = 1.0) -> str:
    return "OOM" if value is None else f"{value / unit:.1f}"
