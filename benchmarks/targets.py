"""What a benchmark's numbers are to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cases import PHASES

STEP_TARGET = 1.05  # × the ratio of forward GFLOPs: what the ratio of ReRo's step time may be, unless it stands below
# What it may be on a GPU in bfloat16, by phase, size, clips of 16 × 224², keep ratio and mode.
STEP_TARGETS = {
    ("fine-tuning", "B", 64, 0.6, "eager"): 0.56,
    ("fine-tuning", "B", 16, 0.6, "compile"): 0.58,
    ("pre-training", "B", 32, 0.3, "eager"): 0.42,
    **{("inference", "B", 32, 0.6, mode): 0.55 for mode in ("eager", "compile")},
    **{("inference", "B", 32, 0.3, mode): 0.28 for mode in ("eager", "compile")},
    **{("inference", "B", 32, 0.2, mode): 0.20 for mode in ("eager", "compile")},
}
# Most GB that its step may allocate there, by phase, size and clips.
MEMORY_TARGETS = {
    ("pre-training", "B", 32): 4.92,
    ("pre-training", "L", 32): 10.5,
    ("fine-tuning", "B", 16): 7.30,
}
# Most milliseconds of embedding there, and the row of selection_cost.py that is judged by it.
EMBEDDING_TARGET = 1.0
EMBEDDED = {"size": "B", "phase": "inference", "batch_size": 32, "dtype": "bfloat16", "distance": "l2", "frames": 16}

# What compensating the camera's motion may add: on a CPU % of a fine-tuning step of ViT-B, on a GPU milliseconds.
CAMERA_TARGETS = {"cpu": 2.0, "cuda": 1.5}


@dataclass(frozen=True)
class Target:
    """A number's limit; `measured` is None where memory ran out."""

    what: str
    measured: float | None
    most: float
    unit: str = ""

    def __str__(self) -> str:
        met = self.measured is not None and self.measured <= self.most
        limit = f"{self.most:.2f} {self.unit}" if self.unit else f"{self.most:.3f}"
        return f"{self.what} ≤ {limit}: {'met' if met else 'MISSED'}"


def step_targets(row: dict[str, Any], gpu: bool) -> list[Target]:
    """The targets that are set for a row of step_cost.py."""
    if row["method"] != "rero" or row["frames"] != 16 or row["image_size"] != 224:
        return []
    usual, tuned = row["keep_ratio"] == PHASES[row["phase"]][1], gpu and row["dtype"] == "bfloat16"
    found = []
    place = (row["phase"], row["size"], row["batch_size"])
    most = STEP_TARGETS.get((*place, row["keep_ratio"], row["mode"])) if tuned else None
    if most is None and usual and row["size"] in ("B", "L"):
        most = STEP_TARGET * row["gflops_ratio"]
    if most is not None and (row["step_ratio"] is not None or row["out_of_memory"]):
        found.append(Target("step ratio", row["step_ratio"], most))
    most, peak = MEMORY_TARGETS.get(place), row["peak_allocated_bytes_per_device"]
    if most and usual and tuned and (peak is not None or row["out_of_memory"]):
        found.append(Target("peak a device", peak and peak / 1e9, most, "GB"))
    return found


def embedding_targets(row: dict[str, Any], gpu: bool) -> list[Target]:
    """The target that is set for a row of selection_cost.py, if its embedding was timed."""
    if not gpu or row.get("embedding_seconds") is None or any(row[key] != value for key, value in EMBEDDED.items()):
        return []
    return [Target("embedding", 1e3 * row["embedding_seconds"], EMBEDDING_TARGET, "ms")]


def camera_target(row: dict[str, Any], gpu: bool) -> Target | None:
    """The target that is set for a row of camera_motion.py's cost: of any CPU's, and of a GPU's with 32 clips."""
    if not gpu:
        return Target("share of the step", 100 * row["share"], CAMERA_TARGETS["cpu"], "%")
    if (row["batch_size"], row["dtype"]) != (32, "bfloat16"):
        return None
    return Target("added", 1e3 * row["added_seconds"], CAMERA_TARGETS["cuda"], "ms")


def unmeasured(steps: Iterable[dict[str, Any]], selections: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The targets for a GPU that no row, of those measured on one, can be judged by."""
    tuned = [row for row in steps if row["dtype"] == "bfloat16" and step_targets(row, gpu=True)]
    steps_run = {(row["phase"], row["size"], row["batch_size"], row["keep_ratio"], row["mode"]) for row in tuned}
    peaks_run = {
        (row["phase"], row["size"], row["batch_size"])
        for row in tuned
        if any(target.unit == "GB" for target in step_targets(row, gpu=True))
    }
    for place, most in STEP_TARGETS.items():
        if place not in steps_run:
            phase, size, clips, ratio, mode = place
            where = f"{phase}, ViT-{size}, {clips} clips, keep ratio {ratio}, {mode}"
            yield f"{where}: step ≤ {most} of the unpatched model's"
    for place, most in MEMORY_TARGETS.items():
        if place not in peaks_run:
            phase, size, clips = place
            yield f"{phase}, ViT-{size}, {clips} clips: peak ≤ {most:.2f} GB"
    if not any(embedding_targets(row, gpu=True) for row in selections):
        yield f"embedding and selection, ViT-B, 32 clips: ≤ {EMBEDDING_TARGET:g} ms"
