"""What the training scripts share around a run: defaults of the Trainer, errors in one line, resume and the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import TooManyBadVideos, VideoTrainer, checkpoint_to_resume
from transformers import TrainingArguments

# transformers' settings where Tables 7 and 8, or a long run on videos, want others than its own
TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "everest-run",
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "weight_decay": 0.05,
    "adam_beta2": 0.95,  # pre-training's; fine-tuning's recipes say 0.999
    "max_grad_norm": 0.0,  # VideoMAE doesn't clip
    "logging_steps": 1,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "remove_unused_columns": False,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 4,
    "report_to": "none",
}


def tell(run: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a script's work; what the caller got wrong ends in one line on standard error and status 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        run(arguments)
    except (ValueError, OSError, ImportError, TooManyBadVideos) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0


def resume_point(training: TrainingArguments) -> str | None:
    """The last complete checkpoint of the run's folder, or None."""
    with training.main_process_first(local=False):
        return training.resume_from_checkpoint or checkpoint_to_resume(training.output_dir)


def finish(trainer: VideoTrainer, videos: int) -> None:
    """Write the final model beside the checkpoints; end with an error if too much of the list was bad."""
    trainer.save_model()
    trainer.check_bad_videos(videos)
