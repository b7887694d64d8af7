"""Turns benchmarks/results/*.json into RESULTS.md and its figures. Nothing is measured here, and no number is typed in.

    python benchmarks/report.py

results/notes.md is included below the steps: what remains where a target is missed, and why. results/notes_NAME.md is
included where files *_NAME*.json are shown first: what must be known of how they were measured.

A number in RESULTS.md was measured by the named script on the named device, or it is the paper's and marked † so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import figures
from documents import RESULTS
from pages import Page, documents, on_gpu, rows_of
from report_camera import camera
from report_motion import motion
from report_steps import steps
from step_rows import circumstances, clips, model_of
from table_text import Row, grouped, number, table, with_quartiles
from targets import embedding_targets
from tqdm import tqdm


def compute(page: Page, folder: Path) -> None:
    """Tables 1, 5, 10, 11, 12, 15 and Figure 1 (a)."""
    for document in documents(folder, "gflops"):
        rows = document["figures"]
        worst, counter = (
            max((row[name] for row in rows), key=abs)
            for name in ("difference_percent", "from_flop_counter_mode_percent")
        )
        page.add(
            [
                "## GFLOPs of every table",
                "",
                "One forward of one clip, in multiply–accumulates of linear and attention products, which is what the "
                "paper calls GFLOPs. Models are on the meta device. "
                f"Largest difference from the paper: {worst:+.2f} % ({len(rows)} figures); from torch's own "
                f"`FlopCounterMode`: {counter:+.2f} %. "
                "Pre-training has decoder depth 4; VideoMAE's encoder sees 160 of 1568 tokens (392 at 75 %), EVEREST's "
                "156. Table 1's pre-training column is keep ratio 0.4, Tables 10, 12 and 15 are 0.3. ST-MAE's 46.1† "
                "and other methods' rows are not counted: their configuration isn't given.",
                "",
            ]
        )
        page.draw("gflops", figures.gflops(rows), "GFLOPs of VideoMAE and EVEREST, counted, beside the paper's")
        by_count = grouped(rows, lambda row: (row["phase"], row["size"], row["frames"], round(row["gflops"], 2)))
        titles = ["", "phase", "ρ_pre", "counted", "paper", "tables", "largest difference"]
        page.add(table(titles, map(gflops_cells, by_count.values())))
        page.cite([document])


def gflops_cells(same: list[Row]) -> list[str]:
    """What cost the same, whatever the paper's tables call it."""
    row = same[0]
    frames = "" if row["frames"] == 16 else f", {row['frames']} frames"
    names = dict.fromkeys(one["what"] for one in same)
    return [
        f"{' or '.join(names)}, ViT-{row['size']}{frames}",
        row["phase"],
        number(row["keep_ratio"], ".1f"),
        f"{row['gflops']:.2f}",
        ", ".join(dict.fromkeys(f"{one['paper']:g}†" for one in same)),
        ", ".join(sorted({one["table"] for one in same}, key=int)),
        f"{max((one['difference_percent'] for one in same), key=abs):+.2f} %",
    ]


def hosts(page: Page, folder: Path) -> None:
    """What other encoders save."""
    found = documents(folder, "hosts")
    if not found:
        return
    page.add(["## Other encoders of transformers", ""])
    for document in found:
        page.add(
            [
                f"Classifiers at keep ratio {document['keep_ratio']:g} as shares of the unpatched ones: "
                f"{document['layers']} blocks of ViT-B's widths, {clips(document)} of {document['frames']} frames "
                f"(TimeSformer half as many) of {document['image_size']}²; medians of {document['repeats']} pairs of "
                "runs, quartiles in brackets.",
                "",
            ]
        )
        lines = [
            [
                run["model"],
                str(run["tokens"]),
                number(run["flops_ratio"]),
                *(with_quartiles(run[kind]["ratio"], run[kind]["quartiles"]) for kind in ("training", "inference")),
            ]
            for run in document["runs"]
        ]
        page.add(table(["", "kept tokens", "multiply–accumulates", "time of a step", "time of a forward"], lines))
    page.cite(found)


def selection_cost(page: Page, folder: Path) -> None:
    """Selection's own cost, by distance."""
    found = documents(folder, "selection_cost")
    if not found:
        return
    page.add(
        [
            "## What selecting costs",
            "",
            "`policy.select` in whole (importance, top-k, the split into visible and target) and the gather of the "
            "kept embeddings, as a share of ReRo's step, measured in the same run, by distance; milliseconds for a "
            "batch, of l2. Embedding is the model's whole one of the clips, with distance l2: tubelets, selection, "
            "gather, positions; launches are its operators, those that only view memory aside, and on a GPU its "
            "kernels.",
            "",
        ]
    )
    page.add_notes_on(found, folder)
    rows = rows_of(found)
    names = list(dict.fromkeys(row["distance"] for row in rows))
    cases = grouped(rows, lambda row: (row["file"], model_of(row), circumstances(row)))
    titles = ["", *(f"share, {name}" for name in names), "importance", "top-k", "gather", "select"]
    lines = [selection_cells(mine, names) for mine in cases.values()]
    page.add(table([*titles, "embedding", "launches", "target"], lines))
    page.cite(found)


