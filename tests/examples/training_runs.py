"""Runs of the training scripts and what they leave: in processes of their own, or a Trainer on clips in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from augmentation import BatchAugmentation
from checkpoints import complete_checkpoints
from clips import collate
from safetensors.torch import load_file
from torch import Tensor
from trainer import VideoTrainer
from transformers import TrainingArguments, VideoMAEForPreTraining

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = str(EXAMPLES / "recipes" / "tiny.yaml")
QUIET = ["--disable_tqdm", "true"]
ON_CPU = ["--use_cpu", "--dataloader_num_workers", "0", *QUIET]


def torchrun(script: str, *arguments: Any, processes: int) -> subprocess.CompletedProcess[str]:
    """Run a script as several processes, as its users do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(EXAMPLES / f"{script}.py"), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def last_state(run: Path) -> dict[str, Any]:
    return json.loads((complete_checkpoints(run)[-1] / "trainer_state.json").read_text())


def losses(run: Path) -> dict[int, float]:
    """Step → loss, from the last checkpoint of a run."""
    return {line["step"]: line["loss"] for line in last_state(run)["log_history"] if "loss" in line}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    else:
        assert actual == expected


class Clips(torch.utils.data.Dataset):
    """Random clips and labels in memory."""

    def __init__(self, model: Any, count: int = 8, labelled: bool = True, unreadable: tuple[int, ...] = ()) -> None:
        config, generator = model.config, torch.Generator().manual_seed(0)
        shape = (count, 1, config.num_frames, 3, config.image_size, config.image_size)
        self.pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(count).view(count, 1) % 5 if labelled else None
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"pixel_values": self.pixels[i], "problem": "gone" if i in self.unreadable else ""}
        return item if self.labels is None else {**item, "labels": self.labels[i]}


def video_trainer(model: Any, out: Path, count: int = 8, callbacks: Any = (), **settings: Any) -> VideoTrainer:
    """Trains on `count` clips in batches of four, six steps and a checkpoint every two, if nothing else is set."""
    labelled = not isinstance(model, VideoMAEForPreTraining)
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 6, "save_steps": 2,
                "logging_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.05}  # fmt: skip
    training = TrainingArguments(str(out), use_cpu=True, report_to="none", remove_unused_columns=False,
                                 dataloader_drop_last=True, disable_tqdm=True, **defaults | settings)  # fmt: skip
    return VideoTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=Clips(model, count, labelled=labelled),
        eval_dataset=Clips(model, count, labelled=labelled),
        augmentation=BatchAugmentation(5 if labelled else None),
        layer_decay=0.75 if labelled else 1.0,
        callbacks=list(callbacks),
    )
