"""What a model keeps of one fixed clip, as a picture in TensorBoard or W&B, every so many steps of its training.

transformers reports the curves themselves (`--report_to tensorboard`, or wandb); this is what it lacks:

    python examples/finetune.py … --report_to tensorboard --picture_steps 500
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clips import MAX_REPLACEMENTS, Sampling, TestViews
from data import Data
from streams import Sample, Stream
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

import everest_tokens as et
from everest_tokens.drawing import frames_of
from everest_tokens.visualization import draw, pixels_of, selection_part

# report_to → the packages one of which it needs; the first is the name of our extra too
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_reporting(training: TrainingArguments, picture_steps: int) -> None:
    """Raise ValueError where what a run is to report to isn't installed, or pictures have nowhere to go."""
    for name in training.report_to:
        if not any(find_spec(package) for package in PACKAGES.get(name, ("sys",))):
            extra = f"in a clone, pip install -e '.[{name}]'"
            raise ValueError(f"report_to {name} needs the package {PACKAGES[name][0]}: {extra}")
    if picture_steps and not PACKAGES.keys() & set(training.report_to):
        raise ValueError(f"picture_steps {picture_steps} draws for report_to {' or '.join(PACKAGES)}: give one of them")
    if picture_steps and training.fsdp:
        raise ValueError(
            f"picture_steps {picture_steps}: what a model that is sharded keeps can't be looked at; give 0"
        )


def fixed_clip(data: Data, sampling: Sampling, size: int) -> Tensor:
    """The central clip of the first video that can be read, held out if any is: uint8 (1, T, 3, size, size).

    Raises:
        ValueError: none of the first 32 can be read.
    """
    videos: Any = data.held_out or data.train
    if isinstance(videos, Stream):
        rows = enumerate(videos.samples)
        videos = (Sample(Path(str(number)), None, row[data.train.video]) for number, row in rows)
    problem = ""
    for entry in islice(videos, MAX_REPLACEMENTS):
        view = TestViews([entry], sampling, clips=1, crops=1, size=size)[0]
        if not (problem := view["problem"]):
            return view["pixel_values"]
    raise ValueError(f"picture_steps: none of the first videos can be read: {problem}")


class SelectionPictures(TrainerCallback):
    """Draws, before the first step and every `steps`, what the model would train on of a clip.

    A step's own random choices, and those of the training, stay as they are without it.

    Args:
        trainer: VideoTrainer, whose reports get the picture.
        clip: uint8 (1, T, 3, S, S), of as many frames as the model takes in training.
        steps: of the optimiser from one picture to the next.
    """

    def __init__(self, trainer: Any, clip: Tensor, steps: int) -> None:
        self.trainer, self.clip, self.steps = trainer, clip, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        image = self.image()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("selection", image, state.global_step, dataformats="HWC")
        if "wandb" in args.report_to:
            import wandb

            wandb.log({"selection": wandb.Image(image), "train/global_step": state.global_step})

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8: the clip's frames (those that a sampler draws), the kept tokens, their importance."""
        model = self.trainer.model
        clip, _ = self.trainer.augmentation(self.clip.to(self.trainer.args.device), None, False)
        selection = et.select_tokens(model, clip, generator=torch.Generator(clip.device).manual_seed(0))
        frames = frames_of(model, pixels_of(clip), selection)
        canvas = draw([selection_part(frames, {"kept": selection})]).canvas
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def add_pictures(trainer: Any, data: Data, sampling: Sampling, steps: int) -> None:
    """Have a trainer draw, where steps isn't 0."""
    if steps:
        clip = fixed_clip(data, sampling, trainer.model.config.image_size)
        trainer.add_callback(SelectionPictures(trainer, clip, steps))
