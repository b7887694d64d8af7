"""transformers' TrainingArguments as settings of the scripts: each works, or is refused by naming what does its work.

A setting that this file doesn't know, of a newer transformers say, is refused too: accepting it would not make it work.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

# Handed on to the Trainer as they are.
WORKING = frozenset(
    """
    output_dir max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name logging_dir project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    save_strategy save_steps save_on_each_node save_total_limit
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    ignore_data_skip full_determinism seed data_seed use_cpu debug skip_memory_metrics resume_from_checkpoint local_rank
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config
    """.split()  # noqa: SIM905
)
# These too, where an evaluation takes place.
OF_EVALUATION = frozenset(
    """
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    eval_accumulation_steps eval_use_gather_object load_best_model_at_end metric_for_best_model greater_is_better
    """.split()  # noqa: SIM905
)
# Why others are refused, and what to set instead.
INSTEAD = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_gpu_train_batch_size", "auto_find_batch_size"),
        "batch_size counts the clips of a step over all processes, gradient_accumulation_steps divides it",
    ),
    "num_train_epochs": "epochs says how often the list is gone through",
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "warmup_epochs says how long the learning rate rises"),
    "label_smoothing_factor": "label_smoothing smooths the labels of fine-tuning, mixed ones too",
    "optim_target_modules": "parameter groups are those of layer_decay",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size is its name now",
    "eval_do_concat_batches": "accuracy is counted over all predictions at once",
    "prediction_loss_only": "accuracy, and the tables beside a model, are counted from predictions",
    "batch_eval_metrics": "accuracy is counted over all predictions at once",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "bf16 and fp16 are the precision of evaluation too"),
    "save_only_model": "a checkpoint has all that a run needs to go on, the model alone lies in output_dir at its end",
    "save_safetensors": "models are always saved as safetensors",
    "enable_jit_checkpoint": "SIGTERM always ends a run with a checkpoint",
    "overwrite_output_dir": "a run goes on from its last checkpoint, another output_dir starts a new one",
    "restore_callback_states_from_checkpoint": "what has to be restored is restored",
    **dict.fromkeys(("accelerator_config", "split_batches"), "batch_size says what a step is"),
    **dict.fromkeys(("deepspeed", "parallelism_config"), "models are spread by DDP, or sharded by fsdp"),
    "dataloader_drop_last": "a step has a whole batch_size, what is left over in an epoch is left out",
    "remove_unused_columns": "the loader's batches have no columns that are not used",
    "logging_nan_inf_filter": "steps that aren't finite are left out, and counted as bad_steps",
    "no_cuda": "use_cpu is its name now",
    "do_train": "pretrain.py and finetune.py train",
    "do_eval": "eval_list is evaluated on",
    "do_predict": "evaluate.py tests",
    "train_sampling_strategy": "videos come in a random order, which seed and data_seed change",
    "group_by_length": "all clips have one length",
    "length_column_name": "all clips have one length",
}


def settle(values: dict[str, Any], line: Set[str], file: Set[str]) -> dict[str, Any]:
    """The keyword arguments of TrainingArguments among the values of a parser.

    Args:
        values: of all settings, those that aren't given included. Changed in place where two of them say the same.
        line, file: names of the settings that are given on the command line and in the recipe.

    Raises:
        ValueError: a setting that wouldn't do what it says, by its name and with what does so instead.
    """
    # Of data it shows later whether anything is held out (recipe.fit).
    evaluates = "eval_list" in values and any(values[name] for name in ("eval_list", "val_fraction", "data"))
    known = {item.name: item for item in fields(TrainingArguments)}
    for name in sorted((line | file) & known.keys()):
        if name not in WORKING | OF_EVALUATION:
            raise ValueError(f"{name} is no setting here: {INSTEAD.get(name, 'nothing in these scripts heeds it')}")
        if name in OF_EVALUATION and not evaluates:
            raise ValueError(
                f"{name} needs an evaluation during training: of finetune.py, eval_list, data's val or val_fraction"
            )

    # Of two that say the same, the one nearer to the user counts: what the command line says, then the recipe.
    if chosen("base_lr", "learning_rate", line, file) == "base_lr":
        values["learning_rate"] = values["base_lr"] * values["batch_size"] / 256
    if chosen("epochs", "max_steps", line, file) == "epochs":
        values["max_steps"] = -1
    if evaluates and "eval_strategy" not in line | file:
        values["eval_strategy"] = "epoch"
    for strategy, steps in (("save_strategy", "save_steps"), ("eval_strategy", "eval_steps")):
        together = str(values[strategy]) == "steps"
        if together or chosen(strategy, steps, line, file) == steps:
            values[strategy] = "steps"
    # Here, and not in the finished TrainingArguments, which have told accelerate by then.
    if "bf16" not in line | file and not values["fp16"] and not values["use_cpu"]:
        values["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    values["num_train_epochs"] = values["epochs"]
    return {name: values[name] for name, item in known.items() if item.init}


def chosen(usual: str, other: str, line: Set[str], file: Set[str]) -> str:
    """Which of two settings counts. Raises ValueError where one and the same place gives both."""
    for place in (line, file):
        if {usual, other} <= place:
            raise ValueError(f"{usual} and {other} say the same in two ways: give one of them")
        if {usual, other} & place:
            return other if other in place else usual
    return usual
