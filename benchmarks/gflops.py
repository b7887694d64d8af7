"""Every GFLOPs figure of the paper's Tables 1, 5, 10, 11, 12 and 15, beside what this library counts.

    python benchmarks/gflops.py

Models are built on the meta device: shapes alone. `count_flops` gives the figure, torch's FlopCounterMode runs the same
forward and checks it. ST-MAE's 46.1 and other methods' rows are not here: their configuration isn't given.

Which settings give which figure: pre-training has a decoder of depth 4, and 16 × 224² clips of which EVEREST's encoder
sees 156 tokens and VideoMAE's 160 (a 90 % tube mask), or 392 (75 %). Table 1's pre-training column is keep ratio 0.4,
although Table 7 says 0.3, which gives Table 10's 19.81.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import PHASES, config_of
from documents import write
from measuring import videomae_mask
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.models.videomae import modeling_videomae

import everest_tokens as et

# The kernels of Table 15's stacked embeddings, whose strides they are; all of the encoder's width.
STACKS = {1: None, 2: [(2, 4, 4), (1, 4, 4)], 3: [(2, 4, 4), (1, 2, 2), (1, 2, 2)]}


@dataclass(frozen=True)
class Figure:
    """A published figure and the settings that give it; keep_ratio None is VideoMAE, all tokens."""

    table: str
    what: str
    phase: str
    size: str
    paper: float
    keep_ratio: float | None = None
    mask_ratio: float = 0.9
    frames: int = 16
    layers: int = 1


def figures() -> Iterator[Figure]:
    pretraining, finetuning = "pre-training", "fine-tuning"
    for size, before, after in (("S", 11.6, 6.3), ("B", 35.5, 21.5), ("L", 83.1, 60.8)):
        yield Figure("1", "VideoMAE", pretraining, size, before)
        yield Figure("1", "EVEREST", pretraining, size, after, 0.4)
    for size, before, after in (("S", 57.0, 29.1), ("B", 180.5, 98.1), ("L", 597.2, 330.0)):
        for table in ("1", "11"):
            yield Figure(table, "VideoMAE", finetuning, size, before)
            yield Figure(table, "EVEREST", finetuning, size, after, 0.6)
    yield Figure("5", "VideoMAE, MME, MVD", finetuning, "B", 180.5)
    yield Figure("5", "EVEREST", finetuning, "B", 98.1, 0.6)
    yield Figure("10", "VideoMAE 75 %", pretraining, "B", 57.5, mask_ratio=0.75)
    yield Figure("10", "VideoMAE 90 %", pretraining, "B", 35.48)
    for keep_ratio, paper in ((0.5, 23.43), (0.4, 21.54), (0.3, 19.81), (0.2, 18.22)):
        yield Figure("10", "EVEREST", pretraining, "B", paper, keep_ratio)
    for keep_ratio, paper in ((1.0, 180.5), (0.8, 137.5), (0.7, 117.3), (0.6, 98.1), (0.5, 79.8)):
        yield Figure("10", "EVEREST", finetuning, "B", paper, keep_ratio)
    yield Figure("12", "VideoMAE", pretraining, "B", 35.48)
    yield Figure("12", "VideoMAE", finetuning, "B", 180.5)
    for frames, before, after in ((16, 19.81, 98.1), (24, 30.65, 159.4)):
        yield Figure("12", "EVEREST", pretraining, "B", before, 0.3, frames=frames)
        yield Figure("12", "EVEREST", finetuning, "B", after, 0.6, frames=frames)
    for layers, before, after in ((1, 19.8, 98.1), (2, 34.6, 112.9), (3, 38.3, 116.6)):
        yield Figure("15", f"{layers} Conv3d", pretraining, "B", before, 0.3, layers=layers)
        yield Figure("15", f"{layers} Conv3d", finetuning, "B", after, 0.6, layers=layers)


def build(figure: Figure) -> Any:
    """The model of a figure on the meta device, patched for EVEREST."""
    cls, _ = PHASES[figure.phase]
    with torch.device("meta"):
        model = cls(config_of(figure.size, figure.frames)).eval()
        if STACKS[figure.layers]:
            model.videomae.embeddings.patch_embeddings.projection = stacked_embedding(model.config, figure.layers)
    if figure.keep_ratio is not None:
        et.patch_videomae(model, et.ReRoSelector(figure.keep_ratio))
    return model


def stacked_embedding(config: Any, layers: int) -> nn.Sequential:
    """Table 15's tubelet embedding of several Conv3d in the place of the one: (B, C, T, H, W) → (B, D, t, h, w)."""
    kernels = STACKS[layers] or [(config.tubelet_size, config.patch_size, config.patch_size)]
    channels = [config.num_channels, *[config.hidden_size] * len(kernels)]
    return nn.Sequential(*(nn.Conv3d(channels[i], channels[i + 1], kernel, kernel) for i, kernel in enumerate(kernels)))


