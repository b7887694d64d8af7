"""Runs one of the examples' scripts with something done to it for which there is no setting.

python hooked_script.py HOOK SCRIPT [ARGUMENT …], where HOOK is

kill:METHOD@N     kill -9 where, after N steps, VideoTrainer's METHOD is called
tell:FOLDER       each process writes FOLDER/rank<n>.json: the shape of each of its batches, its bad videos, its seed
shard-on-cpu      FSDP on CPUs: accelerate's works there, but its state takes the plugin on GPUs only
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def before(method: str, action: Callable[..., None]) -> None:
    """Calls `action` with the arguments of a method of VideoTrainer, whenever that is called."""
    from trainer import VideoTrainer

    original = getattr(VideoTrainer, method)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(VideoTrainer, method, hooked)


def kill(moment: str) -> None:
    method, _, steps = moment.partition("@")

    def die(trainer: Any, *args: Any) -> None:
        if trainer.state.global_step == int(steps):
            os.kill(os.getpid(), signal.SIGKILL)

    before(method, die)


def tell(folder: str) -> None:
    import torch

    shapes: list[list[int]] = []
    before("compute_loss", lambda trainer, model, inputs, *_: shapes.append(list(inputs["pixel_values"].shape)))

    def write(trainer: Any, *_: Any) -> None:
        told = {"shapes": shapes, "bad": sorted(trainer.bad), "seed": torch.initial_seed()}
        Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(told))

    before("check_bad_videos", write)


def shard_on_cpu() -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # what it does itself where the processes have GPUs
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialise


if __name__ == "__main__":
    hook, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)  # as if the script had been called
    name, _, option = hook.partition(":")
    {"kill": kill, "tell": tell, "shard-on-cpu": lambda _: shard_on_cpu()}[name](option)
    runpy.run_path(script, run_name="__main__")
