"""A run that is left alone: steps that aren't finite, SIGTERM, a killed loader, two runs in one folder."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
from checkpoints import complete_checkpoints
from clips import TrainingClips
from forking import forked
from guards import Diverged, StepGuard, Terminated, alone_in, outlive_sigterm
from motion_videos import write_motion_set
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer import VideoTrainer
from training_runs import ON_CPU, TINY, assert_same, last_state, losses, video_trainer, weights
from transformers import TrainerCallback, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of sixteen."""
    root = tmp_path_factory.mktemp("videos")
    path = root / "list.csv"
    path.write_text("".join(f'"{video}",{label}\n' for video, label in write_motion_set(root, 16)))
    return path


def eight_steps(videos: Path, out: Path, *more: Any) -> list[str]:
    """Of pre-training, four in an epoch, with a checkpoint every three."""
    return [TINY, "--train_list", str(videos), "--output_dir", str(out), "--batch_size", "4", "--epochs", "2",
            "--warmup_epochs", "0", "--save_steps", "3", *ON_CPU, *map(str, more)]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain.main(eight_steps(videos, out)) == 0
    return out


def assert_the_same_run(out: Path, uninterrupted: Path) -> None:
    assert losses(out) == losses(uninterrupted)
    assert len(losses(out)) == 8
    assert_same(weights(out), weights(uninterrupted))


@pytest.fixture
def build(make_model: Callable[..., Any]) -> Callable[..., Any]:
    def build(kind: type = VideoMAEForVideoClassification, seed: int = 0) -> Any:
        return et.patch_videomae(make_model(kind, seed, image_size=32), et.ReRoSelector(0.5))

    return build


def assert_finite(folder: Path) -> None:
    """Every number in every file, as far as the files are ours to read."""

    def check(value: Any, where: Path) -> None:
        if isinstance(value, Tensor):
            assert value.is_floating_point() is False or value.isfinite().all(), where
        elif isinstance(value, dict):
            check(list(value.values()), where)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item, where)
        elif isinstance(value, float):
            assert math.isfinite(value), where

    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            check(load_file(path), path)
        elif path.suffix == ".json":
            check(json.loads(path.read_text()), path)
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            check(torch.load(path), path)


# --- steps that aren't finite ---


