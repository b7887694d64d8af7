"""The `predict` command: what a fine-tuned classifier says of videos."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.utils import cached_file

from everest_tokens.patching import host_of
from everest_tokens.video import integer, load_views

RECORD = "recipe.json"  # of examples/finetune.py
AT_ONCE = 15  # views in a forward: what a video has in the papers' tests


def classify(
    model: Any, folder: str, videos: Sequence[Path], *, views: str = "1x1", stride: int | None = None, top: int = 5
) -> Iterator[dict[str, Any]]:
    """Classify videos by the mean of the softmax over their views.

    Args:
        model: a patched classifier, in eval mode on its device.
        folder: where it comes from, a folder or a hub id: its processor says how pixels are made, and recipe.json of
            examples/finetune.py at which stride it was trained.
        views: "CLIPSxCROPS", crops 1 or 3.
        stride: in place of the folder's; 0 takes a frame from each of equal segments.
        top: labels that are given of each video.

    Yields:
        For each video {"video", "label", "score", "top": [[label, score], …], "milliseconds": of the model,
        "reading_milliseconds": of the file}, or {"video", "problem"} for one that can't be read.

    Raises:
        ValueError: no classifier, or views, stride or top out of range.
    """
    counts = re.fullmatch("([1-9][0-9]*)x([13])", views)
    if counts is None:
        raise ValueError(f"views must be CLIPSxCROPS with 1 or 3 crops, such as 5x3, got {views!r}")
    for name, value, least in (("top", top, 1), ("stride", stride or 0, 0)):
        integer(name, value, least=least)
    if not hasattr(model, "classifier"):
        raise ValueError(f"{folder}: a {type(model).__name__}, expected a classifier")
    labels, device = model.config.id2label, next(model.parameters()).device
    reading = {"clips": int(counts[1]), "crops": int(counts[2]), **reading_of(model, folder, stride)}
    for video in videos:
        start = time.perf_counter()
        try:
            pixels = load_views(video, **reading)
        except ValueError as error:
            yield {"video": str(video), "problem": str(error)}
            continue
        read = time.perf_counter()
        with torch.inference_mode():
            scores = [model(part.to(device)).logits.float().softmax(dim=1) for part in pixels.split(AT_ONCE)]
            best = torch.cat(scores).mean(dim=0).topk(min(top, len(labels)))
        named = [
            [labels[index], round(score, 6)]
            for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        yield {
            "video": str(video),
            "label": named[0][0],
            "score": named[0][1],
            "top": named,
            "milliseconds": round(1e3 * (time.perf_counter() - read), 1),
            "reading_milliseconds": round(1e3 * (read - start), 1),
        }


def reading_of(model: Any, folder: str, stride: int | None = None) -> dict[str, Any]:
    """Arguments of `load_views` for a model's clips; stride: in place of the folder's."""
    _, frames, _, height, width = host_of(model).example(model)[0]
    stride = int(recorded(folder).get("stride", 4)) if stride is None else stride
    return {"num_frames": frames, "stride": stride, "size": (height, width), "processor": _processor(folder)}


def _processor(folder: str) -> Any:
    """What `load_views` takes of the folder's processor, its rescaling within mean and deviation; None without one.

    Raises:
        ValueError: a processor that leaves out resizing or cropping: its clips have the video's own size.
    """
    for kind in ("AutoImageProcessor", "AutoVideoProcessor"):
        try:
            found = getattr(transformers, kind).from_pretrained(folder)
            break
        except (OSError, ValueError, AttributeError):  # none of that kind, in the folder or in this transformers
            found = None
    if found is None:
        return None
    for step in ("do_resize", "do_center_crop"):
        if not getattr(found, step, True):
            raise ValueError(f"{folder}: its processor has {step}=False, and clips of any size are nothing for a model")
    scale = 255 * (found.rescale_factor if found.do_rescale else 1.0)
    shift = 1.0 if found.do_rescale and getattr(found, "offset", False) else 0.0  # ViViT's
    mean, std = (found.image_mean, found.image_std) if found.do_normalize else ([0.0] * 3, [1.0] * 3)
    return SimpleNamespace(
        image_mean=[(each + shift) / scale for each in mean],
        image_std=[each / scale for each in std],
        size=found.size,
        crop_size=getattr(found, "crop_size", None),
    )


def recorded(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what is recorded of a folder's or a hub model's training; {} where nothing is.

    Raises:
        ValueError: the file is broken, by its name.
    """
    missing = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    flags = {f"_raise_exceptions_for_{name}": value for name, value in missing.items()}
    path = Path(folder, RECORD) if Path(folder).exists() else cached_file(str(folder), RECORD, **flags)
    if not path or not Path(path).is_file():
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is broken: it holds a {type(settings).__name__}, no settings")
    return settings
