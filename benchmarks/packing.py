"""What does it cost that each clip keeps its own number of tokens?

One classifier of the same weights runs two selections of equally many tokens in all: as many of every clip, and clips
of 7 to 64 % of their tokens packed behind each other, as a budget for each clip makes them. A training step (forward,
backward, AdamW) and a forward without grad take turns; ratios are medians over the pairs. Beside them the ratio of
what runs (a clip's attention grows with the square of its tokens) and of the bytes that autograd keeps for backward.

    python benchmarks/packing.py                                         # ViT-B on 16 × 224²
    python benchmarks/packing.py --image-size 160 --layers 4 --repeats 5 # in two minutes on two cores
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from documents import RESULTS, header, write
from hosts import build
from measuring import bytes_saved_for_backward, inference_step, median_ratio, paired_seconds, quartiles, training_step

import everest_tokens as et

FEWEST, MOST = 0.07, 0.64  # of the tokens: 109 to 1006 of 1568


def selections(batch: int, grid: tuple[int, int, int], device: str) -> dict[str, et.TokenSelection]:
    """Random tokens of every clip: "uniform", equally many of each, and "packed", of lengths evenly spread."""
    total = math.prod(grid)
    lengths = torch.linspace(FEWEST * total, MOST * total, batch).round().long()
    mean = int(lengths.sum()) // batch
    lengths[-1] += mean * batch - lengths.sum()
    order = torch.rand(batch, total, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    own = order.masked_fill(torch.arange(total) >= lengths[:, None], total).sort(dim=1).values
    return {
        "uniform": et.TokenSelection(order[:, :mean].sort(dim=1).values.to(device), None, grid),
        "packed": et.TokenSelection(own[:, : int(lengths.max())].to(device), None, grid, lengths=lengths),
    }


def products(model: Any, lengths: list[int]) -> int:
    """Multiply–accumulates of the forwards of clips of so many tokens."""
    return sum(et.count_flops(model, length).total for length in lengths)


def measure(
    name: str, layers: int, image_size: int, frames: int, batch: int, repeats: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Both ways of one model, and ratios packed / uniform of seconds, of bytes kept for backward and of products."""
    plain = build(name, layers, image_size, frames)
    models = {
        "uniform": et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector()).to(device),
        "packed": et.patch_videomae(plain, et.EnergyBudget()).to(device),
    }
    clips = torch.randn(batch, frames, 3, image_size, image_size, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    chosen = selections(batch, et.select_tokens(models["uniform"], clips[:1]).grid, device)
    lengths = chosen["packed"].lengths.tolist()
    run: dict[str, Any] = {"model": type(plain).__name__, "lengths": lengths}
    means = [chosen["uniform"].visible.shape[1]] * batch
    run["flops_ratio"] = products(models["packed"], lengths) / products(models["packed"], means)
    inputs: dict[str, dict[str, Any]] = {
        key: {"pixel_values": clips, "labels": labels, "token_selection": selection}
        for key, selection in chosen.items()
    }
    kept = {}
    for key, model in models.items():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            kept[key] = bytes_saved_for_backward(partial(model.train(), **inputs[key]), [*model.parameters(), clips])
    run["bytes_for_backward"] = kept
    run["bytes_ratio"] = kept["packed"] / kept["uniform"]
    for kind, step in (("training", training_step), ("inference", inference_step)):
        steps = {key: step(model.train(kind == "training"), inputs[key], dtype=dtype) for key, model in models.items()}
        seconds = paired_seconds(steps, repeats, warmup=2, device=device)
        ratios = [a / b for a, b in zip(seconds["packed"], seconds["uniform"], strict=True)]
        run[kind] = {"ratio": median_ratio(seconds["packed"], seconds["uniform"]), "quartiles": quartiles(ratios)}
        run[kind]["seconds"] = seconds
    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=["VideoMAE", "Vivit"], default="VideoMAE")
    parser.add_argument("--image-size", type=int, default=224, help="height and width of the clips' frames")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "packing_cpu.json")
    args = parser.parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key not in ("device", "out")}
    document = header("packing.py", sys.argv[1:] if argv is None else argv, torch.device(args.device), **settings)
    dtype = getattr(torch, args.dtype)
    run = measure(
        args.host, args.layers, args.image_size, args.frames, args.batch_size, args.repeats, dtype, args.device
    )
    document["runs"].append(run)
    write(document, args.out)
    times = {kind: round(run[kind]["ratio"], 3) for kind in ("training", "inference")}
    products, kept = round(run["flops_ratio"], 3), round(run["bytes_ratio"], 3)
    print(f"packed / uniform: seconds {times}, multiply-accumulates {products}, bytes for backward {kept}")


if __name__ == "__main__":
    main()
