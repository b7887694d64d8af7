"""Every setting of transformers' TrainingArguments: it works, or it is refused by naming what does its work."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from recipe import FinetuningRecipe, PretrainingRecipe, parse
from run import TRAINING_DEFAULTS
from trainer_settings import INSTEAD, OF_EVALUATION, WORKING
from transformers import TrainingArguments

FIELDS = [item.name for item in fields(TrainingArguments) if item.init]
OURS = {item.name for item in fields(FinetuningRecipe)} | {item.name for item in fields(PretrainingRecipe)}

# A value that isn't the default; where it has to come with others, these; what is found where that isn't the value.
GIVEN: dict[str, Any] = {
    "output_dir": "else", "max_steps": 7, "learning_rate": 0.5, "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0}, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.3,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "gradient_accumulation_steps": 2, "max_grad_norm": 2.0,
    "bf16": True, "fp16": True, "tf32": False, "activation_checkpointing": True, "gradient_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "torch_compile": True, "torch_compile_backend": "eager",
    "torch_compile_mode": "default", "torch_empty_cache_steps": 3, "logging_strategy": "epoch", "logging_steps": 5,
    "logging_first_step": True, "log_on_each_node": False, "log_level": "error", "log_level_replica": "error",
    "disable_tqdm": True, "report_to": ["none"], "run_name": "mine", "logging_dir": "logs", "project": "mine",
    "trackio_space_id": "mine", "trackio_bucket_id": "mine", "trackio_static_space_id": "mine",
    "save_strategy": "no", "save_steps": 5, "save_on_each_node": True, "save_total_limit": 5, "push_to_hub": True,
    "hub_token": "secret", "hub_private_repo": True, "hub_model_id": "me/mine", "hub_strategy": "end",
    "hub_always_push": True, "hub_revision": "mine", "ignore_data_skip": True, "full_determinism": True, "seed": 3,
    "data_seed": 4, "use_cpu": True, "debug": "underflow_overflow", "skip_memory_metrics": False,
    "resume_from_checkpoint": "there", "local_rank": 0, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False, "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 9, "ddp_broadcast_buffers": True, "ddp_static_graph": True, "ddp_backend": "gloo",
    "ddp_timeout": 60, "fsdp": "full_shard", "fsdp_config": {"limit_all_gathers": True},
    "eval_strategy": "no", "eval_steps": 5, "eval_delay": 2.0, "eval_on_start": True, "per_device_eval_batch_size": 3,
    "eval_accumulation_steps": 2, "eval_use_gather_object": True,
    "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True,
}  # fmt: skip
FOUND = {"report_to": []}
# transformers itself asks for another device, or for several processes
NOT_ON_THIS_MACHINE = {"bf16", "fp16", "tf32", "fsdp", "fsdp_config", "ddp_backend"}


def read(kind: Any, *arguments: str, defaults: dict[str, Any] = TRAINING_DEFAULTS) -> tuple[Any, Any]:
    needed = ["--train_list", "train.csv", *(["--model", "m"] if kind is FinetuningRecipe else [])]
    labels = ["--num_labels", "4", "--eval_list", "eval.csv"] if kind is FinetuningRecipe else []
    return parse(kind, [*arguments, *needed, *labels, "--batch_size", "8"], defaults)


def on_the_line(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]


def in_a_file(folder: Path, section: str, **settings: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({section: settings}))
    return str(path)


@pytest.fixture(autouse=True)
def _environment():
    with mock.patch.dict(os.environ):  # where older TrainingArguments leave precision and compiler for accelerate
        yield


@pytest.mark.parametrize("place", ["command line", "recipe"])
@pytest.mark.parametrize("name", FIELDS)
def test_each_works_or_is_refused(name, place, tmp_path):
    known = name in WORKING | OF_EVALUATION
    assert not known or name in GIVEN, "a setting that this test has no value for"
    value = GIVEN.get(name, 1)
    recipe = in_a_file(tmp_path, "finetuning", **{name: value})
    arguments = on_the_line(name, value) if place == "command line" else [recipe]
    if not known:
        with pytest.raises(ValueError, match=name) as refused:
            read(FinetuningRecipe, *arguments)
        assert "\n" not in str(refused.value)
        return
    with suppress(ValueError) if name in NOT_ON_THIS_MACHINE else nullcontext():
        found = getattr(read(FinetuningRecipe, *arguments)[1], name)
        if name == "debug":
            found = " ".join(found)
        if not name.startswith("fsdp"):  # it takes many forms
            assert getattr(found, "value", found) == FOUND.get(name, value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("per_device_train_batch_size", "batch_size"), ("num_train_epochs", "epochs"), ("warmup_steps", "warmup_epochs"),
     ("label_smoothing_factor", "label_smoothing"), ("do_eval", "eval_list")],
)  # fmt: skip
def test_a_refusal_names_ours(name, ours):
    with pytest.raises(ValueError, match=rf"{name} is no setting here: .*\b{ours}\b"):
        read(FinetuningRecipe, f"--{name}", "1")
    assert ours in OURS


def test_predictions_are_needed():
    with pytest.raises(ValueError, match="prediction_loss_only is no setting here: accuracy, and the tables"):
        read(FinetuningRecipe, "--prediction_loss_only", "true")


def test_what_is_refused_is_not_said_to_work():
    assert not INSTEAD.keys() & (WORKING | OF_EVALUATION)
    assert not WORKING & OF_EVALUATION
    assert set(TRAINING_DEFAULTS) <= set(FIELDS)


@pytest.mark.parametrize("name", sorted(OF_EVALUATION))
def test_pretraining_has_no_evaluation(name):
    with pytest.raises(ValueError, match=f"{name} needs an evaluation"):
        read(PretrainingRecipe, *on_the_line(name, GIVEN[name]))


class TestWhatCounts:
    """Of settings that say the same, the one nearer to the user; what is set is what runs."""

    @pytest.mark.parametrize("spelt", ["--learning_rate", "--learning-rate"])
    def test_a_rate_on_the_command_line(self, spelt, tmp_path):
        file = in_a_file(tmp_path, "pretraining", base_lr=1.0)
        assert read(PretrainingRecipe, file, spelt, "0.25")[1].learning_rate == 0.25

    def test_a_rate_in_a_recipe(self, tmp_path):
        file = in_a_file(tmp_path, "pretraining", learning_rate=0.25)
        assert read(PretrainingRecipe, file)[1].learning_rate == 0.25
        assert read(PretrainingRecipe, file, "--base_lr", "32")[1].learning_rate == 1.0  # at 8 of 256 clips
        assert read(PretrainingRecipe, "--base_lr", "64")[1].learning_rate == 2.0

    @pytest.mark.parametrize("names", [("learning_rate", "base_lr"), ("max_steps", "epochs")])
    def test_two_in_one_place_are_refused(self, names, tmp_path):
        for place in ([in_a_file(tmp_path, "pretraining", **dict.fromkeys(names, 3))],
                      [f"--{names[0]}", "3", f"--{names[1]}", "3"]):  # fmt: skip
            with pytest.raises(ValueError, match="say the same in two ways"):
                read(PretrainingRecipe, *place)

    def test_epochs_on_the_command_line_against_steps_in_a_recipe(self, tmp_path):
        file = in_a_file(tmp_path, "pretraining", max_steps=7)
        assert read(PretrainingRecipe, file)[1].max_steps == 7
        training = read(PretrainingRecipe, file, "--epochs", "3")[1]
        assert (training.max_steps, training.num_train_epochs) == (-1, 3)

    def test_intervals_bring_their_strategy(self, tmp_path):
        """Ours are "epoch", so that --save_steps alone would do nothing."""
        assert read(FinetuningRecipe)[1].save_strategy == read(FinetuningRecipe)[1].eval_strategy == "epoch"
        _, training = read(FinetuningRecipe, "--save_steps", "5", "--eval_steps", "7")
        assert (training.save_strategy, training.save_steps) == ("steps", 5)
        assert (training.eval_strategy, training.eval_steps) == ("steps", 7)
        file = in_a_file(tmp_path, "finetuning", save_steps=5)
        assert read(FinetuningRecipe, file, "--save_strategy", "epoch")[1].save_strategy == "epoch"
        with pytest.raises(ValueError, match="save_strategy and save_steps"):
            read(FinetuningRecipe, "--save_strategy", "epoch", "--save_steps", "5")

    def test_no_evaluation_is_no_evaluation(self):
        assert read(FinetuningRecipe, "--eval_strategy", "no")[1].eval_strategy == "no"

    def test_names_are_whole(self):
        with pytest.raises(ValueError, match="no such setting: --learning_r "):
            read(PretrainingRecipe, "--learning_r", "0.5")

    def test_a_value_that_is_missing_in_a_recipe(self, tmp_path):
        file = in_a_file(tmp_path, "pretraining", save_total_limit=None)
        with pytest.raises(ValueError, match="save_total_limit has no value; without its line it is 2"):
            read(PretrainingRecipe, file)

    @pytest.mark.parametrize(
        ("arguments", "precision"),
        [([], "bf16"), (["--bf16", "false"], "no"), (["--fp16", "true"], "fp16"), (["--use_cpu", "true"], "no")],
    )
    def test_the_precision_of_a_gpu_reaches_accelerate(self, arguments, precision, monkeypatch):
        """On a machine without one, as far as TrainingArguments look."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        seen = {}

        class Stop(Exception):
            pass

        def look(**settings: Any) -> None:
            seen.update(settings)
            raise Stop

        monkeypatch.setattr("recipe.TrainingArguments.__init__", lambda self, **settings: look(**settings))
        with pytest.raises(Stop):
            read(PretrainingRecipe, *arguments, defaults=TRAINING_DEFAULTS | {"use_cpu": False})
        assert {name for name in ("bf16", "fp16") if seen[name]} == {precision} - {"no"}
