"""What the benchmarks of steps run: VideoMAE's models by size and phase, how a method patches them, grids of cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
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


def compiled(model: Any, mode: str, fullgraph: bool = True) -> Any:
    """A model or a function as torch.compile makes it in one of the modes; its shapes stay fixed."""
    settings = {"mode": "reduce-overhead"} if mode == "reduce-overhead" else {}
    return torch.compile(model, fullgraph=fullgraph, dynamic=False, **settings)


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
