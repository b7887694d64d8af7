"""The paper's figures for your clips and your model; `everest-tokens visualize` draws Figures 6 and 8.

python examples/pictures/paper_figures.py keep-ratios VIDEO --layout paper     # at 0.5, 0.25 and 0.15: Figure 9
python examples/pictures/paper_figures.py frames VIDEO                         # InfoFrameSampler: Figures 3 and 10
python examples/pictures/paper_figures.py reconstruction VIDEO --model FOLDER  # what a model predicts: Eq. 3
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

import everest_tokens as et
from everest_tokens.commands import patched_model
from everest_tokens.drawing import kept_by, unit_of
from everest_tokens.fading import VERMILION, choose_fade
from everest_tokens.video import load_clip
from everest_tokens.visualization import Part, Row, check_out, draw, kept_map, kept_row, pixels_of, selection_part

SWEEP = (0.5, 0.25, 0.15)  # of Figure 9
LAYOUTS = {"readme": (12.0, 12.0), "paper": (6.75, 7.0)}  # inches wide, points of the text
WHITE = 0.93  # what steps that aren't drawn fade to


# --- What is drawn of one clip (1, T, 3, H, W), normalised as the model takes it ---


def with_ratio(selector: Any, ratio: float) -> Any:
    """A copy of a selector that keeps another share."""
    selector = copy.deepcopy(selector)
    selector.keep_ratio = ratio
    return selector


def keep_ratios(model: Any, clip: Tensor, title: str = "", *, ratios: Sequence[float] = SWEEP, seed: int = 0) -> Part:
    """The model's selector at several keep ratios, and importance (Figure 9)."""
    own = model.everest.selector
    selections = {f"keep ratio {r:g}": kept_by(model, clip, with_ratio(own, r), seed) for r in ratios}
    return selection_part(pixels_of(clip), selections, title=title, unit=unit_of(own))


