"""What does a step cost with all tokens, and with fewer? Time, clips a second, memory; in training and in inference.

A training step is forward, backward and fused AdamW, gradients set to None; inference is a classifier's forward alone,
in eval() under torch.inference_mode. The methods of a case take turns, so that a machine's slow moments fall on all of
them, and share one set of weights, so that none pays for another's. Every option that takes several values is
multiplied out. A method that runs out of memory is recorded as such, and the others go on.

    python benchmarks/step_cost.py                                         # ViT-B, all phases, on this machine
    python benchmarks/step_cost.py --sizes S B L --modes eager compile --dtypes float32 bfloat16
    python benchmarks/step_cost.py --sizes S --keep-ratios 0.2 0.4 0.6 0.8 --methods rero random
    python benchmarks/step_cost.py --phases inference --modes eager compile reduce-overhead --batch-sizes 1 32
    torchrun --nproc_per_node 8 benchmarks/step_cost.py --sizes L --phases pre-training --batch-sizes 16 64

Fine-tuning and inference are compared to the unpatched model with all tokens, pre-training to the unpatched one with
VideoMAE's 90 % tube mask. The JSON is written after each case. reduce-overhead is torch.compile with CUDA graphs, so it
is refused on a CPU, where torch would run the mode compile under its name. A replayed graph allocates nothing, and its
memory stays reserved beside the other methods', so that no peak is taken there. Elsewhere a method's peak is taken
only if nothing but what the methods share is allocated; else the run ends with an error.

Under torchrun each process has one device and, in training, DDP's gradients; a time is the slowest process's, memory
the sum over all. Memory that runs out is then noticed in a step of each process alone, with as much held back as DDP's
buckets take; should it still run out within a DDP step, the other processes would wait for that gradient for ever, so
the run ends there, with the cases before it on disk.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakSet

import measuring
import torch
import torch.distributed as dist
from documents import RESULTS, header, world_size, write
from held_memory import check_allocated, held_bytes
from running_out import is_out_of_memory, memory_limit
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et

# Encoder width, depth, heads; decoder width and heads (VideoMAE's models; decoder depth 4 as in the paper's GFLOPs).
SIZES = {
    "S": (384, 12, 6, 192, 3),
    "B": (768, 12, 12, 384, 6),
    "L": (1024, 24, 16, 512, 8),
    "H": (1280, 32, 16, 512, 8),
}
PHASES = {
    "fine-tuning": (VideoMAEForVideoClassification, 0.6),
    "pre-training": (VideoMAEForPreTraining, 0.3),
    "inference": (VideoMAEForVideoClassification, 0.6),
}
BASELINES = {"fine-tuning": "all tokens", "pre-training": "videomae", "inference": "all tokens"}
MODES = ("eager", "compile", "reduce-overhead")
METHODS = ("random", "running cell", "rero")
CELL_RATIOS = (0.25, 0.5, 0.75)
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
# Most bytes that its step may allocate there, by phase, size and clips.
MEMORY_TARGETS = {
    ("pre-training", "B", 32): 4.92e9,
    ("pre-training", "L", 32): 10.5e9,
    ("fine-tuning", "B", 16): 7.30e9,
}
MEASURED = (
    *("median_seconds", "quartile_seconds", "first_step_seconds", "clips_per_second", "step_ratio"),
    *("step_ratio_quartiles", "saved_bytes", "saved_ratio"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "peak_allocated_bytes_per_device", "cuda_graphs"),
)
BLOCK = 3  # steps timed from one DDP wrapping to the next
BUCKETS = 2  # steps that DDP takes to lay out its buckets, not timed
GRAPHS = 3  # steps until CUDA graphs are replayed: one compiles, one warms up, one records


@dataclass(frozen=True)
class Case:
    """What the methods of one comparison share."""

    size: str
    phase: str
    frames: int
    image_size: int
    keep_ratio: float
    batch_size: int
    dtype: str
    mode: str
    cell_ratio: float | None = None  # of running cell

    @property
    def autocast(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def grid(self) -> tuple[int, int, int]:
        config = config_of(self.size, self.frames, self.image_size)
        side = self.image_size // config.patch_size
        return self.frames // config.tubelet_size, side, side


@dataclass
class Variant:
    """One method in a case: its row of the JSON, and its model while the case runs."""

    row: dict[str, Any]
    model: Any = None  # compiled, if the case says so
    inputs: dict[str, Any] = field(default_factory=dict)

    def fail(self) -> None:
        """Memory ran out: let go of everything. Numbers of a step that isn't always possible are no result."""
        self.row |= dict.fromkeys(MEASURED) | {"out_of_memory": True, "seconds": []}
        self.model, self.inputs = None, {}

    @property
    def failed(self) -> bool:
        return self.row["out_of_memory"]


