"""What makes the folder of a fine-tuned model something that others can use: processor, labels, model card, metrics.

preprocessor_config.json   transformers' VideoMAEImageProcessor with the size, mean and deviation that were trained with
README.md                  a model card in the hub's format
metrics.json               of the held-out videos, one central clip each
confusion.csv, .png        how many videos of each label (rows) were taken for which (columns)
per_class.csv              videos, correct ones and accuracy of each label
run.json                   the exact command, and the versions of what it ran with

Label names are in the model's config. Where nothing was held out there are no metrics.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from plan import either
from transformers import VideoMAEImageProcessor

_PACKAGES = ("everest-tokens", "torch", "torchvision", "transformers", "accelerate", "av", "torchcodec", "datasets")
# Settings that the card tells in words, or that would tell where somebody keeps what.
_ABOUT_DATA = ("data", "data_root", "train_list", "eval_list", "model", "labels", "held_out")
_NAMED = 60  # more labels than this don't fit beside the picture


@dataclass(frozen=True)
class Scores:
    """Predictions for held-out videos.

    Args:
        confusion: int64 (C, C), how many videos of label i (row) were taken for j; without the unreadable ones.
        videos: int64 (C,), of each label, the unreadable ones included: they count as wrong.
    """

    confusion: np.ndarray
    videos: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.videos.sum())

    @property
    def per_class(self) -> np.ndarray:
        """float64 (C,); NaN for a label without videos."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.videos

    def metrics(self) -> dict[str, Any]:
        """For JSON, shares from 0 to 1."""
        unreadable = int(self.videos.sum() - self.confusion.sum())
        mean = float(np.nanmean(self.per_class))
        return {
            "videos": int(self.videos.sum()),
            "unreadable": unreadable,
            "accuracy": self.accuracy,
            "mean_class_accuracy": mean,
        }


def score(labels: Sequence[int], seen: np.ndarray, logits: np.ndarray) -> Scores:
    """Count predictions.

    Args:
        labels: of all videos.
        seen: (N,), of those that were predicted for, in any order; negative where one couldn't be read.
        logits: (N, C).
    """
    number = logits.shape[1]
    confusion = np.zeros((number, number), np.int64)
    readable = seen >= 0
    np.add.at(confusion, (seen[readable], logits[readable].argmax(axis=1)), 1)
    return Scores(confusion, np.bincount(labels, minlength=number))


def write_product(folder: Path, model: Any, recorded: dict[str, Any], scores: Scores | None) -> None:
    """Write all of the above into the folder of a saved model.

    Args:
        model: a patched VideoMAEForVideoClassification.
        recorded: what it was trained with: recipe.json's content.
        scores: of held-out videos.
    """
    size, labels = model.config.image_size, list(model.config.id2label.values())
    VideoMAEImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(recorded["mean"]),
        image_std=list(recorded["std"]),
    ).save_pretrained(folder)
    run = {"command": shlex.join([Path(sys.executable).name, *without_token(sys.argv)]), "versions": versions()}
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    if scores is not None:
        (folder / "metrics.json").write_text(json.dumps(scores.metrics(), indent=1) + "\n")
        _write_tables(folder, labels, scores)
        _draw(labels, scores).savefig(folder / "confusion.png", dpi=100)
    card(folder.resolve().name, model, recorded, labels, scores, run).save(folder / "README.md")


def without_token(arguments: Sequence[str]) -> list[str]:
    """Mask the value of `--hub_token`, in either of its spellings: the folder is for others."""
    shown, masks = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_token = name in ("--hub_token", "--hub-token")
        shown.append("***" if masks else f"{name}=***" if is_token and equals else argument)
        masks = is_token and not equals
    return shown


