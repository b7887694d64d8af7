"""What the training scripts share around a run: defaults of the Trainer, errors in one line, resume and the end."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from trainer import TooManyBadVideos, VideoTrainer, checkpoint_to_resume
from transformers import TrainingArguments
from video_list import Entry

logger = logging.getLogger(__name__)

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
    "ddp_find_unused_parameters": False,  # all are used: no need to look at each step
    "dataloader_num_workers": 4,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
    "use_cpu": not torch.accelerator.is_available(),  # else several processes on CPUs wouldn't know of each other
}


def tell(run: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a script's work; what the caller got wrong ends in one line on standard error and status 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    status = 0
    try:
        run(arguments)
    except (ValueError, OSError, ImportError, TooManyBadVideos) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not torch.accelerator.is_available():
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End one of several processes on CPUs without finalising the interpreter.

    Threads of gloo and of FSDP may still want it then, and a finished run would abort ("terminate called without an
    active exception"). What has registered for the end (loggers of runs) is called all the same.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def resume_point(training: TrainingArguments, recipe: Any) -> str | None:
    """The last complete checkpoint of the run's folder, or None; a line says so, and what differs from its recipe."""
    with training.main_process_first(local=False):
        checkpoint = training.resume_from_checkpoint or checkpoint_to_resume(training.output_dir)
    file, settings = Path(training.output_dir, "recipe.json"), json.loads(json.dumps(vars(recipe)))
    if checkpoint is not None:
        logger.warning("going on from %s; another --output_dir starts a new run", checkpoint)
        before = json.loads(file.read_text()) if file.is_file() else settings
        for name, value in settings.items():
            if before.get(name) != value:
                logger.warning("%s is %s now, the run began with %s", name, value, before.get(name))
    elif training.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n")
    return checkpoint


def check_found(entries: Sequence[Entry], setting: str) -> None:
    """Raise ValueError where the first videos of a list don't exist: a forgotten data_root, most likely."""
    first = entries[:5]
    if not any(entry.path.exists() for entry in first):
        raise ValueError(f"{setting}: none of its first {len(first)} videos exists, {first[0].path}: see --data_root")


def finish(trainer: VideoTrainer, videos: int) -> None:
    """Write the final model beside the checkpoints; end with an error if too much of the list was bad."""
    trainer.save_model()
    trainer.check_bad_videos(videos)
