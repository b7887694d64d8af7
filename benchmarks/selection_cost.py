"""What does selecting the tokens itself cost, as a share of the step that it shortens?

For each distance of Eq. 2: importance, top-k (the sort of the importance and of the kept indices), the gather of the
kept tokens' embeddings, and `policy.select` as the patched model calls it, in pre-training with the random split into
visible and target. All take turns, eager or each compiled on its own with fullgraph. The share is select's and the
gather's. On a GPU it is at most that: alone, each waits for its launch, which a step hides. The step is ReRo's with
distance l2, measured in the same run once a case: another distance changes it by no more than what is measured here.

Once a case too, with distance l2: the patched model's whole embedding of the clips (tubelets, selection, gather,
positions) as a step's forward runs it, its time and its launches: operators that eager torch dispatches and that write
memory, which are the same on every device, and on a GPU kernels.

    python benchmarks/selection_cost.py
    python benchmarks/selection_cost.py --sizes S B L --batch-sizes 1 4 --modes eager compile
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import MODES, Case, add_grid, cases_of, check_grid, compiled
from documents import RESULTS, header, write
from launches import kernels, operators
from measuring import paired_seconds
from step_cost import Shared
from torch import Tensor
from tqdm import tqdm

import everest_tokens as et
from everest_tokens.distances import DISTANCES
from everest_tokens.policy import SelectionPolicy
from everest_tokens.tubelets import gather_tokens

PARTS = ("importance", "top_k", "gather", "select")
WARMUP = 3


class Ranking(et.ReRoSelector):
    """The selector with the importance at hand: what is left of its forward is the top-k."""

    def importance(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, N, 1) → (B, N)."""
        return tokens.squeeze(-1)


def parts_of(policy: SelectionPolicy, distance: str, tokens: Tensor, case: Case) -> dict[str, Callable[[], Any]]:
    """The four functions of one distance on embeddings (B, N, D), as the case's mode runs them."""
    grid = case.grid
    selector, ranking = et.ReRoSelector(case.keep_ratio, distance), Ranking(case.keep_ratio)
    policy = SelectionPolicy(policy.task, selector, policy.mask_ratio, None, None)
    scores = selector.importance(tokens, grid).unsqueeze(-1)
    kept = selector(tokens, grid)

    def select(tokens: Tensor) -> tuple[Tensor, ...]:
        selection = policy.select(tokens, grid)
        return (selection.visible,) if selection.target is None else (selection.visible, selection.target)

    def importance(tokens: Tensor) -> Tensor:
        return selector.importance(tokens, grid)

    def top_k(scores: Tensor) -> Tensor:
        return ranking(scores, grid)

    functions: list[Any] = [importance, top_k, gather_tokens, select]
    if case.mode != "eager":
        functions = [compiled(function, case.mode) for function in functions]
    inputs = [(tokens,), (scores,), (tokens, kept), (tokens,)]
    return {part: partial(function, *given) for part, function, given in zip(PARTS, functions, inputs, strict=True)}


def embedding_of(model: Any, clips: Tensor, case: Case) -> Callable[[], Any]:
    """The patched model's embedding of the clips, as the forward of the case's step runs it."""
    embeddings = model.videomae.embeddings
    function = embeddings if case.mode == "eager" else compiled(embeddings, case.mode)
    graded = torch.inference_mode if case.phase == "inference" else torch.enable_grad
    lowered = case.autocast != torch.float32

    def embed() -> None:
        with graded(), torch.autocast(clips.device.type, dtype=case.autocast, enabled=lowered):
            function(clips)

    return embed


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row a distance."""
    torch.compiler.reset()
    shared = Shared(case, device)
    model, inputs = shared.model_for("rero")
    policy, width = model.everest, model.config.hidden_size
    embed = embedding_of(model, inputs["pixel_values"], case)
    launched: dict[str, int | None] = {"embedding_operators": operators(embed) if case.mode == "eager" else None}
    if case.mode != "eager":
        model = compiled(model, case.mode)
    step = {"step": shared.step_of(model, inputs)}
    step_seconds = statistics.median(paired_seconds(step, options.step_repeats, warmup=WARMUP, device=device)["step"])
    embedding = paired_seconds({"embed": embed}, options.repeats, warmup=WARMUP, device=device)["embed"]
    launched["embedding_kernels"] = kernels(embed, device) if device.type == "cuda" else None

    t, h, w = case.grid  # embeddings in the dtype that autocast gives the model's
    tokens = torch.randn(case.batch_size, t * h * w, width, device=device).to(case.autocast)
    with torch.no_grad():
        distances = {distance: parts_of(policy, distance, tokens, case) for distance in DISTANCES}
        functions = {f"{d} {part}": run for d, parts in distances.items() for part, run in parts.items()}
        seconds = paired_seconds(functions, options.repeats, warmup=WARMUP, device=device)
    rows = []
    for distance in DISTANCES:
        medians = {part: statistics.median(seconds[f"{distance} {part}"]) for part in PARTS}
        row = {name: getattr(case, name) for name in ("size", "phase", "batch_size", "frames", "dtype", "mode")}
        row |= {"keep_ratio": case.keep_ratio, "image_size": case.image_size, "distance": distance}
        row |= {f"{part}_seconds": medians[part] for part in PARTS}
        row |= {"step_seconds": step_seconds, "share": (medians["select"] + medians["gather"]) / step_seconds}
        row |= {"embedding_seconds": statistics.median(embedding), **launched}
        rows.append(row | {"seconds": seconds[f"{distance} select"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each part, and select's share of the step."""
    one = "ViT-{size} {phase}, {frames} frames of {image_size} px, {batch_size} clip(s), {dtype}, {mode}"
    lines = [f"\n{one.format(**rows[0])}; a step takes {rows[0]['step_seconds']:.4g} s"]
    counts = [(rows[0]["embedding_operators"], "operators"), (rows[0]["embedding_kernels"], "kernels")]
    launched = "".join(f", {count} {what}" for count, what in counts if count is not None)
    lines.append(f"embedding, selection and gather: {1e3 * rows[0]['embedding_seconds']:.3f} ms{launched}")
    lines.append(f"{'ms':<10}" + "".join(f"{part:>12}" for part in PARTS) + f"{'share':>10}")
    for row in rows:
        times = "".join(f"{1e3 * row[f'{part}_seconds']:>12.3f}" for part in PARTS)
        lines.append(f"{row['distance']:<10}{times}{100 * row['share']:>9.3f}%")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, MODES[:2])  # alone, a part is no step of which CUDA graphs could be made
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each part; default 20")
    parser.add_argument("--step-repeats", type=int, default=5, help="timed steps; default 5")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    check_grid(parser, options, ("repeats", "step_repeats"))
    if "LOCAL_RANK" in os.environ:
        parser.error("one process measures one device: run it without torchrun")
    device = torch.device(options.device)
    out = options.out or RESULTS / f"selection_cost_{device.type}.json"
    document = header("selection_cost.py", arguments, device, warmup=WARMUP, repeats=options.repeats)
    document["step_repeats"] = options.step_repeats
    with tqdm(cases_of(options), desc="cases", unit="case") as bar:
        for case in bar:
            bar.set_description(f"ViT-{case.size} {case.phase}, {case.batch_size} clip(s), {case.mode}")
            rows = measure(case, options, device)
            document["runs"] += rows
            bar.write(table(rows))
            write(document, out)
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
