"""What the scripts share around a run: defaults of the Trainer, errors in one line and statuses, begin and end."""

from __future__ import annotations

import atexit
import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from checkpoints import checkpoint_to_resume
from data import Data
from guards import MachineFailed, RunEnded, alone_in, peer_lost, worker_died, worker_killed
from plan import Timing, plan
from recipe import FinetuningRecipe, Recipe
from recorded import check_goes_on, write
from trainer import VideoTrainer
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
    """Run a script's work; what ends it ends in a line on standard error and a status of guards.py's table."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    status, message = 0, ""
    try:
        run(arguments)
    except RunEnded as error:
        status, message = error.status, str(error)
    except (ValueError, OSError, ImportError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        status, message = MachineFailed.status if full else 2, str(error)
        if "\nOriginal Traceback " in message:  # of a loader's worker, as text
            message = message.rpartition(f"\n{type(error).__name__}: ")[2].strip()
    except RuntimeError as error:
        failed = worker_killed(error, "Run it again as it is") if worker_died(error) else peer_lost(error)
        if failed is None:
            raise
        status, message = failed.status, str(failed)
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
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


def train(trainer: VideoTrainer, recipe: Recipe, data: Data) -> None:
    """Say what will happen, train in output_dir, alone there, from its last complete checkpoint on, and write the final
    model beside it.

    Raises:
        ValueError: output_dir is in use, or holds another kind of run.
        RunEnded: the run ended before its time, or too much of the list was bad.
    """
    training = trainer.args
    folder = Path(training.output_dir)
    with alone_in(folder) if training.process_index == 0 else nullcontext():
        with training.main_process_first(local=False):
            given = training.resume_from_checkpoint
            if given and not Path(given).is_dir():
                raise ValueError(f"resume_from_checkpoint: {given} is no folder")
            checkpoint = checkpoint_to_resume(folder)
            if given and (checkpoint is None or Path(given).resolve().parent == folder.resolve()):
                checkpoint = given  # else the run that began from it has come further
            check_goes_on(checkpoint, training.output_dir, trainer.recorded)
            if training.process_index == 0:
                write(folder, trainer.recorded)
                logger.info("%s", _plan(trainer, recipe, data))
        trainer.add_callback(Timing())
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if trainer.eval_dataset is not None:
            trainer.log_metrics("eval", trainer.evaluate())
        trainer.check_bad_videos(data.videos)


def _plan(trainer: VideoTrainer, recipe: Recipe, data: Data) -> str:
    training, videos_a_step = trainer.args, recipe.batch_size // recipe.repeats
    in_epoch = data.videos // videos_a_step
    return plan(
        trainer.model,
        clips=data.videos,
        held_out=len(data.held_out),
        labels=list(trainer.model.config.id2label.values()) if isinstance(recipe, FinetuningRecipe) else [],
        skipped=data.skipped,
        batch=recipe.batch_size,
        at_once=training.train_batch_size * recipe.repeats,
        epochs=training.max_steps / in_epoch if training.max_steps > 0 else recipe.epochs,
        steps=training.max_steps if training.max_steps > 0 else math.ceil(recipe.epochs * in_epoch),
        keep_ratios=getattr(recipe, "keep_ratios", ()),
    )


def check_found(entries: Sequence[Entry], setting: str) -> None:
    """Raise ValueError where the first videos of a list don't exist: a forgotten data_root, most likely."""
    first = entries[:5]
    if not any(entry.path.exists() for entry in first):
        raise ValueError(f"{setting}: none of its first {len(first)} videos exists, {first[0].path}: see --data_root")
