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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import measuring
import torch
import torch.distributed as dist
from cases import (
    BASELINES,
    CELL_RATIOS,
    METHODS,
    PHASES,
    Case,
    add_grid,
    cases_of,
    check_grid,
    compiled,
    config_of,
    patched,
    shapes_of,
)
from documents import RESULTS, header, write
from held_memory import check_allocated, held_bytes
from processes import over_ranks, start, world_size
from running_out import is_out_of_memory, memory_limit
from step_rows import mark_cases, step_table
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import everest_tokens as et

MEASURED = (
    *("median_seconds", "quartile_seconds", "first_step_seconds", "clips_per_second", "step_ratio"),
    *("step_ratio_quartiles", "saved_bytes", "saved_ratio"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "peak_allocated_bytes_per_device", "cuda_graphs"),
)
BLOCK = 3  # steps timed from one DDP wrapping to the next
BUCKETS = 2  # steps that DDP takes to lay out its buckets, not timed
GRAPHS = 3  # steps until CUDA graphs are replayed: one compiles, one warms up, one records


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
    free()
    return None


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is none


def under_ddp(case: Case) -> bool:
    return dist.is_initialized() and case.phase != "inference"


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
    free()  # what an earlier case left in reference cycles
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


def printed(rows: list[dict[str, Any]], gpu: bool) -> str:
    """The methods of one case side by side, and how they stand to the targets."""
    one = "\n{frames} frames of {image_size} px, {dtype}, {mode}\n".format(**rows[0])
    where = {"device": "GPU" if gpu else "CPU", "world_size": world_size()}
    return "\n".join([one, *step_table(mark_cases([row | where for row in rows]), lambda row: gpu)])


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
    first = world_size() == 1 or dist.get_rank() == 0
    # On the CPU memory must run out here, not for the kernel, which would kill; 0.95 because others run there too.
    share = 0.95 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit: Any = memory_limit(share) if device.type == "cpu" else nullcontext()
    with limit, tqdm(total=total, desc="steps", unit="step", disable=not first) as bar:
        for case, variants in line_ups:
            bar.set_description(f"ViT-{case.size} {case.phase}, {case.batch_size} clip(s), {case.mode}")
            rows = run_case(case, variants, options, device, bar.update)
            document["runs"] += rows
            if first:
                bar.write(printed(rows, device.type == "cuda"))
                write(document, out)
    if first:
        print(f"\nwritten to {out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