def selection_cells(mine: list[Row], names: list[str]) -> list[str]:
    """A case in one line: each distance's share, and the parts of the first one, which is l2."""
    by_name, row = {one["distance"]: one for one in mine}, mine[0]
    shares = [f"{by_name[name]['share']:.3%}" if name in by_name else "–" for name in names]
    parts = [f"{1e3 * row[f'{part}_seconds']:.2f}" for part in ("importance", "top_k", "gather", "select")]
    cells = [f"{model_of(row)}, {circumstances(row)}", *shares, *parts]
    if row.get("embedding_seconds") is None:
        return [*cells, "–", "–", ""]
    counts = [(row["embedding_operators"], "operators"), (row["embedding_kernels"], "kernels")]
    launched = ", ".join(f"{count} {what}" for count, what in counts if count is not None)
    target = "; ".join(map(str, embedding_targets(row, on_gpu(row))))
    return [*cells, f"{1e3 * row['embedding_seconds']:.2f}", launched or "–", target]


def packing(page: Page, folder: Path) -> None:
    """What it costs that clips keep different numbers of tokens."""
    found = documents(folder, "packing")
    if not found:
        return
    page.add(
        [
            "## What packing costs",
            "",
            "Clips of 7 to 64 % of their tokens behind each other, as a budget for each clip makes them, as shares of "
            "as many clips with equally many tokens in all: medians of pairs, quartiles in brackets.",
            "",
        ]
    )
    lines = [
        [
            f"{run['model']}, {document['layers']} blocks, {clips(document)} of {document['frames']}×"
            f"{document['image_size']}², {document['device']}, {document['dtype']}",
            f"{min(run['lengths'])}–{max(run['lengths'])}",
            number(run["flops_ratio"]),
            *(with_quartiles(run[kind]["ratio"], run[kind]["quartiles"]) for kind in ("training", "inference")),
            number(run["bytes_ratio"]),
        ]
        for document in found
        for run in document["runs"]
    ]
    titles = ["", "tokens of a clip", "multiply–accumulates", "time of a step", "time of a forward"]
    page.add(table([*titles, "saved for backward"], lines))
    page.cite(found)


def loading(page: Page, folder: Path) -> None:
    """Clips a second of one data-loading worker."""
    found = documents(folder, "data_loading")
    if not found:
        return
    page.add(["## Data loading", "", "One worker, against decord, resizing and normalising in the worker.", ""])
    lines = [
        [
            f"{one['frames']}×{one['stride']}, {', '.join(one['videos'])}",
            *(f"{one[way]['clips_per_second']:.1f}" for way in ("usual", "everest")),
            f"{one['ratio']:.2f} ({one['ratio_quartiles'][0]:.2f}–{one['ratio_quartiles'][1]:.2f})",
        ]
        for document in found
        for one in document["results"]
    ]
    page.add(table(["clips", "usual, clips/s", "examples/clips.py, clips/s", "ratio"], lines))
    page.cite(found)


def shards(page: Page, folder: Path) -> None:
    """Clips out of shards beside clips out of single files."""
    found = documents(folder, "shard_loading")
    if not found:
        return
    page.add(["### Out of shards", ""])
    for document in found:
        page.add(
            [
                f"The same videos in {document['shards']} shards of {document['videos_of_a_shard']} and as single "
                "files, in turn, both in the system's cache; clips a second of the process's processor time, medians, "
                "and of their pairs' ratios, quartiles in brackets.",
                "",
            ]
        )
        lines = [
            [
                run["video"],
                *(f"{run['clips_per_cpu_second'][way]:.1f}" for way in ("files", "shards")),
                f"{run['ratio']:.2f} ({run['ratio_quartiles'][0]:.2f}–{run['ratio_quartiles'][1]:.2f})",
            ]
            for run in document["runs"]
        ]
        page.add(table(["16×4 clips of", "files, clips/s", "shards, clips/s", "ratio"], lines))
    page.cite(found)


SECTIONS = (compute, steps, hosts, selection_cost, packing, camera, motion, loading, shards)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "RESULTS.md", help="figures go beside it")
    options = parser.parse_args(arguments)
    if not any(options.results.glob("*.json")):
        parser.error(f"--results: no JSON files in {options.results}")
    page = Page(options.out)
    page.add(
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
        section(page, options.results)
    page.add(["## How it was measured", "", *page.sources()])
    page.write()
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