class TestDivergence:
    def test_a_rate_that_is_absurd_ends_with_3(self, videos, tmp_path, capfd):
        arguments = [TINY, "--train_list", str(videos), "--output_dir", str(tmp_path), "--epochs", "9", *ON_CPU]
        assert pretrain.main([*arguments, "--learning_rate", "1e30"]) == 3
        message = capfd.readouterr().err.splitlines()[-1]
        for part in ("step ", "learning rate ", "e+2", "for 3 steps in a row (max_bad_steps)", "lower base_lr"):
            assert part in message
        assert_finite(tmp_path)
        for checkpoint in complete_checkpoints(tmp_path):
            VideoMAEForPreTraining.from_pretrained(checkpoint)

    def test_a_lower_rate_goes_on_from_the_last_checkpoint(self, videos, tmp_path, monkeypatch, caplog, uninterrupted):
        spoil(monkeypatch, {5, 6, 7})
        assert pretrain.main(eight_steps(videos, tmp_path)) == 3
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3"]
        monkeypatch.undo()
        assert pretrain.main(eight_steps(videos, tmp_path, "--base_lr", "1e-3")) == 0
        assert "base_lr is 0.001 from here on, it was 0.032" in caplog.messages
        curve, before = losses(tmp_path), losses(uninterrupted)
        assert [curve[step] == before[step] for step in range(1, 9)] == [True] * 4 + [False] * 4
        rates = {line["step"]: line["learning_rate"] for line in last_state(tmp_path)["log_history"] if "loss" in line}
        assert rates[4] == pytest.approx(1e-3 * 4 / 256 * 0.5 * (1 + math.cos(math.pi * 3 / 8)), rel=1e-5)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: str = "loss", part: int = 0) -> None:
    """Makes the loss of these steps NaN, the gradient of one parameter infinite, or the loss alone infinite."""
    compute_loss, seen = VideoTrainer.compute_loss, []

    def spoilt(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute_loss(trainer, model, inputs, *args, **kwargs)
        if not model.training or trainer.state.global_step + 1 not in steps:
            return found
        seen.append(trainer.state.global_step)
        if seen.count(seen[-1]) != part + 1:
            return found
        if how == "gradient":
            bias = next(model.parameters())
            return found + (bias.flatten()[0] * 0).sqrt()  # 0, with a gradient of NaN
        return found * math.nan if how == "loss" else found + math.inf

    monkeypatch.setattr(VideoTrainer, "compute_loss", spoilt)


class Weights(TrainerCallback):
    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append({name: value.clone() for name, value in kwargs["model"].state_dict().items()})


class TestBadSteps:
    @pytest.mark.parametrize(
        ("how", "parts", "part"), [("loss", 1, 0), ("gradient", 1, 0), ("inf", 1, 0), ("loss", 2, 1)]
    )
    def test_one_is_left_out_and_counted(self, build, tmp_path, monkeypatch, caplog, how, parts, part):
        spoil(monkeypatch, {3}, how, part)
        followed = Weights()
        trainer = video_trainer(build(), tmp_path, callbacks=[followed], per_device_train_batch_size=4 // parts,
                                gradient_accumulation_steps=parts)  # fmt: skip
        trainer.train()
        assert_same(followed.after[2], followed.after[1])
        for before, after in ((0, 1), (2, 3), (3, 4)):
            learnt = [followed.after[step]["classifier.weight"] for step in (before, after)]
            assert not torch.equal(*learnt)
        lines = {line["step"]: line for line in trainer.state.log_history if "bad_steps" in line}
        assert [lines[step]["bad_steps"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
        assert [step for step, line in lines.items() if "loss" not in line] == [3]
        assert any(text.startswith("step 3: loss ") and text.endswith("left out") for text in caplog.messages)
        assert_finite(tmp_path)

    def test_only_a_row_of_them_ends_a_run(self, build, tmp_path, monkeypatch):
        spoil(monkeypatch, {1, 2, 4, 5})
        trainer = video_trainer(build(), tmp_path)
        trainer.train()
        assert (trainer.guard.bad_steps, trainer.state.global_step) == (4, 6)

        spoil(monkeypatch, {3, 4})
        trainer = video_trainer(build(), tmp_path / "two")
        trainer.guard.max_bad_steps = 2
        with pytest.raises(Diverged, match=r"step 4: .* learning rate 0.0005: not finite for 2 steps in a row"):
            trainer.train()
        assert [path.name for path in complete_checkpoints(tmp_path / "two")] == ["checkpoint-2"]

    def test_what_one_process_finds_all_heed(self, make_model):
        """The flags of another process are added to this one's: of a bad step, then of a SIGTERM."""
        others: list[Tensor] = []

        class Accelerator:
            scaler = None

            def reduce(self, flags: Tensor, how: str) -> Tensor:
                assert how == "sum"
                return flags + others.pop(0)

        guard, model = StepGuard(3, Accelerator()), nn.Linear(2, 1)
        state = type("State", (), {"global_step": 4, "max_steps": 9})
        schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), 1.0), lambda _: 1.0)
        others += [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
        for bad, stop in ((1, False), (1, True)):
            model(torch.ones(2)).sum().backward()
            guard.on_pre_optimizer_step(None, state, None, model=model, lr_scheduler=schedule)
            assert (guard.bad_steps, guard.ends_here) == (bad, stop)
            assert (model.weight.grad is None) == (not stop)


# --- SIGTERM ---


class Once(TrainerCallback):
    """Calls something in the midst of a step, the first time that it comes to it."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_substep(self, state: Any) -> None:
        if state.global_step + 1 == self.step:
            self.step = -1
            self.action()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep(state)


def in_the_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    once, compute_loss = Once(step, action), VideoTrainer.compute_loss

    def hooked(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        once.on_substep(trainer.state)
        return compute_loss(trainer, *args, **kwargs)

    monkeypatch.setattr(VideoTrainer, "compute_loss", hooked)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class TestSigterm:
    def test_a_checkpoint_and_a_status_that_is_understood(self, videos, uninterrupted, tmp_path, monkeypatch, capfd):
        handler = signal.getsignal(signal.SIGTERM)
        for step in (4, 8):  # at the end of an epoch
            in_the_step(monkeypatch, step, terminate)
            status = pretrain.main(eight_steps(videos, tmp_path))
            assert signal.getsignal(signal.SIGTERM) is handler
            monkeypatch.undo()
            if step == 8:  # the last: nothing is left to be done
                assert status == 0
                break
            assert status == 143
            assert f"the same command goes on from {tmp_path}/checkpoint-4" in capfd.readouterr().err.splitlines()[-1]
            assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
            assert not (tmp_path / "model.safetensors").exists()  # which would look like the end of the run
        assert_the_same_run(tmp_path, uninterrupted)

    def test_a_run_that_began_from_anothers_checkpoint_goes_on_from_its_own(
        self, videos, uninterrupted, tmp_path, monkeypatch, caplog
    ):
        arguments = eight_steps(videos, tmp_path, "--resume_from_checkpoint", uninterrupted / "checkpoint-6")
        in_the_step(monkeypatch, 7, terminate)
        assert pretrain.main(arguments) == 143
        monkeypatch.undo()
        caplog.clear()
        assert pretrain.main(arguments) == 0
        assert f"going on from {tmp_path}/checkpoint-7; another --output_dir starts a new run" in caplog.messages
        assert_the_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize(
        ("step", "settings"),
        [(3, {"save_strategy": "no"}), (4, {"save_strategy": "epoch"}),
         (3, {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True})],
    )  # fmt: skip
    def test_whatever_is_saved_and_when(self, build, tmp_path, step, settings):
        curves = []
        for folder, callbacks in (("whole", []), ("cut", [Once(step, terminate)])):
            trainer = video_trainer(build(), tmp_path / folder, callbacks=callbacks, **settings)
            if callbacks:
                with pytest.raises(Terminated):
                    trainer.train()
                assert trainer.state.global_step == step
                last = complete_checkpoints(tmp_path / folder)[-1]
                assert last.name == f"checkpoint-{step}"
                state = json.loads((last / "trainer_state.json").read_text())
                assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] is False
                trainer = video_trainer(build(seed=1), tmp_path / folder, **settings)
                trainer.train(resume_from_checkpoint=str(last))
            else:
                trainer.train()
            curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(curves[0]) == 6
        assert curves[0] == curves[1]

    def test_a_loader_outlives_a_signal_for_all_but_ends_with_its_parent(self):
        loader = DataLoader(list(range(64)), num_workers=1, worker_init_fn=outlive_sigterm(None))
        batches = iter(loader)
        next(batches)
        (worker,) = batches._workers
        # not by this process, whose SIGTERM means it
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        assert len(list(batches)) == 63
        batches = iter(loader)
        (worker,) = batches._workers
        next(batches)
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


# --- a killed loader ---


class TestKilledLoader:
    @pytest.mark.parametrize(("item", "reached"), [(1, 4), (9, 5)])  # of the second epoch, whose batches are of four
    def test_three_lines_and_a_checkpoint(self, videos, uninterrupted, tmp_path, monkeypatch, capfd, item, reached):
        read, seen, computing = TrainingClips.__getitem__, [], tmp_path / "computing"

        def read_or_die(data: Any, i: int) -> Any:
            seen.append(i)  # in a worker, which an epoch begins anew
            if int(data._epoch) == 1 and len(seen) == item:
                for _ in range(1000 if item == 9 else 0):  # accelerate asks for a batch ahead of the one that it gives
                    if not computing.exists():
                        time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            return read(data, i)

        monkeypatch.setattr(TrainingClips, "__getitem__", read_or_die)
        # Long enough for the worker to die in the midst of the step, which is to be done for all that.
        in_the_step(monkeypatch, 5, lambda: (computing.touch(), time.sleep(1)))
        loaders = ["--dataloader_num_workers", "1"]
        assert pretrain.main(eight_steps(videos, tmp_path, *loaders)) == 4
        said = capfd.readouterr().err
        assert "Traceback" not in said
        first, second, third = said.splitlines()[-3:]
        assert "a process that decodes videos was killed: DataLoader worker" in first
        assert "memory ran out" in second
        assert "--dataloader_num_workers" in second
        assert "/dev/shm" in second
        assert third == f"the same command goes on from {tmp_path}/checkpoint-{reached}"
        monkeypatch.undo()
        assert pretrain.main(eight_steps(videos, tmp_path, *loaders)) == 0
        assert_the_same_run(tmp_path, uninterrupted)

    def test_of_several_processes_the_others_end_too(self, videos, tmp_path, monkeypatch, capfd):
        """With the last checkpoint: they are in the midst of a step, which takes the one that fails."""
        read = TrainingClips.__getitem__

        def read_or_die(data: Any, i: int) -> Any:
            if int(data._epoch) == 1 and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return read(data, i)

        monkeypatch.setattr(TrainingClips, "__getitem__", read_or_die)
        arguments = eight_steps(videos, tmp_path, "--dataloader_num_workers", "1")
        assert forked(lambda: pretrain.main(arguments), processes=2) == [4, 4]
        said = capfd.readouterr().err
        assert f"the same command goes on from {tmp_path}/checkpoint-3" in said
        assert "another process of this run is gone" in said
        assert "Traceback" not in said

    def test_what_a_worker_raises_is_one_line(self, videos, tmp_path, capfd):
        broken = tmp_path / "broken.csv"
        broken.write_text("".join(f'"{videos}",0\n' for _ in range(8)))  # lists are no videos
        assert pretrain.main(eight_steps(broken, tmp_path / "run", "--dataloader_num_workers", "1")) == 2
        said = capfd.readouterr().err
        assert "expected videos that can be read, got 8 in a row that cannot" in said
        assert "Traceback" not in said


# --- one run a folder ---

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("process 7 on another")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


class TestOneRunAFolder:
    def test_the_second_ends_at_once_and_a_dead_one_holds_nothing(self, videos, tmp_path, capfd):
        half = tmp_path / "checkpoint-3"  # of the other run, which is writing it
        half.mkdir()
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            assert pretrain.main(eight_steps(videos, tmp_path)) == 2
            message = capfd.readouterr().err.splitlines()[-1]
            assert f"output_dir: {tmp_path} is in use by process 7 on another" in message
            assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "run.lock"]
            other.kill()
        with alone_in(tmp_path):
            assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"

    def test_where_files_cannot_be_locked_a_line_says_so(self, tmp_path, monkeypatch, caplog):
        def cannot(*_: Any) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", cannot)
        with alone_in(tmp_path):
            pass
        assert [text for text in caplog.messages if "can't be locked ([Errno 37] No locks available)" in text]
