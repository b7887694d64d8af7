"""transformers' Trainer, with what it lacks for VideoMAE mended and what a video run needs to say.

Mended: q/v biases are restored on resume and with load_best_model_at_end, a resumed run has the rates and intervals
that are set now, pre-training reports an eval_loss, an epoch has whole batches however they are accumulated, and a kill
at any moment leaves the older checkpoints and never resumes from half of one. Added: batches are augmented on the
device, unreadable videos and steps that aren't finite are counted, SIGTERM and a killed loader end a run with a
checkpoint, and the log shows clips a second, kept tokens and peak memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from balance import BalancedSampler
from checkpoints import (
    check_finite,
    complete_checkpoints,
    drop_oldest,
    mark_complete,
    remove,
    unreported,
    written_whole,
)
from guards import StepGuard, Terminated, TooManyBadVideos, outlive_sigterm, worker_died, worker_killed
from optimisation import layer_decay_groups
from recorded import write
from safetensors.torch import load_file
from streams import TrainingStream
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback, set_seed

from everest_tokens.numerics import TENSORS_FILE

logger = logging.getLogger(__name__)

_RATES = ("initial_lr", "weight_decay", "betas", "eps")  # of a parameter group, what settings say
_NO_LABEL = -100  # cross-entropy leaves it out


class _Beginnings(TrainerCallback):
    """Other clips in each epoch, other hidden places in each process, and intervals that are given anew on resuming."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint's state has those that it was saved with
        if args.process_index > 0:  # by now all processes have the same seed for the order of the videos
            set_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's loaders do so in one process alone, and not for the rest of an epoch after a resume
        loader, epoch = kwargs["train_dataloader"], int(state.epoch or 0)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)
        if isinstance(loader.dataset, TrainingStream) and not args.ignore_data_skip:
            loader.dataset.skip(state.global_step * args.gradient_accumulation_steps - epoch * len(loader))


