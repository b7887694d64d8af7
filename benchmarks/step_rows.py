"""How the rows of step_cost.py read: which model ran, in which case, and its numbers as a line of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cases import PHASES
from table_text import Row, gigabytes, number, table, three_digits, with_quartiles
from targets import step_targets

NAMES = {
    "rero": "EVEREST (ReRo)",
    "rero first": "ReRo, first step whole",
    "rero middle": "ReRo, middle step whole",
    "rero compensated": "ReRo, camera compensated",
    "random": "random (ST-MAE)",
    "tube": "tube (VideoMAE)",
    "running cell": "running cell (V2)",
    "energy": "energy budget",
    "run length": "run length (RLT)",
    "ascending": "least changed",
    "all tokens": "all tokens",
    "videomae": "VideoMAE, 90 % tube",
}
TITLES = ("", "ρ", "kept", "GFLOPs", "ratio", "step, {unit}", "ratio", "clips/s")
TITLES += ("saved for backward, GB", "ratio", "peak, GB", "ratio", "target")


def clips(row: Row) -> str:
    return f"{row['batch_size']} clip{'' if row['batch_size'] == 1 else 's'}"


def model_of(row: Row) -> str:
    frames = f" of {row['frames']} frames" if row.get("frames", 16) != 16 else ""
    return f"ViT-{row['size']} {row['phase']}, {clips(row)}{frames}"


def circumstances(row: Row) -> str:
    several = "" if row["world_size"] == 1 else f"{row['world_size']} × "
    return f"{several}{row['device']}, {row['dtype']}, {row['mode']}"


def usual_ratio(row: Row) -> bool:
    """Whether a method runs at the paper's keep ratio, or at one of its own."""
    return row["method"] not in ("rero", "random") or row["keep_ratio"] == PHASES[row["phase"]][1]


def memory_of(row: Row) -> float | None:
    """Bytes: the allocator's peak where there is one, else what is saved for backward."""
    peak = row["peak_allocated_bytes"]
    return row["saved_bytes"] if peak is None else peak


def mark_cases(rows: Sequence[Row]) -> list[Row]:
    """Number the cases, mark those at the paper's keep ratios, and take each row's share of its baseline's memory."""
    cases: list[list[Row]] = []
    for row in rows:
        cases += [[]] if row["baseline"] else []
        cases[-1].append(row)
    return [
        row | {"case": number, "usual": all(map(usual_ratio, case)), "memory_ratio": _share(row, case[0])}
        for number, case in enumerate(cases)
        for row in case
    ]


def _share(row: Row, baseline: Row) -> float | None:
    own, its = memory_of(row), memory_of(baseline)
    return own / its if own and its else None


def step_table(rows: Sequence[Row], gpu: bool) -> Iterator[str]:
    """Rows of `mark_cases`, in seconds, or milliseconds where no step takes a second."""
    short = all(row["median_seconds"] < 1 for row in rows if not row["out_of_memory"])
    unit, scale = ("ms", 1e3) if short else ("s", 1)
    yield from table([title.format(unit=unit) for title in TITLES], [_cells(row, scale, gpu) for row in rows])


def _cells(row: Row, scale: float, gpu: bool) -> list[str]:
    what = f"{model_of(row)}, {NAMES[row['method']]}"
    what += " (without CUDA graphs)" if row.get("cuda_graphs") is False else ""
    cells = [what, number(row["keep_ratio"], ".2f"), f"{row['kept']}/{row['tokens']}"]
    cells += [f"{row['gflops']:.1f}", number(row["gflops_ratio"])]
    target = "; ".join(map(str, step_targets(row, gpu)))
    if row["out_of_memory"]:
        return [*cells, "out of memory", *["–"] * 6, target]
    cells += [
        three_digits(scale * row["median_seconds"]),
        with_quartiles(row["step_ratio"], row["step_ratio_quartiles"]),
    ]
    cells += [three_digits(row["clips_per_second"]), gigabytes(row["saved_bytes"]), number(row["saved_ratio"])]
    peak = row["peak_allocated_bytes"]
    return [*cells, gigabytes(peak), number(None if peak is None else row["memory_ratio"]), target]
