"""What lets a run be left alone: its ends and their exit statuses, steps that aren't finite, SIGTERM, a folder's lock.

| status | |
|---|---|
| 0 | done |
| 1 | a fault in the scripts, with a traceback |
| 2 | wrong settings, or too much of the list unreadable |
| 3 | the training diverged; run again with a lower rate, it goes on from the last checkpoint |
| 4 | the machine failed: memory, disk or another process of the run; run again as it is |
| 143 | SIGTERM (128 + 15), after a checkpoint; run again as it is, or let Slurm requeue it |
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class RunEnded(RuntimeError):
    """A run ends before its time, with a message and an exit status."""

    status = 1


class TooManyBadVideos(RunEnded):
    """More of the list can't be read than `max_bad_fraction` allows."""

    status = 2


class Diverged(RunEnded):
    """Losses, gradients or weights are NaN or infinite."""

    status = 3


class MachineFailed(RunEnded):
    """Memory or disk ran out."""

    status = 4


class Terminated(RunEnded):
    """SIGTERM came, and a checkpoint was written."""

    status = 128 + signal.SIGTERM


class StepGuard(TrainerCallback):
    """Leaves out steps that aren't finite, and ends a run after too many of them or on SIGTERM.

    All processes decide alike: each tells the others of its loss, its gradient and its SIGTERM before an update.

    Args:
        max_bad_steps: in a row that end the run.
        accelerator: of the Trainer.

    Raises:
        Diverged: from the Trainer's loop.
    """

    def __init__(self, max_bad_steps: int, accelerator: Any) -> None:
        self.max_bad_steps, self.accelerator = max_bad_steps, accelerator
        self.loss: Tensor | float = 0.0  # of the step, summed over its accumulated parts
        self.bad_steps = self.in_a_row = self.good_since_log = 0
        self.terminate = self.ends_here = False
        self.before_epoch: Tensor | None = None  # state of torch's generator, until the first step of an epoch begins

    def agree(self, flags: Tensor) -> Tensor:
        """The sum of float tensors over all processes."""
        return self.accelerator.reduce(flags, "sum")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGTERM is heeded at the end of a step instead of killing the process."""

        def heed(*_: Any) -> None:
            self.terminate = True

        previous = signal.signal(signal.SIGTERM, heed)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_epoch = torch.get_rng_state()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss, self.before_epoch = 0.0, None
        # torch raises from this signal's handler wherever the run is, if a loader's worker dies. Without it the loader
        # finds out when the next batch is due, between two steps, where a checkpoint can be written.
        if hasattr(signal, "SIGCHLD") and args.dataloader_num_workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's
        loss = torch.as_tensor(self.loss, device=norm.device)
        scaler = self.accelerator.scaler
        # fp16's gradients overflow until the scale fits: its scaler leaves such steps out, and lowers the scale.
        searching = scaler is not None and scaler.get_scale() > 1
        bad = ~loss.isfinite() | (~norm.isfinite() & (not searching))
        stop = torch.tensor(self.terminate, device=norm.device)
        found_bad, found_stop = self.agree(torch.stack([bad, stop]).float()).tolist()
        self.ends_here = bool(found_stop) and state.global_step + 1 < state.max_steps
        if not found_bad:
            self.in_a_row = 0
            self.good_since_log += 1
            return
        if scaler is None:
            for parameter in parameters:
                parameter.grad = None  # optimisers leave alone what has no gradient
        self.bad_steps += 1
        self.in_a_row += 1
        rate, step = lr_scheduler.get_last_lr()[0], state.global_step + 1
        what = f"step {step}: loss {float(loss):.4g}, gradient norm {float(norm):.4g}, learning rate {rate:.4g}"
        if self.in_a_row < self.max_bad_steps:
            logger.warning("%s: left out", what)
            return
        raise Diverged(
            f"{what}: not finite for {self.in_a_row} steps in a row (max_bad_steps). The last checkpoint is as it was:"
            f" the same command goes on from it, with a lower base_lr (or learning_rate), with max_grad_norm 1, more"
            f" warmup_epochs, or bf16 instead of fp16"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.in_a_row:  # a checkpoint in the place of an older one may well be the first bad one
            control.should_save = False
        if self.ends_here:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ends_here:  # only now: a checkpoint has this, too, and must not say that the run is over
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.in_a_row or self.ends_here:
            control.should_save = False
        if self.ends_here:
            control.should_evaluate = False


def outlive_sigterm(initialise: Callable[[int], None] | None) -> Callable[[int], None]:
    """A loader's `worker_init_fn` after which a worker ends with its loader, not by a SIGTERM for a whole job."""
    return partial(_heed_the_parent_alone, initialise)


def _heed_the_parent_alone(initialise: Callable[[int], None] | None, worker: int) -> None:
    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=wait, daemon=True).start()
    if initialise is not None:
        initialise(worker)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder.

    It is the kernel's lock on a file (POSIX, fcntl), so that it goes with its process, however that ends. NFS, Lustre
    (mounted with `flock`), GPFS and CephFS keep such locks for all their nodes; of a dead node they let go when its
    lease has run out, a minute or two later. Where a file system can't lock, a line says so and the run goes on.

    Raises:
        ValueError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "a+") as file:
        try:
            if fcntl is None:
                raise OSError("no fcntl here")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(f"output_dir: {folder} is in use by {file.read().strip() or 'another run'}") from None
        except OSError as error:
            logger.warning("%s can't be locked (%s): see to it that no other run uses it", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def worker_died(error: BaseException) -> bool:
    """Whether an error is a DataLoader's that has lost a worker."""
    text = str(error)
    died = "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text)
    return died or ("</torch_" in text and "unable to" in text)  # a file in /dev/shm


def worker_killed(error: BaseException, left: str) -> MachineFailed:
    """What to say of `worker_died`, in three lines, the last of them what is `left` to go on from."""
    reason = str(error).strip().splitlines()[-1]
    return MachineFailed(
        f"a process that decodes videos was killed: {reason}\n"
        "Most likely memory ran out: take fewer of them (--dataloader_num_workers), or enlarge shared memory (/dev/shm,"
        " docker's --shm-size) if it is a bus error\n" + left
    )


def peer_lost(error: BaseException) -> MachineFailed | None:
    """What to say where another process of the run has ended, as gloo notices; None for other errors."""
    if not any(sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer")):
        return None
    return MachineFailed("another process of this run is gone, and will have said why")
