"""transformers' Trainer, with what it lacks for VideoMAE mended and what a video run needs to say.

Mended: q/v biases are restored on resume and with load_best_model_at_end, pre-training reports an eval_loss, and a kill
at any moment leaves the older checkpoints and never resumes from half of one. Added: batches are augmented on the
device, unreadable videos are counted, and the log shows clips a second, kept tokens and peak memory.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from optimisation import layer_decay_groups
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, set_seed

from everest_tokens.numerics import TENSORS_FILE

logger = logging.getLogger(__name__)

_NO_LABEL = -100  # cross-entropy leaves it out
_COMPLETE = "complete"  # a file that is written last; a checkpoint without it was being written when the run was killed


class TooManyBadVideos(RuntimeError):
    """More of the list can't be read than `max_bad_fraction` allows."""


class _Randomness(TrainerCallback):
    """Other clips in each epoch, other hidden places in each process."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index > 0:  # by now all processes have the same seed for the order of the videos
            set_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's loaders do so in one process alone, and not for the rest of an epoch after a resume
        data = kwargs["train_dataloader"].dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))


class VideoTrainer(Trainer):
    """Trains a VideoMAE, patched or not, on batches of uint8 clips.

    Args:
        augmentation: (uint8 clips (B, T, C, H, W), labels (B,) or None, training) → (float clips, labels).
        layer_decay: factor on the learning rate from a block to the one below it.
        label_smoothing: of the classifier's cross-entropy, for hard and mixed labels alike.
        max_bad_fraction: share of the training list that may be unreadable.

    Raises:
        ValueError: FSDP is asked for where accelerate would silently not shard.
    """

    def __init__(
        self,
        *args: Any,
        augmentation: Callable[[Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]],
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
        max_bad_fraction: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: accelerate shards a model on GPUs only, this run is on the {self.args.device}")
        self.add_callback(_Randomness())
        self.augmentation = augmentation
        self.layer_decay = layer_decay
        self.label_smoothing = label_smoothing
        self.max_bad_fraction = max_bad_fraction
        self.model_accepts_loss_kwargs = False  # the losses here are means over the batch
        self.bad: dict[str, str] = {}
        self._keep = self.args.save_total_limit  # kept here, so that nothing older goes before the new one is complete
        self.args.save_total_limit = None
        self._clips, self._since = 0, time.perf_counter()

    # --- batches ---

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """ "pixel_values" uint8 (videos, repeats, T, C, H, W), "labels" (videos, repeats), "bad" → a model's inputs."""
        inputs = dict(inputs)
        self._note_bad(inputs.pop("bad", []))
        problems = inputs.pop("problem", [])  # of videos under evaluation, one view each
        inputs = super()._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        labels = None if labels is None else labels.flatten()
        for position, problem in enumerate(problems):
            if problem and labels is not None:
                labels[position] = _NO_LABEL  # wrong whatever is predicted from its blank frames
        clips = inputs["pixel_values"].flatten(0, 1)
        self._clips += len(clips) if self.model.training else 0
        inputs["pixel_values"], labels = self.augmentation(clips, labels, self.model.training)
        return inputs if labels is None else {**inputs, "labels": labels}

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        for path, reason in bad:
            if path not in self.bad:
                self.bad[path] = reason
                logger.warning("left out %s: %s", path, reason)

    def check_bad_videos(self, videos: int) -> None:
        """Raise TooManyBadVideos where more of the `videos` in the list were unreadable than is allowed."""
        found = self.bad
        if torch.distributed.is_initialized():
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, self.bad)
            found = {path: reason for part in everywhere for path, reason in part.items()}
        if found:
            logger.warning("%d of %d videos could not be read", len(found), videos)
        if len(found) > self.max_bad_fraction * videos:
            raise TooManyBadVideos(
                f"{len(found)} of {videos} videos could not be read, more than max_bad_fraction"
                f" {self.max_bad_fraction}: {', '.join(sorted(found)[:5])}{', …' if len(found) > 5 else ''}"
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every video is evaluated: `dataloader_drop_last` is for training, where all batches have one size."""
        given, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = given

    # --- losses ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Pre-training: the model's own loss (Eq. 3). Fine-tuning: cross-entropy with label smoothing."""
        labels = inputs.get("labels")
        outputs = model(pixel_values=inputs["pixel_values"])
        if labels is None:
            loss = outputs.loss
        else:
            smoothing = self.label_smoothing if model.training else 0.0
            loss = cross_entropy(outputs.logits, labels, label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Pre-training too has an eval_loss; its predictions, pixels, are not gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        labels = inputs.get("labels")
        if labels is not None and (labels == _NO_LABEL).all():
            loss = torch.zeros_like(loss)  # no video of the batch could be read: cross-entropy's mean is of nothing
        if prediction_loss_only or labels is None:
            return loss.detach(), None, None
        return loss.detach(), outputs.logits.detach(), labels

    # --- optimiser ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with layer-wise learning rates (Bao et al., 2021), and no decay of biases and norms."""
        if self.optimizer is None:
            target = self.model if model is None else model
            groups = layer_decay_groups(target, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(groups, **arguments)
        return self.optimizer

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.parallel_mode == transformers.training_args.ParallelMode.DISTRIBUTED:
            torch.distributed.barrier()  # every process has written its part
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            (folder / f"checkpoint-{self.state.global_step}" / _COMPLETE).touch()
            self._drop_oldest(folder)

    def _drop_oldest(self, folder: Path) -> None:
        if self._keep is None:
            return
        best = self.state.best_model_checkpoint
        finished = [path for path in complete_checkpoints(folder) if best is None or path.name != Path(best).name]
        for path in finished[: max(0, len(finished) - max(1, self._keep))]:
            (path / _COMPLETE).unlink()  # first, so that a kill leaves nothing that only looks complete
            shutil.rmtree(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore(self.state.best_model_checkpoint, self.model)

    def _restore(self, folder: str, model: nn.Module) -> None:
        """Load what Trainer skips: `save_pretrained` writes q/v biases under names that the live model doesn't have."""
        if self.is_fsdp_enabled:  # FSDP's own checkpoints have the live names
            return
        plain = getattr(transformers, type(model).__name__).from_pretrained(folder)
        state = plain.state_dict()
        beside = Path(folder, TENSORS_FILE)
        if beside.is_file() and "class_token" in (tensors := load_file(beside)):  # MVD's, which transformers lacks
            state["videomae.embeddings.cls_token"] = tensors["class_token"]
        model.load_state_dict(state)

    # --- log ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds clips a second, kept tokens and peak memory to the training lines."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._since
            logs["clips_per_second"] = round(self._clips * self.args.world_size / seconds, 2)
            self._clips, self._since = 0, time.perf_counter()
            policy = getattr(self.model, "everest", None)
            if policy is not None:
                logs["kept_tokens"] = policy.selector.num_kept(self._grid())
            if torch.cuda.is_available():
                logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            logs["bad_videos"] = len(self.bad)
        super().log(logs, start_time)

    def _grid(self) -> tuple[int, int, int]:
        config = self.model.config
        side = config.image_size // config.patch_size
        return config.num_frames // config.tubelet_size, side, side


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder that were written to their end, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / _COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoint_to_resume(folder: str | Path) -> str | None:
    """The last complete checkpoint of a run, or None for a new one. Half-written ones are removed."""
    finished = complete_checkpoints(folder)
    for path in Path(folder).glob("checkpoint-*"):
        if path not in finished:
            logger.warning("%s was being written when the run was killed: removed", path)
            shutil.rmtree(path)
    return str(finished[-1]) if finished else None