class Shared:
    """The one set of weights that all methods of a case run, with gradients and optimizer if they train, and the clips.

    So the allocator's peak of a method is what it would be alone, but for the others' position tables, some MB each.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(0)
        trains, config = case.phase != "inference", config_of(case.size, case.frames, case.image_size)
        self.plain = PHASES[case.phase][0](config).to(device).train(trains)
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-5, fused=True) if trains else None
        clips = torch.randn(case.batch_size, case.frames, 3, case.image_size, case.image_size, device=device)
        self.inputs = {"pixel_values": clips}
        if case.phase == "fine-tuning":
            self.inputs["labels"] = torch.arange(case.batch_size, device=device) % config.num_labels
        self.mask = measuring.videomae_mask(case.batch_size, case.grid, device)
        self.models: WeakSet[Any] = WeakSet([self.plain])  # all that exist, the methods' too

    def model_for(self, method: str) -> tuple[Any, dict[str, Any]]:
        """A method's model, whose parameters are the shared ones, and the arguments of its forward."""
        if method in BASELINES.values():
            return self.plain, self.inputs | ({"bool_masked_pos": self.mask} if method == "videomae" else {})
        model = copy.deepcopy(self.plain, {id(parameter): parameter for parameter in self.plain.parameters()})
        self.models.add(model)
        return patched(model, method, self.case), self.inputs

    def step_of(self, model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
        """What is timed, in the case's phase, precision and mode."""
        if self.optimizer is None:
            step = measuring.inference_step(model, inputs, dtype=self.case.autocast)
        else:
            step = measuring.training_step(model, inputs, dtype=self.case.autocast, optimizer=self.optimizer)
        if self.case.mode != "reduce-overhead":
            return step

        def marked() -> None:  # the last step's outputs, which its graph's memory holds, may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
            step()

        return marked

    def held_bytes(self) -> int:
        """What is allocated between two steps: weights, optimizer state, inputs, every method's tables."""
        optimizer = [] if self.optimizer is None else [self.optimizer]
        return held_bytes([*self.models, *optimizer, *self.inputs.values(), self.mask], self.mask.device)

    def forget(self) -> None:
        """Drop gradients and optimizer state, some of which may be half made."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.state.clear()


def config_of(size: str, frames: int, image_size: int = 224) -> VideoMAEConfig:
    width, depth, heads, decoder_width, decoder_heads = SIZES[size]
    return VideoMAEConfig(
        image_size=image_size,
        num_frames=frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder_width,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
        num_labels=400,
    )


def patched(model: Any, method: str, case: Case) -> Any:
    """The model with a method's selection. Running cells in pre-training are VideoMAE V2's dual masking."""
    pretraining = case.phase == "pre-training"
    if method == "running cell":
        nearest = min(CELL_RATIOS, key=lambda ratio: abs(ratio - case.keep_ratio))
        selector: Any = et.RunningCellSelector(case.cell_ratio or (0.5 if pretraining else nearest))
        return et.patch_videomae(model, selector, visible=et.TubeSelector(0.1) if pretraining else None)
    selector = et.RandomSelector if method == "random" else et.ReRoSelector
    return et.patch_videomae(model, selector(case.keep_ratio))


@cache
def shapes_of(size: str, phase: str, frames: int, image_size: int) -> Any:
    with torch.device("meta"):
        return PHASES[phase][0](config_of(size, frames, image_size))


def variant_of(method: str, case: Case) -> Variant:
    """A method before it is run: tokens and GFLOPs follow from shapes, so that they are known where memory isn't."""
    model, tokens = shapes_of(case.size, case.phase, case.frames, case.image_size), math.prod(case.grid)
    row = asdict(case) | {"method": method, "baseline": method in BASELINES.values(), "keep_ratio": None}
    del row["cell_ratio"]
    visible = et.TubeSelector(0.1).num_kept(case.grid) if case.phase == "pre-training" else tokens
    row |= {"tokens": tokens, "kept": tokens, "visible": visible}
    if not row["baseline"]:
        model = patched(copy.deepcopy(model), method, case)
        embedded = torch.empty(1, tokens, model.config.hidden_size, device="meta")
        selection = model.everest.select(embedded, case.grid)
        row |= {"kept": selection.kept.shape[1], "visible": selection.visible.shape[1]}
        row["keep_ratio"] = model.everest.selector.keep_ratio
    row["gflops"] = et.count_flops(model).total / 1e9
    return Variant(row | {"out_of_memory": False, "seconds": []} | dict.fromkeys(MEASURED))


def over_ranks(values: Sequence[float], operation: str, device: torch.device) -> list[float]:
    """Each value's "MAX" or "SUM" over the processes, which wait for each other here; in one process the values."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor.tolist()


def attempt(action: Callable[[], Any], variants: list[Variant], shared: Shared | None, device: torch.device) -> Any:
    """action(), or None where a process has no memory for it: the variants have failed then, in every process."""
    result, failed = None, False
    try:
        result = action()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    # From here on: the error is gone, and with its traceback the tensors of the step that failed.
    if not over_ranks([failed], "MAX", device)[0]:
        return result
    del result
    for variant in variants:
        variant.fail()
    if shared is not None:
        shared.forget()
    free(device)
    return None


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def under_ddp(case: Case) -> bool:
    return dist.is_initialized() and case.phase != "inference"


def compiled(model: Any, mode: str, fullgraph: bool = True) -> Any:
    """A model or a function as torch.compile makes it in one of the modes; its shapes stay fixed."""
    settings = {"mode": "reduce-overhead"} if mode == "reduce-overhead" else {}
    return torch.compile(model, fullgraph=fullgraph, dynamic=False, **settings)


def prepare(variant: Variant, shared: Shared, device: torch.device) -> None:
    """Build a method's model, count what backward needs and run its first step, which compiles.

    What a compiled graph keeps isn't seen, so that nothing is counted then. The count leaves out the parameters; it has
    the clips where the model keeps them, and autocast's copies of weights. Torch compiles without CUDA graphs where a
    model reads from the host, as transformers' does its position table: `cuda_graphs` says whether it did.
    """
    case = shared.case
    model, inputs = shared.model_for(variant.row["method"])
    if case.mode != "eager":  # the unpatched pre-training model indexes by boolean masks: no full graph
        model = compiled(model, case.mode, fullgraph=model is not shared.plain)
    elif case.phase != "inference":
        with torch.autocast(device.type, dtype=case.autocast, enabled=case.autocast != torch.float32):
            forward = partial(model, **inputs)
            variant.row["saved_bytes"] = measuring.bytes_saved_for_backward(forward, exclude=model.parameters())
    variant.model, variant.inputs = model, inputs
    held = sum(parameter.nbytes for parameter in model.parameters()) if under_ddp(case) else 0
    buckets = torch.empty(held, dtype=torch.uint8, device=device)  # what DDP will take, see above
    skipped = counters["inductor"]["cudagraph_skips"]
    variant.row["first_step_seconds"] = measuring.seconds_of(shared.step_of(model, inputs), device)
    if case.mode == "reduce-overhead":
        variant.row["cuda_graphs"] = counters["inductor"]["cudagraph_skips"] == skipped
    del buckets


def visit(variant: Variant, shared: Shared, untimed: int, timed: int, device: torch.device) -> None:
    """A method's turn. DDP wraps it anew: its hooks sit on the parameters, so only one wrapper may exist."""
    model, buckets = variant.model, 0
    if under_ddp(shared.case):
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        buckets = sum(parameter.nbytes for parameter in model.parameters())
    step = shared.step_of(model, variant.inputs)
    for _ in range(untimed):
        step()
    takes_peak = device.type == "cuda" and shared.case.mode != "reduce-overhead"
    if takes_peak and variant.row["peak_allocated_bytes"] is None:
        check_allocated(measuring.allocated_bytes(device), shared.held_bytes() + buckets)
        variant.row["peak_allocated_bytes"], variant.row["peak_reserved_bytes"] = measuring.peak_bytes(step, device)
    for _ in range(timed):
        over_ranks([0], "MAX", device)  # start together
        variant.row["seconds"].append(measuring.seconds_of(step, device))
    del model, step
    if under_ddp(shared.case):
        gc.collect()  # a wrapper holds itself


def run_case(
    case: Case, variants: list[Variant], options: argparse.Namespace, device: torch.device, progress: Any
) -> list[dict[str, Any]]:
    """The rows of all methods of a case, the baseline first."""
    torch.compiler.reset()  # what an earlier case compiled must not make this one's shapes dynamic
    free(device)  # what an earlier case left in reference cycles
    shared = attempt(partial(Shared, case, device), variants, None, device)
    for variant in variants:
        if shared is not None:
            attempt(partial(prepare, variant, shared, device), [variant], shared, device)
        progress(1)
    turns = [(1, 0)] * (options.warmup - 1) + [(0, 1)] * options.repeats
    if dist.is_initialized():
        turns = [(BUCKETS, min(BLOCK, options.repeats - done)) for done in range(0, options.repeats, BLOCK)]
    for untimed, timed in turns:
        for variant in variants:
            if not variant.failed:
                turn = partial(visit, variant, shared, untimed, timed, device)
                turn() if dist.is_initialized() else attempt(turn, [variant], shared, device)
            progress(timed or untimed)
    for variant in variants:
        summarise(variant, variants[0], device)
    return [variant.row for variant in variants]


def summarise(variant: Variant, baseline: Variant, device: torch.device) -> None:
    """Fill in what follows from the measurements of all processes; ratios pair the two times of each turn."""
    row, base = variant.row, baseline.row
    row["gflops_ratio"] = row["gflops"] / base["gflops"]
    variant.model, variant.inputs = None, {}
    if variant.failed:
        return
    row["first_step_seconds"], *row["seconds"] = over_ranks([row["first_step_seconds"], *row["seconds"]], "MAX", device)
    seconds = row["seconds"]
    row["median_seconds"], row["quartile_seconds"] = statistics.median(seconds), measuring.quartiles(seconds)
    row["clips_per_second"] = world_size() * row["batch_size"] / row["median_seconds"]
    if row["peak_allocated_bytes"] is not None:
        peaks = [row["peak_allocated_bytes"], row["peak_reserved_bytes"]]
        row["peak_allocated_bytes_per_device"] = over_ranks(peaks, "MAX", device)[0]
        row["peak_allocated_bytes"], row["peak_reserved_bytes"] = over_ranks(peaks, "SUM", device)
    if not baseline.failed:  # the first of the variants: its seconds are final
        ratios = [own / its for own, its in zip(seconds, base["seconds"], strict=True)]
        row["step_ratio"], row["step_ratio_quartiles"] = statistics.median(ratios), measuring.quartiles(ratios)
        if row["saved_bytes"] is not None:
            row["saved_ratio"] = row["saved_bytes"] / base["saved_bytes"]


def targets_of(row: dict[str, Any], gpu: bool) -> list[tuple[str, float | None, float, str]]:
    """(what, measured, most, format) of a row that a target is set for; None measured where memory ran out."""
    if row["method"] != "rero" or row["frames"] != 16 or row["image_size"] != 224:
        return []
    usual, tuned = row["keep_ratio"] == PHASES[row["phase"]][1], gpu and row["dtype"] == "bfloat16"
    found: list[tuple[str, float | None, float, str]] = []
    place = (row["phase"], row["size"], row["batch_size"])
    most = STEP_TARGETS.get((*place, row["keep_ratio"], row["mode"])) if tuned else None
    if most is None and usual and row["size"] in ("B", "L"):
        most = STEP_TARGET * row["gflops_ratio"]
    if most is not None and (row["step_ratio"] is not None or row["out_of_memory"]):
        found.append(("step time ratio", row["step_ratio"], most, ".3f"))
    most, peak = MEMORY_TARGETS.get(place), row["peak_allocated_bytes_per_device"]
    if most and usual and tuned and (peak is not None or row["out_of_memory"]):
        found.append(("peak allocated a device, GB", None if peak is None else peak / 1e9, most / 1e9, ".2f"))
    return found


def verdicts(rows: list[dict[str, Any]], gpu: bool) -> list[str]:
    """How ReRo stands to what it is to reach, where that was measured."""
    lines = []
    for what, value, most, digits in (target for row in rows for target in targets_of(row, gpu)):
        met = value is not None and value <= most
        measured = "out of memory" if value is None else format(value, digits)
        lines.append(f"{what} {measured}, target ≤ {most:{digits}}: {'met' if met else 'MISSED'}")
    return lines


def table(rows: list[dict[str, Any]], gpu: bool) -> str:
    """The methods of one case side by side, and how they stand to the targets."""
    one = "ViT-{size} {phase}, {frames} frames of {image_size} px, {batch_size} clip(s) a device, {dtype}, {mode}"
    names = f"{'seconds':>10}{'ratio':>8}{'(quartiles)':>15}{'clips/s':>9}{'saved MiB':>11}{'ratio':>7}{'peak GB':>9}"
    lines = [f"\n{one.format(**rows[0])}", f"{'':<13}{'ρ':>5}{'kept':>6}{'visible':>8}{'GFLOPs':>9}{'ratio':>7}{names}"]
    for row in rows:
        low, high = row["step_ratio_quartiles"] or (None, None)
        saved, peak = row["saved_bytes"], row["peak_allocated_bytes"]
        line = f"{row['method']:<13}{shown(row['keep_ratio'], '.2f'):>5}{row['kept']:>6}{row['visible']:>8}"
        line += f"{row['gflops']:>9.2f}{row['gflops_ratio']:>7.3f}"
        if row["out_of_memory"]:
            lines.append(f"{line}   out of memory")
            continue
        line += f"{row['median_seconds']:>10.4g}{shown(row['step_ratio'], '.3f'):>8}"
        line += f"{shown(low, '.3f')}–{shown(high, '.3f')}".rjust(15) + f"{row['clips_per_second']:>9.4g}"
        line += f"{shown(saved and saved / 2**20, '.1f'):>11}{shown(row['saved_ratio'], '.3f'):>7}"
        line += f"{shown(peak and peak / 1e9, '.2f'):>9}"
        lines.append(line)
    return "\n".join([*lines, *(f"  {verdict}" for verdict in verdicts(rows, gpu))])


def shown(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def add_grid(parser: argparse.ArgumentParser, modes: Sequence[str] = MODES) -> None:
    """The options that say what is run and where, of this script and of selection_cost.py."""
    add = partial(parser.add_argument, nargs="+")
    add("--sizes", choices=SIZES, default=["B"], metavar="SIZE", help=f"{', '.join(SIZES)}; default B")
    add("--phases", choices=PHASES, default=list(PHASES), metavar="PHASE", help=f"{', '.join(PHASES)}; default all")
    add("--frames", type=int, default=[16], metavar="T", help="of a clip, two a token; default 16")
    add("--batch-sizes", type=int, default=[2], metavar="CLIPS", help="clips on each device; default 2")
    dtypes = ["float32", "bfloat16"]
    add("--dtypes", choices=dtypes, default=dtypes[:1], metavar="DTYPE", help="float32 or, by autocast, bfloat16")
    graphs = " (compile with CUDA graphs, on a CUDA device only)" if "reduce-overhead" in modes else ""
    about = f"{', '.join(modes)}{graphs}; default eager"
    add("--modes", choices=modes, default=["eager"], metavar="MODE", help=about)
    parser.add_argument("--image-size", type=int, default=224, metavar="PX", help="a multiple of 16; default 224")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<this script>_<device type>.json")


def check_grid(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """End with an error for what no model takes; `counts` are options that must be at least 1 too."""
    for name, values in [("batch_sizes", options.batch_sizes), *((name, [getattr(options, name)]) for name in counts)]:
        if min(values) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    if min(options.frames) < 4 or any(frames % 2 for frames in options.frames):
        parser.error(f"--frames must be even and at least 4 (two time steps), got {options.frames}")
    if "reduce-overhead" in options.modes and torch.device(options.device).type != "cuda":
        parser.error(f"--modes reduce-overhead records CUDA graphs and needs a CUDA device, got {options.device}")
    if options.image_size < 16 or options.image_size % 16:
        parser.error(f"--image-size must be a multiple of 16, got {options.image_size}")


def cases_of(
    options: argparse.Namespace, keep_ratios: Sequence[float] | None = None, cell_ratio: float | None = None
) -> list[Case]:
    """The product of the options; without keep ratios the paper's of each phase."""
    cases = []
    for size, phase, frames in product(options.sizes, options.phases, options.frames):
        ratios = keep_ratios or [PHASES[phase][1]]
        for ratio, batch, dtype, mode in product(ratios, options.batch_sizes, options.dtypes, options.modes):
            cases.append(Case(size, phase, frames, options.image_size, ratio, batch, dtype, mode, cell_ratio))
    return cases


def start(name: str) -> torch.device:
    """The device of this process; under torchrun one for each, and they find each other."""
    device = torch.device(name)
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser)
    about = f"what runs beside the baseline, of {', '.join(METHODS)}; default all"
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD", help=about)
    about = "of random and rero; default the paper's, 0.6 in fine-tuning and inference and 0.3 in pre-training"
    parser.add_argument("--keep-ratios", type=float, nargs="+", metavar="RATIO", help=about)
    about = "of running cell: 0.25, 0.5, 0.75; default the nearest, in pre-training V2's 0.5"
    parser.add_argument("--running-cell-ratio", type=float, choices=CELL_RATIOS, metavar="RATIO", help=about)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each method; default 9")
    about = f"untimed ones before, at least 1 and for reduce-overhead {GRAPHS}; default {GRAPHS}"
    parser.add_argument("--warmup", type=int, default=GRAPHS, help=about)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    check_grid(parser, options, ("repeats", "warmup"))
    if "reduce-overhead" in options.modes and options.warmup < GRAPHS:
        parser.error(f"--warmup must be at least {GRAPHS} for reduce-overhead, got {options.warmup}")
    if "reduce-overhead" in options.modes and "LOCAL_RANK" in os.environ:
        parser.error("--modes reduce-overhead measures one device: run it without torchrun")
    device = start(options.device)
    out = options.out or RESULTS / f"step_cost_{device.type}.json"
    warmup = 1 + BUCKETS if dist.is_initialized() else options.warmup
    document = header("step_cost.py", arguments, device, warmup=warmup, repeats=options.repeats)
    line_ups = []
    try:
        for case in cases_of(options, options.keep_ratios, options.running_cell_ratio):
            methods = (BASELINES[case.phase], *options.methods)
            line_ups.append((case, [variant_of(method, case) for method in methods]))
    except ValueError as error:  # of a selector that can't keep that many tokens, or of that grid
        parser.error(str(error))
    steps = options.repeats + (1 if dist.is_initialized() else warmup)
    total = len(line_ups) * (1 + len(options.methods)) * steps
    first = not dist.is_initialized() or dist.get_rank() == 0
    # On the CPU memory must run out here, not for the kernel, which would kill; 0.95 because others run there too.
    share = 0.95 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit: Any = memory_limit(share) if device.type == "cpu" else nullcontext()
    with limit, tqdm(total=total, desc="steps", unit="step", disable=not first) as bar:
        for case, variants in line_ups:
            bar.set_description(f"ViT-{case.size} {case.phase}, {case.batch_size} clip(s), {case.mode}")
            rows = run_case(case, variants, options, device, bar.update)
            document["runs"] += rows
            if first:
                bar.write(table(rows, device.type == "cuda"))
                write(document, out)
    if first:
        print(f"\nwritten to {out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
