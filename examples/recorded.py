"""What a model was trained with, in its folder: read when a run goes on, and when the model is tested."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from everest_tokens.prediction import RECORD as FILE
from everest_tokens.prediction import recorded as read
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

# Of TrainingArguments, what a run learns with.
_RATES = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
_REST = ("optim", "lr_scheduler_type", "max_steps", "seed")
# What can't change within a run: the model's shape, what is held out, and what its place in the schedule is counted in.
_FIXED = (
    *("backbone", "num_frames", "size", "patch_size", "decoder_depth", "num_labels", "labels"),
    *("val_fraction", "batch_size", "repeats", "optim"),
)


def record(
    recipe: Any, training: TrainingArguments, labels: Sequence[str] = (), held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """All that a model is trained with, for JSON: section, settings, rates, mean and deviation of pixels, names of the
    labels, and of videos that were held out.
    """
    settings = {"section": recipe.section, **vars(recipe), "labels": labels, "held_out": held_out}
    settings |= {name: getattr(training, name) for name in (*_RATES, *_REST)}
    return json.loads(json.dumps(settings | {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}))


def write(folder: Path, recorded: dict[str, Any]) -> None:
    """Write it whole, or leave what was there: a kill or a full disk may come at any moment."""
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / FILE)


def check_goes_on(checkpoint: str | None, output_dir: str, now: dict[str, Any]) -> None:
    """Say what a run is given otherwise than it had it in its checkpoint, or that a new run begins.

    Raises:
        ValueError: output_dir is the folder of the model to begin with, or the run that is there, or that the
            checkpoint is of, is none that this one can go on with.
    """
    model = now.get("model")
    if model and Path(model).exists() and Path(output_dir).exists() and os.path.samefile(model, output_dir):
        raise ValueError(f"output_dir: {output_dir} is the folder of model: give another")
    before = read(checkpoint or output_dir)
    own = checkpoint is None or Path(checkpoint).resolve().parent == Path(output_dir).resolve()
    holds = f"output_dir: {output_dir} holds a run" if own else f"resume_from_checkpoint: {checkpoint} is of a run"
    if before.get("section", now["section"]) != now["section"]:
        raise ValueError(f"{holds} of {before['section']}: give {now['section']} another")
    if checkpoint is None:
        return
    logger.warning("going on from %s; another --output_dir starts a new run", checkpoint)
    for name, value in now.items():
        old = before.get(name, value)
        if old == value:
            continue
        if name in _FIXED:
            raise ValueError(f"{holds} with {name} {old}, not {value}: give another")
        if name == "model":
            logger.warning("model is %s now: not read, %s has the weights of this run", value, checkpoint)
        else:
            logger.warning("%s is %s from here on, it was %s", name, value, old)