def count(figure: Figure) -> tuple[float, float]:
    """(GFLOPs by count_flops, the same forward's by torch's counter)."""
    model = build(figure)
    config = model.config
    grid = (figure.frames // config.tubelet_size, 224 // config.patch_size, 224 // config.patch_size)
    clip = torch.empty(1, figure.frames, 3, 224, 224, device="meta")
    num_visible, arguments = None, {}
    if figure.keep_ratio is None and figure.phase == "pre-training":
        # A mask on the meta device has no values to index by, so torch's counter runs the same sets as a selection.
        num_visible = grid[0] * (grid[1] * grid[2] - math.floor(figure.mask_ratio * grid[1] * grid[2]))
        assert figure.mask_ratio != 0.9 or num_visible == int((~videomae_mask(1, grid)).sum())
    macs = et.count_flops(model, num_visible).total
    if num_visible is not None:
        et.patch_videomae(model, et.RandomSelector(1.0))
        tokens = torch.arange(math.prod(grid), device="meta")[None]
        arguments["token_selection"] = et.TokenSelection(tokens[:, :num_visible], tokens[:, num_visible:], grid)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip, **arguments)
    return macs / 1e9, counter.get_total_flops() / 2e9


def measure(chosen: list[Figure]) -> list[dict[str, Any]]:
    """Each figure with what is counted here and the differences in percent."""
    rows = []
    for figure in tqdm(chosen, desc="counting", unit="figure"):
        gflops, torchs = count(figure)
        rows.append(
            {
                **asdict(figure),
                "gflops": gflops,
                "flop_counter_mode": torchs,
                "difference_percent": 100 * (gflops / figure.paper - 1),
                "from_flop_counter_mode_percent": 100 * (gflops / torchs - 1),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    names = f"{'ViT':>3}{'ρ_pre':>7}{'frames':>8}{'paper':>9}{'counted':>9}{'differs':>9}{'torch':>9}"
    print(f"{'table':>5}  {'':<34}{names}")
    for row in rows:
        ratio = "" if row["keep_ratio"] is None else f"{row['keep_ratio']:.1f}"
        print(
            f"{row['table']:>5}  {row['what']:<20}{row['phase']:<14}{row['size']:>3}{ratio:>7}{row['frames']:>8}"
            f"{row['paper']:>9.2f}{row['gflops']:>9.2f}{row['difference_percent']:>+8.2f}%{row['flop_counter_mode']:>9.2f}"
        )
    worst = max(rows, key=lambda row: abs(row["difference_percent"]))
    print(f"\n{len(rows)} figures; the largest difference from the paper is {worst['difference_percent']:+.2f} %")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", help="only these tables; all if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gflops.json")
    options = parser.parse_args(arguments)
    chosen = [figure for figure in figures() if options.tables is None or figure.table in options.tables]
    if not chosen:
        known = sorted({figure.table for figure in figures()}, key=int)
        parser.error(f"no figures for tables {options.tables}: known are {', '.join(known)}")
    # Filling a position table takes seconds with transformers' loops, and its values cost nothing to count.
    modeling_videomae.get_sinusoid_encoding_table = lambda tokens, width: torch.zeros(1, tokens, width, device="cpu")
    rows = measure(chosen)
    print_rows(rows)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    command = "python benchmarks/gflops.py" + "".join(f" {item}" for item in (arguments or sys.argv[1:]))
    write({"command": command, "versions": versions, "figures": rows}, options.out)


if __name__ == "__main__":
    main()
