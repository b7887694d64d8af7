"""A run's checkpoints: what they bring back, how many are kept, and that none is written of what isn't finite."""

from __future__ import annotations

import copy
import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import finetune
import numpy as np
import pytest
import torch
from augmentation import BatchAugmentation
from checkpoints import checkpoint_to_resume, complete_checkpoints, drop_oldest, mark_complete, written_whole
from family_models import FineTuningModel, randomize
from guards import Diverged, MachineFailed
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError
from trainer import VideoTrainer
from training_runs import Clips, assert_same, video_trainer
from transformers import Trainer, TrainerCallback, VideoMAEForPreTraining, VideoMAEForVideoClassification, trainer_utils

import everest_tokens as et


class Snapshots(TrainerCallback):
    """What model, optimiser and schedule were when training began and when each checkpoint was saved."""

    def __init__(self) -> None:
        self.begin: Any = None
        self.saved: dict[int, Any] = {}

    def copy(self, kwargs: dict[str, Any]) -> Any:
        return copy.deepcopy([kwargs[name].state_dict() for name in ("model", "optimizer", "lr_scheduler")])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = self.copy(kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = self.copy(kwargs)


KINDS = ["pretraining", "classifier", "mvd"]


@pytest.fixture
def build(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Patched models; those of another seed have other weights."""

    def build(kind: str, seed: int = 0) -> Any:
        if kind == "pretraining":
            model = make_model(VideoMAEForPreTraining, seed, image_size=32)
            return et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        if kind == "classifier":
            model = make_model(VideoMAEForVideoClassification, seed, image_size=32)
        else:
            shape = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2}
            reference = randomize(FineTuningModel("mvd", use_cls_token=True, **shape), seed)
            torch.save({"model": reference.state_dict()}, tmp_path / "mvd.pth")
            model = et.load_videomae(
                tmp_path / "mvd.pth", family="mvd", num_labels=5, num_heads=2, num_frames=8, image_size=32
            )
        return et.patch_videomae(model, et.ReRoSelector(0.5), drop_path=0.1)

    return build


def snapshot_trainer(model: Any, out: Path, **settings: Any) -> VideoTrainer:
    return video_trainer(model, out, callbacks=[Snapshots()], **settings)


def snapshots(trainer: VideoTrainer) -> Snapshots:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Snapshots))


def plain_run(build: Callable[..., Any], out: Path) -> torch.Tensor:
    """The weights of the classifier after six steps of a run that nothing has come in the way of."""
    trainer = video_trainer(build("classifier"), out, save_strategy="no")
    trainer.train()
    return trainer.model.state_dict()["classifier.weight"]


class TestCheckpoints:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_is_bit_equal_after_a_resume(self, build, tmp_path, kind):
        first = snapshot_trainer(build(kind), tmp_path / "run")
        first.train()
        saved = snapshots(first).saved
        assert sorted(saved) == [2, 4, 6]
        model_then, optimizer_then, _ = saved[4]
        biases = [name for name in model_then if name.endswith(("query.bias", "value.bias"))]
        assert len(biases) == (8 if kind == "pretraining" else 4)
        assert all(not torch.equal(model_then[name], saved[2][0][name]) for name in biases)  # they learn
        assert ("videomae.embeddings.cls_token" in model_then) == (kind == "mvd")
        assert len(optimizer_then["state"]) == len(list(first.model.parameters()))
        assert len({group["lr"] for group in optimizer_then["param_groups"]}) == (1 if kind == "pretraining" else 4)

        second = snapshot_trainer(build(kind, seed=1), tmp_path / "run")
        with pytest.raises(AssertionError):
            assert_same(second.model.state_dict(), model_then)
        second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert_same(snapshots(second).begin, saved[4])
        assert_same(snapshots(second).saved, {6: saved[6]})
        of_first, of_second = (
            [line["loss"] for line in t.state.log_history if "loss" in line] for t in (first, second)
        )
        assert len(of_first) == 6
        assert of_first == of_second

    @pytest.mark.parametrize(
        ("kind", "limit", "left"), [*((kind, 1, [2]) for kind in KINDS), ("classifier", 2, [2, 6])]
    )
    def test_the_best_model_is_kept_and_comes_back_whole(self, build, tmp_path, kind, limit, left):
        trainer = snapshot_trainer(build(kind), tmp_path, eval_strategy="steps", eval_steps=2,
                                   load_best_model_at_end=True, greater_is_better=True,
                                   save_total_limit=limit)  # fmt: skip
        trainer.train()  # the loss falls, so that the first checkpoint is "best"
        assert trainer.state.best_global_step == 2
        assert_same(trainer.model.state_dict(), snapshots(trainer).saved[2][0])
        assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]

    def test_pretraining_has_an_eval_loss(self, build, tmp_path):
        model = build("pretraining")
        trainer = video_trainer(model, tmp_path, eval_strategy="steps", eval_steps=3)
        trainer.train()
        assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [3, 6]

        data = Clips(model, 6, labelled=False)  # a batch of 4 and one of 2, although training drops what is left over
        torch.manual_seed(5)
        found = trainer.evaluate(data)["eval_loss"]
        torch.manual_seed(5)
        expected = []
        with torch.no_grad():
            for batch in trainer.get_eval_dataloader(data):
                pixels, _ = BatchAugmentation()(batch["pixel_values"].flatten(0, 1), None, False)
                expected += [model.eval()(pixel_values=pixels).loss.item()] * len(pixels)
        assert len(expected) == 6
        assert found == pytest.approx(np.mean(expected), rel=1e-5)

    @pytest.mark.parametrize(("unreadable", "right"), [((), 6), ((0, 5), 4), ((4, 5), 4)])  # (4, 5): a whole batch
    def test_unreadable_videos_are_wrong_in_evaluation(self, build, tmp_path, unreadable, right):
        model = build("classifier")
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]))  # whatever it sees: 1
        data = Clips(model, 6, unreadable=unreadable)
        data.labels.fill_(1)
        trainer = video_trainer(model, tmp_path)
        trainer.compute_metrics = finetune.Accuracy()
        metrics = trainer.evaluate(data)
        assert metrics["eval_accuracy"] == pytest.approx(right / 6)
        loss = math.log(math.exp(3) + 4) - 3
        read_batches = 4 if unreadable == (4, 5) else 6  # of which the mean is
        assert metrics["eval_loss"] == pytest.approx(loss * read_batches / 6, rel=1e-4)


class TestHowManyAreKept:
    def test_what_no_run_has_written_is_left_alone(self, tmp_path):
        for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-best", "checkpoint-10-copy"):
            (tmp_path / name).mkdir()
            if name != "checkpoint-11":
                mark_complete(tmp_path / name)
        (tmp_path / "checkpoint-12").write_text("a file")
        assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-10")
        drop_oldest(tmp_path / "checkpoint-10", 1, None)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ["checkpoint-10", "checkpoint-10-copy", "checkpoint-12", "checkpoint-best"]

    @pytest.mark.skipif(not hasattr(trainer_utils, "rotate_checkpoints"), reason="a method of Trainer before 5.0")
    @pytest.mark.parametrize("best", [None, 1, 3, 6])
    @pytest.mark.parametrize("limit", [None, -1, 0, 1, 2, 3, 9])
    def test_as_many_as_transformers_keeps(self, tmp_path, limit, best):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        for step in range(1, 7):
            for folder in (ours, theirs):
                (folder / f"checkpoint-{step}").mkdir(parents=True)
                (folder / f"checkpoint-{step}" / "complete").touch()
            name = f"checkpoint-{best}" if best and best <= step else None
            drop_oldest(ours / f"checkpoint-{step}", limit, name and str(ours / name))
            trainer_utils.rotate_checkpoints(str(theirs), limit, name and str(theirs / name))
            assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())

    @pytest.mark.parametrize(
        ("limit", "best", "left"), [(1, None, [3]), (2, None, [6, 3]), (0, None, [2, 4, 6, 3]), (1, 2, [2, 3])]
    )
    def test_the_one_just_written_is_the_last_where_later_ones_are_there(self, tmp_path, limit, best, left):
        """A run that went on from checkpoint-2, although there was a checkpoint-6, and was killed soon after."""
        for step in (2, 3, 4, 6, 3):
            with written_whole(tmp_path / f"checkpoint-{step}"):
                (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
                mark_complete(tmp_path / f"checkpoint-{step}")
        drop_oldest(tmp_path / "checkpoint-3", limit, best and f"checkpoint-{best}")
        assert complete_checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]
        assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-3")

    def test_one_that_is_half_removed_is_not_complete(self, tmp_path, monkeypatch):
        for number in (3, 6):
            (tmp_path / f"checkpoint-{number}").mkdir()
            (tmp_path / f"checkpoint-{number}" / "complete").touch()

        def killed(path: Path, **_: Any) -> None:
            raise KeyboardInterrupt(path)

        with monkeypatch.context() as patch:
            patch.setattr("checkpoints.shutil.rmtree", killed)
            with pytest.raises(KeyboardInterrupt, match="checkpoint-3"):
                drop_oldest(tmp_path / "checkpoint-6", 1, None)
        assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-6"]
        assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-6")
        assert list(tmp_path.glob("checkpoint-*")) == [tmp_path / "checkpoint-6"]


class TestGoingOnWithOtherSettings:
    def test_rates_and_intervals_are_those_of_now(self, build, tmp_path):
        video_trainer(build("classifier"), tmp_path).train()
        now = {"learning_rate": 4e-4, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_epsilon": 1e-7, "save_steps": 3}
        trainer = snapshot_trainer(build("classifier"), tmp_path, **now)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        before, after = snapshots(trainer).begin[1]["param_groups"], snapshots(trainer).saved[6][1]["param_groups"]
        highest = 4e-4
        for groups, left in ((before, 4 / 6), (after, 0)):  # of a rate that falls from the first to the sixth step
            assert [group["lr"] for group in groups[:2]] == pytest.approx([highest * left] * 2)
            assert [group["weight_decay"] for group in groups[:2]] == [0.2, 0.0]
            assert {group["betas"] for group in groups} == {(0.8, 0.999)}
            assert {group["eps"] for group in groups} == {1e-7}
        assert sorted(snapshots(trainer).saved) == [3, 6]
        rates = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "loss" in line}
        assert rates[3] == pytest.approx(highest * 4 / 6)  # of the step that it was logged after
        assert rates[2] == pytest.approx(1e-3 * 5 / 6)

    def test_other_parameter_groups_are_refused(self, build, tmp_path):
        video_trainer(build("classifier"), tmp_path).train()
        trainer = video_trainer(build("classifier"), tmp_path, weight_decay=0.0)
        with pytest.raises(ValueError, match="layer_decay and weight_decay make other parameter groups"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_optimisers_with_groups_of_their_own_are_refused(self, build, tmp_path, monkeypatch):
        lomo = (torch.optim.SGD, {"model": None, "lr": 1.0})
        monkeypatch.setattr(VideoTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: lomo))
        with pytest.raises(ValueError, match="optim: adamw_torch_fused makes its own parameter groups"):
            video_trainer(build("classifier"), tmp_path, optim="adamw_torch_fused")


class TestAccumulation:
    @pytest.mark.parametrize("count", [8, 9, 11])
    def test_an_odd_list_gives_the_same_steps(self, make_model, tmp_path, count):
        """What doesn't fill a batch is left out, so that steps and rates are those without accumulation."""
        curves, models = [], []
        for parts in (1, 2, 4):
            model = et.patch_videomae(make_model(VideoMAEForVideoClassification, image_size=32), et.ReRoSelector(0.5))
            trainer = video_trainer(model, tmp_path / str(parts), count, per_device_train_batch_size=4 // parts,
                                    gradient_accumulation_steps=parts, max_steps=-1, num_train_epochs=2, warmup_steps=2,
                                    learning_rate=0.1, optim="sgd", save_strategy="no")  # fmt: skip
            trainer.train()
            curves.append(
                [(line["loss"], line["learning_rate"]) for line in trainer.state.log_history if "loss" in line]
            )
            models.append(model.state_dict())
        assert len(curves[0]) == 4
        for curve, model in zip(curves[1:], models[1:], strict=True):
            assert np.array(curve) == pytest.approx(np.array(curves[0]), rel=1e-5)
            for name, value in model.items():
                torch.testing.assert_close(value, models[0][name], rtol=1e-4, atol=1e-6)


class TestNothingBroken:
    def test_the_token_of_the_hub_is_in_no_file(self, build, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "another")
        trainer = video_trainer(build("classifier"), tmp_path, hub_token="hf_secret", max_steps=2)
        trainer.train()
        trainer.save_model()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {"training_args.bin", "model.safetensors"} <= {path.name for path in files}
        assert not [path for path in files if b"hf_secret" in path.read_bytes()]
        assert get_token() == "hf_secret"  # what uploads takes it from there

    @pytest.mark.parametrize("where", ["weights", "optimiser"])
    def test_no_checkpoint_is_written_of_what_is_not_finite(self, build, tmp_path, where):
        class Spoil(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 4:
                    parameter = kwargs["model"].classifier.bias
                    spoilt = parameter if where == "weights" else kwargs["optimizer"].state[parameter]["exp_avg"]
                    spoilt.data[1] = math.nan

        trainer = video_trainer(build("classifier"), tmp_path, callbacks=[Spoil()])
        with pytest.raises(Diverged, match=r"classifier.bias|exp_avg"):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        with pytest.raises(Diverged):
            trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()

    @pytest.mark.parametrize("folder", ["checkpoint-2", ".", "checkpoint-run"])
    @pytest.mark.parametrize(
        ("error", "left"),
        [(HfHubHTTPError("502", response=mock.MagicMock()), True), (ConnectionResetError(104, "reset"), True),
         (OSError(errno.ENOSPC, "No space left"), False), (OSError(errno.EIO, "Input/output error"), False)],
    )  # fmt: skip
    def test_an_upload_that_fails_leaves_what_is_written(self, tmp_path, folder, error, left):
        model, other = tmp_path / folder / "model.safetensors", tmp_path / folder / "run.lock"
        model.parent.mkdir(exist_ok=True)
        other.touch()

        def save() -> None:
            with written_whole(tmp_path / folder):
                model.write_text("whole")
                raise error

        with pytest.raises(type(error) if left else MachineFailed):
            save()
        assert model.exists() == left
        assert other.exists() == (left or folder != "checkpoint-2")  # of a run that is called so all else stays

    @pytest.mark.parametrize(
        ("error", "ends"),
        [
            (ConnectionResetError(104, "reset"), ConnectionResetError),
            (OSError(errno.ENOSPC, "No space"), MachineFailed),
        ],
    )
    def test_an_upload_that_fails_leaves_its_checkpoint_complete(self, build, tmp_path, monkeypatch, error, ends):
        """transformers copies the model into the run's folder for it, where the disk may be full."""

        def upload(trainer: Any, folder: str) -> None:
            if trainer.state.global_step == 4:
                (tmp_path / "model.safetensors").write_text("half of one")
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_push_from_checkpoint", upload)
            trainer = video_trainer(build("classifier"), tmp_path, save_total_limit=1)
            trainer.args.push_to_hub = True
            with pytest.raises(ends):
                trainer.train()
        assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-4"]
        assert (tmp_path / "model.safetensors").exists() == (ends is ConnectionResetError)
        resumed = video_trainer(build("classifier", seed=1), tmp_path)
        resumed.train(resume_from_checkpoint=checkpoint_to_resume(tmp_path))
        assert_same(resumed.model.state_dict()["classifier.weight"], plain_run(build, tmp_path / "whole"))

    @pytest.mark.parametrize(
        ("file", "missing"), [("model.safetensors", 9000), *(("optimizer.pt", missing) for missing in (9000, 90, 1))]
    )
    def test_a_disk_that_is_full_leaves_the_last_checkpoint(self, build, tmp_path, monkeypatch, file, missing):
        """A limit on the size of files stands for it: writing fails in the midst of one, whoever writes it."""
        resource = pytest.importorskip("resource")
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

        @contextmanager
        def full() -> Iterator[None]:
            size = (tmp_path / "checkpoint-2" / file).stat().st_size - missing
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        def save(trainer: Any, *args: Any) -> None:
            with full() if trainer.state.global_step == 4 else nullcontext():
                original(trainer, *args)

        original = Trainer._save_checkpoint
        trainer = snapshot_trainer(build("classifier"), tmp_path, save_total_limit=1)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_save_checkpoint", save)
            with pytest.raises(MachineFailed, match=r"checkpoint-4 could not be written.*checkpoint-2 is whole"):
                trainer.train()
        if file == "model.safetensors":
            with full(), pytest.raises(MachineFailed, match="could not be written"):
                trainer.save_model()
        assert list(tmp_path.glob("checkpoint-*")) == complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
        assert not (tmp_path / "model.safetensors").exists()
        resumed = snapshot_trainer(build("classifier", seed=1), tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same(snapshots(resumed).begin, snapshots(trainer).saved[2])