def frames(model: Any, clip: Tensor, title: str = "", *, sampler: et.InfoFrameSampler, seed: int = 0) -> Part:
    """The time steps that the frame sampler draws in training (§4.2, Figures 3 and 10): the others are blurred.

    The clip has the frames of all ⌊α·τ⌋ candidate steps; how many tokens each keeps is written above it.
    """
    policy, candidates = model.everest, []
    own = policy.selector

    def remember(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        candidates.append(et.TokenSelection(own(tokens, grid), None, grid))
        return candidates[-1].kept

    policy.visible, policy.mask_ratio = None, 1 - policy.share_kept() / 2
    policy.selector, policy.frame_sampler = remember, sampler
    try:
        chosen = et.select_tokens(model.train(), clip, generator=torch.Generator().manual_seed(seed))
    finally:
        policy.selector = own
    kept, pixels = kept_map(candidates[0]), pixels_of(clip)  # the candidates are scored first, then those drawn
    tubelet = len(pixels) // len(kept)
    drawn = torch.isin(torch.arange(len(kept)), chosen.steps[0]).repeat_interleave(tubelet)
    small = [max(side // 12, 1) for side in pixels.shape[-2:]]
    blurred = interpolate(interpolate(pixels, small, mode="area"), pixels.shape[-2:], mode="bilinear")
    shown = torch.where(drawn[:, None, None, None], pixels, 0.5 * blurred + 0.5 * WHITE)
    border = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    edge = max(pixels.shape[-1] // 50, 1)
    border[edge:-edge, edge:-edge] = False
    shown = torch.where(drawn[:, None, None, None] & border, VERMILION[:, None, None], shown)
    counts = kept.flatten(1).sum(dim=1).repeat_interleave(tubelet).tolist()
    captions = [f"frame {i}\n{count} kept" for i, count in enumerate(counts)]
    rows = [Row(f"sampled steps\n{chosen.grid[0]} of {len(kept)}", shown), kept_row("kept", pixels, kept)]
    return Part(rows, range(0, len(pixels), tubelet), captions, title)


@torch.no_grad()
def reconstruction(model: Any, clip: Tensor, title: str = "", *, seed: int = 0) -> Part:
    """What the encoder sees and what the decoder makes of it (Eq. 3).

    Raises:
        ValueError: the model has no pixel decoder.
    """
    if model.everest.task != "pretraining":
        raise ValueError(f"{type(model).__name__} has no pixel decoder: it reconstructs nothing")
    model.everest.frame_sampler = None
    selection = et.select_tokens(model, clip, generator=torch.Generator().manual_seed(seed))
    prediction = model(clip, token_selection=selection).logits
    normalised = model.config.norm_pix_loss
    return reconstruction_part(pixels_of(clip), selection, prediction, normalised=normalised, title=title)


def reconstruction_part(
    pixels: Tensor, selection: et.TokenSelection, prediction: Tensor, *, normalised: bool, title: str = ""
) -> Part:
    """What a pre-training model sees, what it predicts of the targets, and the targets themselves.

    A model trained with `norm_pix_loss` predicts each patch relative to the patch's own mean and standard deviation.
    These are taken from the frames, as in VideoMAE's own pictures: brightness and contrast of such a reconstruction are
    the original's, only the structure is the model's.

    Args:
        pixels: (T, 3, H, W) in [0, 1].
        prediction: (1, M, frames·height·width·3), the model's, in the order of `selection.target`.
        normalised: whether it is relative to each patch's mean and standard deviation.
    """
    t, h, w = selection.grid
    size = {"f": len(pixels) // t, "p": pixels.shape[-2] // h, "q": pixels.shape[-1] // w}
    patches = rearrange(pixels, "(t f) c (h p) (w q) -> (t h w) (f p q) c", **size).clone()
    target = selection.target[0]
    own = patches[target]  # (M, frames·height·width, 3)
    restored = prediction[0].float().view_as(own)
    if normalised:
        restored = restored * (own.var(dim=1, unbiased=True, keepdim=True).sqrt() + 1e-6) + own.mean(1, keepdim=True)
    patches[target] = restored.clamp(0, 1)
    painted = rearrange(patches, "(t h w) (f p q) c -> (t f) c (h p) (w q)", t=t, h=h, **size)
    seen, aimed = (kept_map(et.TokenSelection(part, None, (t, h, w))) for part in (selection.visible, selection.target))
    fade = choose_fade(pixels, [seen, aimed])
    targets = kept_row("targets", pixels, aimed, fade)
    rows = [
        Row("frames", pixels),
        kept_row("seen by the encoder", pixels, seen, fade),
        Row(targets.label.replace("targets", "reconstructed targets"), targets.images + (painted - pixels)),
        targets,
    ]
    return Part(rows, range(0, len(pixels), size["f"]), [f"frame {i}" for i in range(len(pixels))], title)


# --- The command ---


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    argument = parser.add_argument
    argument("draw", choices=["keep-ratios", "frames", "reconstruction"])
    argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video files, drawn below each other")
    argument("--out", type=Path, help=".png, .pdf or .svg; default: everest-DRAW.png")
    argument("--model", help="as of `everest-tokens visualize`; a reconstruction needs one")
    argument(
        "--keep-ratio",
        dest="keep_ratios",
        type=float,
        nargs="+",
        metavar="RATIO",
        help="share of the tokens to keep, several for keep-ratios (default: what the model records, else the paper's; "
        "0.5 0.25 0.15 for keep-ratios)",
    )
    argument("--distance", choices=["l2", "l1", "cosine", "cka"], help="S of Eq. 2 (default: the model's, else l2)")
    argument("--alpha", type=float, help="of frames (default: what the model records, else 1.5)")
    argument("--stride", type=int, default=4, help="frames from one sampled frame to the next (default: 4)")
    argument(
        "--start", type=int, nargs="+", metavar="FRAME", help="where the clip begins, one number for all or one each"
    )
    argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    argument("--columns", type=int, default=8, help="the most time steps in a line (default: 8)")
    argument("--layout", choices=[*LAYOUTS], default="readme", help="paper: 6.75 inches in small type, at 300 dpi")
    return parser


def figure(options: argparse.Namespace) -> Path:
    """Draw what the options say; returns the file. Raises ValueError for options that are unusable."""
    out, ratios, starts = (
        options.out or Path(f"everest-{options.draw}.png"),
        options.keep_ratios,
        options.start or [None],
    )
    check_out(out, ".png", ".pdf", ".svg")
    if ratios and len(ratios) > 1 and options.draw != "keep-ratios":
        raise ValueError(f"{options.draw} takes one keep ratio, got {len(ratios)}")
    if len(starts) not in (1, len(options.videos)):
        raise ValueError(f"expected one start, or one for each of {len(options.videos)} videos, got {len(starts)}")
    if options.draw == "reconstruction" and options.model is None:
        raise ValueError("a reconstruction needs --model: random weights reconstruct nothing")
    ratio = ratios[0] if ratios and options.draw != "keep-ratios" else None
    model = patched_model(options.model, ratio, options.distance, options.seed)
    config, num_frames = model.config, model.config.num_frames
    if options.draw == "frames":
        recorded_sampler = model.everest.frame_sampler or et.InfoFrameSampler()
        sampler = et.InfoFrameSampler(options.alpha) if options.alpha is not None else recorded_sampler
        num_frames = config.tubelet_size * sampler.num_candidates(num_frames // config.tubelet_size)
        method = partial(frames, sampler=sampler)
    elif options.draw == "keep-ratios":
        method = partial(keep_ratios, ratios=ratios or SWEEP)
    else:
        method = reconstruction
    parts = []
    for number, video in enumerate(tqdm(options.videos, desc="clips", disable=len(options.videos) == 1)):
        start = starts[number % len(starts)]
        clip = load_clip(video, num_frames=num_frames, stride=options.stride, size=config.image_size, start=start)
        parts.append(method(model, clip, video.name if len(options.videos) > 1 else "", seed=options.seed))
    import matplotlib

    if options.draw == "frames":
        parts = [line for part in parts for line in in_lines(part, options.columns)]
    width, font = LAYOUTS[options.layout]
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: publishers refuse Type 3
        draw(parts, columns=options.columns, width=width, font=font).savefig(out)
    return out


def in_lines(part: Part, columns: int) -> list[Part]:
    """All steps of a part, in lines of equal length."""
    length = math.ceil(len(part.frames) / math.ceil(len(part.frames) / columns))
    starts = range(0, len(part.frames), length)
    return [Part(part.rows, part.frames[i : i + length], part.captions, part.title * (i == 0)) for i in starts]


def main() -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("everest_tokens").setLevel(logging.INFO)
    try:
        print(f"drawn in {figure(parser().parse_args()).resolve()}")
    except (ValueError, ImportError, OSError) as error:
        print(f"paper_figures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