def versions() -> dict[str, str]:
    """Of Python and of what is installed of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_tables(folder: Path, labels: Sequence[str], scores: Scores) -> None:
    with open(folder / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *labels])
        writer.writerows([label, *row.tolist()] for label, row in zip(labels, scores.confusion, strict=True))
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "videos", "correct", "accuracy"])
        for label, videos, correct in zip(labels, scores.videos, np.diag(scores.confusion), strict=True):
            writer.writerow([label, videos, correct, round(correct / videos, 4) if videos else ""])


def _draw(labels: Sequence[str], scores: Scores) -> Any:
    """The confusion matrix with rows as shares of their label, and each label's accuracy beside it."""
    from matplotlib.figure import Figure

    number = len(labels)
    side = min(max(0.3 * number, 3.0), 14.0)
    figure = Figure(figsize=(side + 3, side + 1), layout="constrained")
    matrix, bars = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    shares = scores.confusion / np.maximum(scores.videos, 1)[:, None]
    matrix.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    matrix.set(
        xlabel="predicted", ylabel="label", title=f"accuracy {100 * scores.accuracy:.1f} % of {scores.videos.sum()}"
    )
    bars.barh(range(number), np.nan_to_num(100 * scores.per_class), color="tab:blue")
    bars.set(xlim=(0, 100), xlabel="correct, %")
    if number <= _NAMED:
        matrix.set_xticks(range(number), labels, rotation=90)
        matrix.set_yticks(range(number), labels)
    if number <= 12:
        for row, column in np.argwhere(scores.confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            matrix.text(column, row, str(scores.confusion[row, column]), ha="center", va="center", color=colour)
    return figure


def card(
    name: str, model: Any, recorded: dict[str, Any], labels: Sequence[str], scores: Scores | None, run: dict[str, Any]
) -> ModelCard:
    """The model card; what the run doesn't know (licence, intended use) is left to fill in."""
    source = recorded.get("model")
    given = recorded.get("data") or recorded.get("train_list") or "a list"
    data = Path(given).resolve().name if Path(given).exists() or given.startswith("/") else given
    results = None
    if scores is not None:
        values = scores.metrics()
        results = [
            EvalResult("video-classification", data, f"{data}, held out", metric, round(values[metric], 4))
            for metric in ("accuracy", "mean_class_accuracy")
        ]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-classification",
        tags=["videomae", "everest-tokens"],
        base_model=source if source and not Path(source).exists() else None,
        model_name=name,
        eval_results=results,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{_text(name, model, recorded, labels, scores, run, data)}")


def _text(
    name: str,
    model: Any,
    recorded: dict[str, Any],
    labels: Sequence[str],
    scores: Scores | None,
    run: dict[str, Any],
    data: str,
) -> str:
    config = model.config
    tubelet = config.tubelet_size
    frames = tubelet * model.everest.num_candidates(config.num_frames // tubelet)
    stride = recorded["stride"]
    apart = f"{stride} apart" if stride else "one out of each of as many equal segments of the video"
    sampled = frames != config.num_frames
    patched = "et.patch_videomae(pipe.model)  # the selection that it was trained with is in its config"
    if sampled:
        patched += (
            f"\n# its frame sampler draws {config.num_frames} out of {frames} frames: pipe(video, num_frames={frames})"
        )
    ratios = recorded.get("keep_ratios") or []
    share = f"{recorded.get('keep_tokens') or recorded['keep_ratio']:g}"
    for_budgets = ""
    if ratios:
        for_budgets = (
            f"\n\nEach step of its training kept {either(ratios)} of the tokens, drawn anew, so that it serves all of"
            f" these budgets; {share} is what it keeps unless told otherwise (`keep_ratio` below)."
        )
        patched += f"\npipe.model.everest.selector.keep_ratio = {min(ratios):g}  # or another share of the tokens"
    if scores is None:
        results = "No videos were held out: how well it does is not known."
    else:
        values = scores.metrics()
        results = (
            f"{100 * values['accuracy']:.1f} % of {values['videos']} held-out videos are right, one central clip each"
            f" (mean over labels {100 * values['mean_class_accuracy']:.1f} %; unreadable and counted as wrong:"
            f" {values['unreadable']}). `per_class.csv` and `confusion.csv` have every label.\n\n"
            "![Which label was taken for which](confusion.png)"
        )
    settings = "\n".join(f"| {key} | {value} |" for key, value in recorded.items() if key not in _ABOUT_DATA)
    shown = ", ".join(labels[:50]) + (f", … ({len(labels)} in all: `config.id2label`)" if len(labels) > 50 else "")
    installed = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    return f"""# {name}

A VideoMAE that tells {len(labels)} labels apart: {shown}.

Fine-tuned with [EVEREST](https://arxiv.org/abs/2211.10636)'s token selection, keeping {share} of a
clip's tokens, on clips of {config.num_frames} frames of {config.image_size}² pixels, {apart}.{for_budgets}

**Licence:** to be filled in, `license:` above too.

## How to use it

With transformers alone, on all tokens:

```python
from transformers import pipeline

pipe = pipeline("video-classification", "{name}")
pipe("video.mp4")
```

From transformers 5.23 on the pipeline decodes with torchcodec, which needs FFmpeg's libraries. Without them, with PyAV:

```python
from transformers.video_utils import load_video

video, _ = load_video("video.mp4", num_frames={frames})
pipe(video)
```

With `everest_tokens`, on as many tokens as in training, which is faster:

```python
import everest_tokens as et

{patched}
```

Which frames of a video the pipeline takes is for transformers to say: since 5.23 they are spread over the video, before
they were its first ones. Clips as in training come from
`everest_tokens.video.load_clip("video.mp4", num_frames={frames}, stride={stride or "…"}, size={config.image_size})`.

## Results

{results}

## Training

Data: {data}. Begun from: {Path(recorded["model"]).name if recorded.get("model") else "random weights"}.

| setting | |
|---|---|
{settings}

Versions: {installed}.
"""
