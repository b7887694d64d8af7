"""Fine-tune a VideoMAE with EVEREST on a labelled list of videos.

    python examples/finetune.py examples/recipes/ucf101.yaml --model run --train_list lists/train.csv \\
        --eval_list lists/val.csv --data_root videos --output_dir fine-tuned

`--model` is a folder that pretrain.py wrote, a hub id, or a .pth of VideoMAE, VideoMAE V2, MME, MVD or EVEREST. One
process or several (torchrun, accelerate launch). Killed, the same command goes on from its last complete checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from augmentation import BatchAugmentation, TrainingGeometry
from clips import Sampling, TestViews, TrainingClips, collate
from recipe import FinetuningRecipe, check_fit, frames_of, load_trained, loading, parse, selection_of, set_warmup
from recorded import record
from run import TRAINING_DEFAULTS, check_found, tell, train
from trainer import VideoTrainer
from transformers import VideoMAEForVideoClassification, set_seed
from video_list import read_list

import everest_tokens as et


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong settings end in one line on standard error and status 2."""
    return tell(run, sys.argv[1:] if arguments is None else arguments)


def run(arguments: list[str]) -> None:
    defaults = TRAINING_DEFAULTS | {"adam_beta2": 0.999}
    recipe, training = parse(FinetuningRecipe, arguments, defaults)
    entries = read_list(recipe.train_list, recipe.data_root, labelled=True, num_labels=recipe.num_labels)
    held_out = None
    if recipe.eval_list:
        held_out = read_list(recipe.eval_list, recipe.data_root, labelled=True, num_labels=recipe.num_labels)
    set_warmup(training, recipe, len(entries))
    set_seed(training.seed)
    model = build_model(recipe)
    et.patch_videomae(model, drop_path=recipe.drop_path, **selection_of(recipe))
    size, sampling = model.config.image_size, Sampling(frames_of(model), recipe.stride or None)
    magnitude, deviation = recipe.randaugment
    trainer = VideoTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=TrainingClips(
            entries,
            sampling,
            TrainingGeometry(size, flip=recipe.flip, randaugment=(magnitude, deviation) if magnitude else None),
            repeats=recipe.repeats,
            seed=training.seed,
        ),
        eval_dataset=None if held_out is None else TestViews(held_out, sampling, clips=1, crops=1, size=size),
        augmentation=BatchAugmentation(recipe.num_labels, recipe.erasing, recipe.mixup, recipe.cutmix),
        compute_metrics=accuracy,
        layer_decay=recipe.layer_decay,
        label_smoothing=recipe.label_smoothing,
        max_bad_fraction=recipe.max_bad_fraction,
        max_bad_steps=recipe.max_bad_steps,
        recorded=record(recipe, training),
    )
    check_found(entries, "train_list")
    train(trainer, len(entries))


def accuracy(prediction: Any) -> dict[str, float]:
    """Top-1 of the single view that evaluation during training takes; examples/evaluate.py takes several."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=1) == prediction.label_ids))}


def build_model(recipe: FinetuningRecipe) -> VideoMAEForVideoClassification:
    """The pre-trained encoder with a classifier. Raises ValueError for a checkpoint that doesn't fit the recipe."""
    if Path(recipe.model).is_file():
        with loading(recipe.model):
            return et.load_videomae(
                recipe.model,
                family=recipe.family,
                num_labels=recipe.num_labels,
                num_frames=recipe.num_frames,
                image_size=recipe.size,
            )
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
