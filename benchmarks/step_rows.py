"""How the rows of step_cost.py read: which model ran, in which case, and its numbers as a line of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cases import PHASES, SIZES
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
TITLES = ("", "on", "kept", "GFLOPs, share", "a step", "share", "saved for backward, share")
TITLES += ("peak, GB", "share", "target")


def clips(row: Row) -> str:
    return f"{row['batch_size']} clip{'' if row['batch_size'] == 1 else 's'}"


def model_of(row: Row, phase: bool = True) -> str:
    frames = f" of {row['frames']} frames" if row.get("frames", 16) != 16 else ""
    return f"ViT-{row['size']}{' ' + row['phase'] if phase else ''}, {clips(row)}{frames}"


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


def step_table(rows: Sequence[Row], gpu: Callable[[Row], bool]) -> Iterator[str]:
    """Rows of `mark_cases`, each method beside its case's baseline, which has no line of its own."""
    baselines = {row["case"]: row for row in rows if row["baseline"]}
    others = sorted((row for row in rows if not row["baseline"]), key=lambda row: _order(row, gpu(row)))
    yield from table(TITLES, [_cells(row, baselines[row["case"]], gpu(row)) for row in others])


def _order(row: Row, gpu: bool) -> tuple[Any, ...]:
    """A GPU's first, then by model and clips."""
    size = [*SIZES, row["size"]].index(row["size"])
    return not gpu, circumstances(row), size, row["batch_size"], row["frames"], row["kept"]


def _cells(row: Row, baseline: Row, gpu: bool) -> list[str]:
    what = model_of(row, phase=False) + ("" if row["method"] == "rero" else f", {NAMES[row['method']]}")
    what += " (without CUDA graphs)" if row.get("cuda_graphs") is False else ""
    cells = [what, circumstances(row), f"{row['kept'] / row['tokens']:.1%}", number(row["gflops_ratio"])]
    cells += [_time_from_to(baseline, row), with_quartiles(row["step_ratio"], row["step_ratio_quartiles"])]
    cells += [number(row["saved_ratio"]), _peak_from_to(baseline, row)]
    share = None if row["peak_allocated_bytes"] is None else row["memory_ratio"]
    return [*cells, number(share), "; ".join(map(str, step_targets(row, gpu)))]


def _time_from_to(*rows: Row) -> str:
    """In milliseconds where neither takes a second."""
    seconds = [None if row["out_of_memory"] else row["median_seconds"] for row in rows]
    scale, unit = (1e3, "ms") if all(each is None or each < 1 for each in seconds) else (1, "s")
    return " → ".join("out of memory" if each is None else three_digits(scale * each) for each in seconds) + f" {unit}"


def _peak_from_to(*rows: Row) -> str:
    peaks = [row["peak_allocated_bytes"] for row in rows]
    return "–" if peaks == [None, None] else " → ".join(map(gigabytes, peaks))
