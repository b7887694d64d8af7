"""Pre-train a VideoMAE with EVEREST on a folder or a list of videos.

    python examples/pretrain.py examples/recipes/own.yaml --data videos --output_dir run
    python examples/pretrain.py examples/recipes/ucf101.yaml --train_list lists/train.csv --data_root videos \\
        --output_dir run

One process or several (torchrun, accelerate launch). Killed, the same command goes on from its last complete
checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from augmentation import BatchAugmentation, TrainingGeometry
from clips import Sampling, collate
from data import load_data, training_set
from recipe import (
    PretrainingRecipe,
    check_fit,
    config_of,
    fit,
    frames_of,
    load_trained,
    loading,
    parse,
    selection_of,
)
from recorded import record
from run import TRAINING_DEFAULTS, check_found, tell, train
from selection_pictures import add_pictures, check_reporting
from trainer import VideoTrainer
from transformers import VideoMAEForPreTraining, set_seed

import everest_tokens as et


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong settings end in one line on standard error and status 2."""
    return tell(run, sys.argv[1:] if arguments is None else arguments)


def run(arguments: list[str]) -> None:
    recipe, training = parse(PretrainingRecipe, arguments, TRAINING_DEFAULTS)
    check_reporting(training, recipe.picture_steps)
    data = load_data(recipe, training)
    fit(training, recipe, data)
    set_seed(training.seed)
    model = build_model(recipe)
    et.patch_videomae(model, mask_ratio=recipe.mask_ratio, **selection_of(recipe))
    sampling = Sampling(frames_of(model), recipe.stride or None)
    trainer = VideoTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=training_set(
            data,
            recipe,
            training,
            sampling,
            TrainingGeometry(model.config.image_size, flip=recipe.flip),
        ),
        augmentation=BatchAugmentation(),
        max_bad_fraction=recipe.max_bad_fraction,
        max_bad_steps=recipe.max_bad_steps,
        recorded=record(recipe, training),
    )
    if recipe.train_list:
        check_found(data.train, "train_list")
    add_pictures(trainer, data, sampling, recipe.picture_steps)
    train(trainer, recipe, data)


def build_model(recipe: PretrainingRecipe) -> VideoMAEForPreTraining:
    """A new model, or the one to go on from. Raises ValueError for one that doesn't fit the recipe."""
    if recipe.model is None:
        return VideoMAEForPreTraining(config_of(recipe, decoder_num_hidden_layers=recipe.decoder_depth))
    if Path(recipe.model).is_file():
        with loading(recipe.model):
            model = et.load_videomae(
                recipe.model, for_pretraining=True, num_frames=recipe.num_frames, image_size=recipe.size
            )
        if not isinstance(model, VideoMAEForPreTraining):
            raise ValueError(f"model: {recipe.model} has no pixel decoder to pre-train with")
        return model
    model = load_trained(VideoMAEForPreTraining, recipe.model)
    check_fit(model, recipe)
    return model


if __name__ == "__main__":
    sys.exit(main())
