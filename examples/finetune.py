"""Fine-tune a VideoMAE with EVEREST on a folder of videos for each label, or on labelled lists.

    python examples/finetune.py examples/recipes/own.yaml --model run --data videos --output_dir fine-tuned
    python examples/finetune.py examples/recipes/ucf101.yaml --model run --train_list lists/train.csv \\
        --eval_list lists/val.csv --data_root videos --output_dir fine-tuned

`--model` is a folder that pretrain.py wrote, a hub id, or a .pth of VideoMAE, VideoMAE V2, MME, MVD or EVEREST; without
it a new model is trained. `--keep_ratios 0.2 0.3 0.45 0.6 1.0` draws each step's keep ratio, so that one model serves
every budget. What is written beside the model is product.py's table. One process or several (torchrun, accelerate
launch). Killed, the same command goes on from its last complete checkpoint.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from augmentation import BatchAugmentation, TrainingGeometry
from clips import Sampling, TestViews, collate
from data import load_data, training_set
from keep_ratios import KeepRatios
from product import score, write_product
from recipe import FinetuningRecipe, check_fit, config_of, fit, frames_of, load_trained, loading, parse, selection_of
from recorded import record
from run import TRAINING_DEFAULTS, check_found, tell, train
from selection_pictures import add_pictures, check_reporting
from trainer import VideoTrainer
from transformers import EarlyStoppingCallback, VideoMAEForVideoClassification, set_seed

import everest_tokens as et

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong settings end in one line on standard error and status 2."""
    return tell(run, sys.argv[1:] if arguments is None else arguments)


def run(arguments: list[str]) -> None:
    defaults = TRAINING_DEFAULTS | {"adam_beta2": 0.999}
    recipe, training = parse(FinetuningRecipe, arguments, defaults)
    check_reporting(training, recipe.picture_steps)
    data = load_data(recipe, training)
    fit(training, recipe, data)
    set_seed(training.seed)
    model = build_model(recipe)
    if data.labels:
        model.config.id2label = dict(enumerate(data.labels))
        model.config.label2id = {label: number for number, label in enumerate(data.labels)}
    et.patch_videomae(model, drop_path=recipe.drop_path, **selection_of(recipe))
    size, sampling = model.config.image_size, Sampling(frames_of(model), recipe.stride or None)
    magnitude, deviation = recipe.randaugment
    accuracy = Accuracy()
    callbacks: list[Any] = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping else []
    callbacks += [KeepRatios(recipe.keep_ratios)] if recipe.keep_ratios else []
    trainer = VideoTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=training_set(
            data,
            recipe,
            training,
            sampling,
            TrainingGeometry(size, flip=recipe.flip, randaugment=(magnitude, deviation) if magnitude else None),
        ),
        eval_dataset=TestViews(data.held_out, sampling, clips=1, crops=1, size=size) if data.held_out else None,
        augmentation=BatchAugmentation(recipe.num_labels, recipe.erasing, recipe.mixup, recipe.cutmix),
        compute_metrics=accuracy,
        callbacks=callbacks,
        layer_decay=recipe.layer_decay,
        balanced=recipe.balanced,
        label_smoothing=recipe.label_smoothing,
        max_bad_fraction=recipe.max_bad_fraction,
        max_bad_steps=recipe.max_bad_steps,
        recorded=record(recipe, training, data.labels, data.held_out_names),
    )
    if recipe.train_list:
        check_found(data.train, "train_list")
    add_pictures(trainer, data, sampling, recipe.picture_steps)
    train(trainer, recipe, data)
    if training.process_index == 0:
        scores = score([entry.label for entry in data.held_out], *accuracy.last) if data.held_out else None
        write_product(Path(training.output_dir), model, trainer.recorded, scores)


class Accuracy:
    """Top-1 of the single view that evaluation during training takes; examples/evaluate.py takes several.

    `last` are the labels (N,), negative where a video couldn't be read, and the logits (N, C) of the last evaluation.
    """

    last: tuple[np.ndarray, np.ndarray]

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.last = prediction.label_ids, prediction.predictions
        return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}


def build_model(recipe: FinetuningRecipe) -> VideoMAEForVideoClassification:
    """The pre-trained encoder with a classifier. Raises ValueError for a checkpoint that doesn't fit the recipe."""
    if recipe.model is None:
        logger.warning("no model is given: a new one is trained, %s, from random weights", recipe.backbone)
        config = config_of(recipe, num_labels=recipe.num_labels, use_mean_pooling=True)
        return VideoMAEForVideoClassification(config)
    if Path(recipe.model).is_file():
        with loading(recipe.model):
            return et.load_videomae(
                recipe.model,
                family=recipe.family,
                num_labels=recipe.num_labels,
                num_frames=recipe.num_frames,
                image_size=recipe.size,
            )
    if recipe.family:
        raise ValueError(f"family is of a .pth, {recipe.model} is none")
    model = load_trained(
        VideoMAEForVideoClassification,
        recipe.model,
        new=("classifier.", "fc_norm."),
        num_labels=recipe.num_labels,
        use_mean_pooling=True,
        ignore_mismatched_sizes=True,
    )
    check_fit(model, recipe)
    return model


if __name__ == "__main__":
    sys.exit(main())
