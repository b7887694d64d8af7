"""Things done to a run for which there is no setting, each in a process of its own (`training_runs.forked`)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from trainer import VideoTrainer


def before(method: str, action: Callable[..., None]) -> None:
    """Calls `action` with the arguments of a method of VideoTrainer, whenever that is called."""
    original = getattr(VideoTrainer, method)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(VideoTrainer, method, hooked)


def kill(moment: str) -> None:
    """METHOD@N: kill -9 where, after N steps, VideoTrainer's METHOD is called."""
    method, _, steps = moment.partition("@")

    def die(trainer: Any, *args: Any) -> None:
        if trainer.state.global_step == int(steps):
            os.kill(os.getpid(), signal.SIGKILL)

    before(method, die)


def tell(folder: Path) -> None:
    """Each process writes folder/rank<n>.json: the shape of each of its batches, its bad videos, its seed."""
    shapes: list[list[int]] = []
    before("compute_loss", lambda trainer, model, inputs, *_: shapes.append(list(inputs["pixel_values"].shape)))

    def write(trainer: Any, *_: Any) -> None:
        told = {"shapes": shapes, "bad": sorted(trainer.bad), "seed": torch.initial_seed()}
        (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(told))

    before("check_bad_videos", write)


def shard_on_cpu() -> None:
    """FSDP on CPUs: accelerate's works there, but its state takes the plugin on GPUs only."""
    original = AcceleratorState.__init__

    def initialise(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # what it does itself where the processes have GPUs
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialise
