"""What does keeping half of the tokens save in transformers' other encoders?

Each classifier once unpatched and once patched, of the same weights: a training step (forward, backward, AdamW) and a
forward without grad take turns, so that a machine's slow moments fall on both alike; the ratio is the median over the
pairs. Beside it the ratio of the forwards' multiply–accumulates, from `count_flops`.

    python benchmarks/hosts.py                                          # ViT-B on 16 × 224²: six minutes on two cores
    python benchmarks/hosts.py --image-size 160 --layers 6 --repeats 3  # in a minute
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from documents import RESULTS, header, write
from measuring import median_ratio, paired_seconds, quartiles
from torch import Tensor
from tqdm import tqdm

import everest_tokens as et

# ViT-B's widths under each model's own names; 16 frames make 8 time steps, TimeSformer's patches one each.
SHARED = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 174}


def build(name: str, layers: int, image_size: int, frames: int) -> Any:
    """The classifier, with random weights."""
    own: dict[str, Any] = {
        "VideoMAE": {"image_size": image_size, "num_frames": frames},
        "VJEPA2": {"crop_size": image_size, "frames_per_clip": frames, "pred_num_hidden_layers": 1},
        "Vivit": {"image_size": image_size, "num_frames": frames, "tubelet_size": [2, 16, 16]},
        "Timesformer": {"image_size": image_size, "num_frames": frames // 2, "attention_type": "joint_space_time"},
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=layers, **SHARED, **own)
    return getattr(transformers, f"{name}ForVideoClassification")(config)


def steps_of(model: Any, clips: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and a forward without grad of one model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.zeros(clips.shape[0], dtype=torch.int64)

    def train() -> None:
        model(clips, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.inference_mode():
            model(clips)

    return train, infer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    hosts = ["VideoMAE", "VJEPA2", "Vivit", "Timesformer"]
    parser.add_argument("--hosts", nargs="+", choices=hosts, default=hosts, metavar="HOST")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=224, help="height and width of the clip's frames")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "hosts_cpu.json")
    args = parser.parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key not in ("hosts", "out")}
    document = header("hosts.py", sys.argv[1:] if argv is None else argv, torch.device("cpu"), **settings)

    for name in tqdm(args.hosts):
        plain = build(name, args.layers, args.image_size, args.frames)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(args.keep_ratio))
        frames = args.frames // 2 if name == "Timesformer" else args.frames
        clips = torch.randn(args.batch_size, frames, 3, args.image_size, args.image_size)
        run: dict[str, Any] = {"model": type(plain).__name__, "tokens": et.select_tokens(patched, clips).kept.shape[1]}
        run["flops_ratio"] = et.count_flops(patched).total / et.count_flops(plain).total
        steps = {"unpatched": steps_of(plain, clips), "patched": steps_of(patched, clips)}
        for index, (kind, training) in enumerate((("training", True), ("inference", False))):
            plain.train(training)
            patched.train(training)
            seconds = paired_seconds({key: each[index] for key, each in steps.items()}, args.repeats)
            ratios = [a / b for a, b in zip(seconds["patched"], seconds["unpatched"], strict=True)]
            ratio = median_ratio(seconds["patched"], seconds["unpatched"])
            run[kind] = {"ratio": ratio, "quartiles": quartiles(ratios), "seconds": seconds}
        document["runs"].append(run)
        write(document, args.out)
        times = {kind: round(run[kind]["ratio"], 3) for kind in ("training", "inference")}
        tqdm.write(f"{run['model']}: {times}, multiply-accumulates {run['flops_ratio']:.3f}")


if __name__ == "__main__":
    main()
