"""What does a training step cost, before and after patching? Time, bytes saved for backward, selection's own share.

Every pair is timed in turn in one process (forward, backward, AdamW), so that a machine's slow moments fall on both;
the ratio is the median over the pairs. Writes JSON with device, versions, command and every single time.

    python benchmarks/train_step.py                     # ViT-B, both phases, on this machine
    python benchmarks/train_step.py --sizes S B L --repeats 15 --compile --dtype bfloat16
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.measuring import (
    bytes_saved_for_backward,
    median_ratio,
    paired_seconds,
    training_step,
    videomae_mask,
)

# Encoder width, depth, heads; decoder width and heads (VideoMAE's models; decoder depth 4 as in the paper's GFLOPs).
SIZES = {
    "S": (384, 12, 6, 192, 3),
    "B": (768, 12, 12, 384, 6),
    "L": (1024, 24, 16, 512, 8),
    "H": (1280, 32, 16, 512, 8),
}
PHASES = {"fine-tuning": (VideoMAEForVideoClassification, 0.6), "pre-training": (VideoMAEForPreTraining, 0.3)}
# What ViT-B at batch size 2 is to reach on two CPU cores: step-time ratio, saved-bytes ratio, selection's share.
TARGETS = {"fine-tuning": (0.55, 0.605, 0.02), "pre-training": (0.56, 0.525, None)}


def config_of(size: str, frames: int) -> VideoMAEConfig:
    width, depth, heads, decoder_width, decoder_heads = SIZES[size]
    return VideoMAEConfig(
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


def measure(size: str, phase: str, options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """One pair: a plain model and its patched copy."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    cls, keep_ratio = PHASES[phase]
    torch.manual_seed(0)
    plain = cls(config_of(size, options.frames)).to(device).train()
    patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(keep_ratio))
    clips = torch.randn(options.batch_size, options.frames, 3, 224, 224, device=device)
    selection = et.select_tokens(patched, clips)
    tokens = math.prod(selection.grid)
    before: dict[str, Any] = {"pixel_values": clips}
    after: dict[str, Any] = {"pixel_values": clips}
    if phase == "fine-tuning":
        before["labels"] = after["labels"] = torch.arange(options.batch_size, device=device)
    else:
        before["bool_masked_pos"] = videomae_mask(options.batch_size, selection.grid, device)
    inputs = {"before": before, "after": after}
    models = {"before": plain, "after": patched}
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    flops = {name: et.count_flops(model).total for name, model in models.items()}
    saved = {}
    for name, model in models.items():
        with autocast():
            saved[name] = bytes_saved_for_backward(partial(model, **inputs[name]), exclude=model.parameters())

    result: dict[str, Any] = {
        "size": size,
        "phase": phase,
        "keep_ratio": keep_ratio,
        "visible": selection.visible.shape[1],
        "kept": selection.kept.shape[1],
        "tokens": tokens,
        "macs": flops,
        "macs_ratio": flops["after"] / flops["before"],
        "saved_bytes": saved,
        "saved_ratio": saved["after"] / saved["before"],
    }
    if options.compile:
        models = {name: torch.compile(model) for name, model in models.items()}
    stepping = partial(training_step, dtype=dtype, optimized=not options.no_optimizer)
    steps = {name: stepping(models[name], inputs[name]) for name in models}
    seconds = paired_seconds(steps, options.repeats, warmup=2, device=device, progress=progress)
    ratios = sorted(a / b for a, b in zip(seconds["after"], seconds["before"], strict=True))
    result["seconds"] = seconds
    result["step_ratio"] = median_ratio(seconds["after"], seconds["before"])
    result["step_ratio_quartiles"] = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]

    width = plain.config.hidden_size
    embedded = torch.randn(options.batch_size, tokens, width, device=device)
    select = {"select": partial(patched.everest.select, embedded, selection.grid)}
    own = statistics.median(paired_seconds(select, 20, warmup=3, device=device)["select"])
    result["selection_seconds"] = own
    result["selection_share"] = own / statistics.median(seconds["after"])
    if device.type == "cuda":
        del steps, select, embedded
        result["peak_bytes"] = {}
        for model in models.values():
            model.to("cpu")
        for name, model in models.items():  # the compiled ones where they were timed
            step = stepping(model.to(device), inputs[name])
            result["peak_bytes"][name] = peak_bytes(step, device)
            del step
            model.to("cpu")
    return result


def peak_bytes(step: Any, device: torch.device) -> dict[str, int]:
    """The allocator's peaks over one step, after one that makes the optimizer's state."""
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def report(result: dict[str, Any], check: bool) -> None:
    targets = TARGETS[result["phase"]] if check else (None, None, None)
    print(f"\nViT-{result['size']} {result['phase']}, keep ratio {result['keep_ratio']}")
    low, high = result["step_ratio_quartiles"]
    rows = (
        ("forward multiply-accumulates", result["macs_ratio"], None, ""),
        ("training step, seconds", result["step_ratio"], targets[0], f"  (quartiles {low:.3f} to {high:.3f})"),
        ("bytes saved for backward", result["saved_ratio"], targets[1], ""),
        ("selection's share of the step", result["selection_share"], targets[2], ""),
    )
    for what, value, target, more in rows:
        verdict = "" if target is None else f"  target ≤ {target}: {'met' if value <= target else 'MISSED'}"
        print(f"  {what:<32}{value:8.4f}{verdict}{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["B"])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train_step_<device type>.json")
    options = parser.parse_args()
    kind = torch.device(options.device).type
    out = options.out or Path(__file__).parent / "results" / f"train_step_{kind}.json"

    cpu = kind == "cpu"
    results = []
    total = len(options.sizes) * len(options.phases) * 2 * (options.repeats + 2)
    with tqdm(total=total, desc="training steps", unit="step") as bar:
        for size in options.sizes:
            for phase in options.phases:
                bar.set_description(f"ViT-{size} {phase}")
                results.append(measure(size, phase, options, bar.update))
    for result in results:
        report(result, check=result["size"] == "B" and options.batch_size == 2 and cpu and options.frames == 16)
    document = {
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(options.device),
        "machine": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, timm, et)},
        "batch_size": options.batch_size,
        "frames": options.frames,
        "dtype": options.dtype,
        "compiled": options.compile,
        "optimizer": None if options.no_optimizer else "AdamW(fused)",
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