class VideoTrainer(Trainer):
    """Trains a VideoMAE, patched or not, on batches of uint8 clips.

    Args:
        augmentation: (uint8 clips (B, T, C, H, W), labels (B,) or None, training) → (float clips, labels).
        layer_decay: factor on the learning rate from a block to the one below it.
        label_smoothing: of the classifier's cross-entropy, for hard and mixed labels alike.
        max_bad_fraction: share of the training list that may be unreadable.
        balanced: all labels are drawn equally often.
        max_bad_steps: so many steps in a row whose loss or gradient isn't finite end the run.
        recorded: what the model is trained with (`recorded.record`), written beside it wherever it is saved.

    Raises:
        ValueError: FSDP is asked for where accelerate would silently not shard, or an optimiser with parameter groups
            of its own.
    """

    def __init__(
        self,
        *args: Any,
        augmentation: Callable[[Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]],
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
        balanced: bool = False,
        max_bad_fraction: float = 0.01,
        max_bad_steps: int = 3,
        recorded: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.hub_token:  # settings are pickled beside every saved model, and uploaded with it
            os.environ["HF_TOKEN"], self.args.hub_token = self.args.hub_token, None
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: accelerate shards a model on GPUs only, this run is on the {self.args.device}")
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & arguments.keys():
            raise ValueError(f"optim: {self.args.optim.value} makes its own parameter groups, not those of layer_decay")
        self.guard = StepGuard(max_bad_steps, self.accelerator)
        self.add_callback(_Beginnings())
        self.add_callback(self.guard)
        self.recorded = recorded or {}
        self.augmentation = augmentation
        self.layer_decay = layer_decay
        self.label_smoothing = label_smoothing
        self.balanced = balanced
        self.max_bad_fraction = max_bad_fraction
        self.model_accepts_loss_kwargs = False  # the losses here are means over the batch
        self.bad: dict[str, str] = {}
        self._keep = self.args.save_total_limit  # kept here, so that nothing older goes before the new one is complete
        self.args.save_total_limit = None
        self._clips, self._since = 0, time.perf_counter()
        self._kept_tokens: int | None = None

    # --- the run ---

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint.

        Raises:
            RunEnded: the run ended before its time; what it had learnt is in its last checkpoint.
        """
        with self.guard.listening():
            try:
                result = super().train(*args, **kwargs)
            except RuntimeError as error:
                if not worker_died(error):
                    raise
                left = self._save_between_steps()
                if self.guard.terminate:  # for the workers too, where they don't outlive it
                    raise Terminated(f"SIGTERM: {left}") from error
                raise worker_killed(error, left) from error
        if self.guard.ends_here:
            raise Terminated(f"SIGTERM: {self._what_is_left()}")
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.load_best_model_at_end and best and self._keep == 1:
            for checkpoint in complete_checkpoints(self.args.output_dir):
                if checkpoint.name != Path(best).name:  # as transformers does once it needs no more to resume from
                    remove(checkpoint)
        return result

    def _save_between_steps(self) -> str:
        """Write a checkpoint where the next batch didn't come. Returns `_what_is_left`."""
        done = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.world_size == 1 and self.state.global_step and done not in complete_checkpoints(done.parent):
            if self.guard.before_epoch is not None:
                torch.set_rng_state(self.guard.before_epoch)  # making the epoch's loader draws from it
            self._save_checkpoint(self.model_wrapped, trial=None)
        return self._what_is_left()

    def _what_is_left(self) -> str:
        last = complete_checkpoints(self.args.output_dir)[-1:]
        return f"the same command goes on from {last[0] if last else 'the beginning, there is no checkpoint yet'}"

    # --- batches ---

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Whole batches alone, before they are divided among processes and accumulated parts."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        batch = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        whole = len(sampler) // batch * batch
        if self.balanced:
            return BalancedSampler(self.train_dataset, whole)
        return RandomSampler(sampler.data_source, num_samples=whole, generator=sampler.generator) if whole else sampler

    def get_train_dataloader(self) -> Any:
        streams = isinstance(self.train_dataset, TrainingStream)
        loader = self._stream_loader() if streams else super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's goes through it
        if inner.num_workers:
            inner.worker_init_fn = outlive_sigterm(inner.worker_init_fn)
        return loader

    def _stream_loader(self) -> DataLoader[Any]:
        """Not accelerate's, which would have each process read what all of them need."""
        args, stream = self.args, self.train_dataset
        workers = min(args.dataloader_num_workers, stream.most_workers)
        if workers < args.dataloader_num_workers:
            logger.warning("dataloader_num_workers is %d, there are no more shards for a process", workers)
        return DataLoader(
            stream,
            batch_size=stream.batch,
            num_workers=workers,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )

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
        """Raise TooManyBadVideos where more of the `videos` in the list were unreadable than is allowed.

        Of a stream it is the samples drawn in all epochs that count, each of which may have drawn others.
        """
        stream, found = self.train_dataset, self.bad
        if isinstance(stream, TrainingStream):
            of_a_step = stream.batch * self.args.world_size * self.args.gradient_accumulation_steps
            drawn = self.state.global_step * of_a_step
            videos = drawn if stream.stream.length is None else min(drawn, stream.stream.length)
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

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.guard.loss = self.guard.loss + loss
        policy = getattr(self.model, "everest", None)
        if policy is not None:
            self._kept_tokens = policy.selector.num_kept(self._grid())
        return loss

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it what is recorded of it. Raises Diverged for one that isn't finite."""
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call:
            self._check_finite()
        with written_whole(folder):
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                write(folder, self.recorded)

    def _check_finite(self) -> None:
        check_finite(self.model.state_dict().items(), self.optimizer, self.guard.agree)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with written_whole(checkpoint):
            super()._save_checkpoint(model, trial)
            (checkpoint / f"bad_videos_{self.args.process_index}.json").write_text(json.dumps(self.bad))
            if self.args.parallel_mode == transformers.training_args.ParallelMode.DISTRIBUTED:
                torch.distributed.barrier()  # every process has written its part
            if self.args.should_save:
                mark_complete(checkpoint)
        if self.args.should_save:
            self._drop_oldest(checkpoint)
        if self.args.push_to_hub:
            with written_whole(folder):  # it copies the model there
                super()._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not in the midst of `Trainer._save_checkpoint`: an upload that fails would leave it unmarked."""

    def _drop_oldest(self, written: Path) -> None:
        drop_oldest(written, self._keep, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with unreported():  # q/v biases, which are restored below
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint, self.model if model is None else model)
        if isinstance(self.train_dataset, TrainingStream):  # a list's are met again
            for file in Path(resume_from_checkpoint).glob("bad_videos_*.json"):
                self.bad |= json.loads(file.read_text())

    def _load_best_model(self) -> None:
        with unreported():
            super()._load_best_model()
        self._restore(self.state.best_model_checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What was learnt of the checkpoint, rates and betas of the settings: torch would take the checkpoint's."""
        if checkpoint is None or self.optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        given = [{name: group[name] for name in _RATES if name in group} for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint}: layer_decay and weight_decay make other parameter groups than it has: {error}"
            ) from error
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [group["initial_lr"] for group in given]
            for group, settings, factor in zip(self.optimizer.param_groups, given, schedule.lr_lambdas, strict=True):
                group.update(settings)
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        elif any(
            group[name] != value
            for group, old in zip(self.optimizer.param_groups, given, strict=True)
            for name, value in old.items()
        ):
            raise ValueError(f"learning_rate: {self.args.lr_scheduler_type.value} can't go on from another one")
        return None

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
        """Adds clips a second, kept tokens (of the last step) and peak memory to the training lines."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._since
            logs["clips_per_second"] = round(self._clips * self.args.world_size / seconds, 2)
            self._clips, self._since = 0, time.perf_counter()
            if self._kept_tokens is not None:
                logs["kept_tokens"] = self._kept_tokens
            if torch.cuda.is_available():
                logs["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            logs["bad_videos"], logs["bad_steps"] = len(self.bad), self.guard.bad_steps
            if not self.guard.good_since_log:
                logs["loss"] = math.nan  # Trainer's mean over no step at all is 0
            self.guard.good_since_log = 0
        finite = {name: value for name, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}
        if left_out := ", ".join(logs.keys() - finite.keys()):  # JSON has no NaN
            logger.warning("step %d: %s not finite, and not in the log", self.state.global_step, left_out)
        super().log(finite, start_time)

    def _grid(self) -> tuple[int, int, int]:
        config = self.model.config
        side = config.image_size // config.patch_size
        return config.num_frames // config.tubelet_size, side, side
