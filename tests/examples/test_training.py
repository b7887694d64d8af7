"""The scripts end to end on made videos: from a data set's folder to accuracies, killed, in several processes, with bad
files and with wrong settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import evaluate
import finetune
import hooks
import numpy as np
import prepare
import pretrain
import pytest
import torch
from augmentation import BatchAugmentation
from checkpoints import complete_checkpoints
from family_models import FineTuningModel, randomize
from forking import forked
from made_videos import write_frames
from motion_videos import DIRECTIONS, moving_shape
from torch import Tensor
from trainer import VideoTrainer
from training_runs import ON_CPU, QUIET, TINY, assert_same, last_state, losses, torchrun, weights
from transformers import TrainingArguments, VideoMAEForPreTraining, VideoMAEForVideoClassification
from video_list import Entry

SHARDED = ["--fsdp", "--fsdp_config", '{"version": 2, "transformer_layer_cls_to_wrap": "VideoMAELayer"}']


def run(script: Any, *arguments: Any) -> int:
    """A script's status, in this process."""
    return script.main([str(argument) for argument in arguments])


# --- made videos ---


@pytest.fixture(scope="session")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF101's layout with four classes, the directions of motion: 96 videos to train on, 32 others to test on."""
    root = tmp_path_factory.mktemp("ucf")
    names = sorted(DIRECTIONS)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for part, count in (("train", 96), ("test", 32)):
        for number in range(count):
            label = number % 4
            video = f"{names[label]}/v_{names[label]}_{part}{number:02}.avi"
            write_frames(root / video, moving_shape(names[label], 1000 * (part == "test") + number), codec="mpeg4")
            lists[part].append(f"{video} {label + 1}" if part == "train" else video)
    folder = root / "ucfTrainTestlist"
    folder.mkdir()
    (folder / "classInd.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    for part, videos in lists.items():
        (folder / f"{part}list01.txt").write_text("\n".join(videos) + "\n")
    return root


@pytest.fixture(scope="session")
def lists(ucf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    assert prepare.main(["ucf101", str(ucf), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def few(ucf: Path, lists: Path) -> Path:
    """The first 32 of the training list, eight of each class."""
    path = lists / "few.csv"
    lines = [line for line in (lists / "train.csv").read_text().splitlines() if not line.startswith("#")]
    path.write_text("\n".join(lines[:32]) + "\n")
    return path


@pytest.fixture(scope="session")
def pretrained(ucf: Path, lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    arguments = [TINY, "--train_list", lists / "train.csv", "--data_root", ucf, "--output_dir", out, "--epochs", 6]
    assert run(pretrain, *arguments, *ON_CPU) == 0
    return out


@pytest.fixture(scope="session")
def finetuned(ucf: Path, lists: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetuned")
    arguments = [TINY, "--model", pretrained, "--num_labels", 4, "--train_list", lists / "train.csv", "--eval_list",
                 lists / "val.csv", "--data_root", ucf, "--output_dir", out, "--save_steps", 60,
                 "--epochs", 20]  # fmt: skip
    assert run(finetune, *arguments, *ON_CPU) == 0
    return out


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- from a folder of videos to accuracies ---


class TestEndToEnd:
    def test_the_loss_of_pretraining_falls(self, pretrained):
        curve = losses(pretrained)
        assert sorted(curve) == list(range(1, 37))  # 96 videos in batches of 16, six times
        values = [curve[step] for step in sorted(curve)]
        first, last = np.array(values[:6]), np.array(values[-6:])
        assert last.mean() < first.mean() - 3 * first.std()
        assert all(line["kept_tokens"] == 32 for line in last_state(pretrained)["log_history"] if "loss" in line)

    def test_held_out_videos_are_told_apart(self, ucf, lists, finetuned, tmp_path, capfd):
        predictions = tmp_path / "predictions.jsonl"
        arguments = [TINY, "--model", finetuned, "--test_list", lists / "test.csv", "--data_root", ucf]
        assert run(evaluate, *arguments, "--predictions", predictions, "--use_cpu") == 0
        lines = [json.loads(line) for line in predictions.read_text().splitlines()]
        names = sorted(DIRECTIONS)
        held_out = sorted(ucf.glob("*/*_test*.avi"))
        assert sorted(line["video"] for line in lines) == [str(path) for path in held_out]
        assert len(lines) == 32
        for line in lines:
            assert names[line["label"]] == Path(line["video"]).parent.name
            assert sorted(line["top5"]) == [0, 1, 2, 3]
            assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)
            assert line["probabilities"] == sorted(line["probabilities"], reverse=True)
        correct = sum(line["top5"][0] == line["label"] for line in lines)
        summary = json.loads((tmp_path / "predictions.summary.json").read_text())
        assert summary == {"videos": 32, "top1": 100 * correct / 32, "top5": 100.0, "missing": 0}
        assert f"top-1 {100 * correct / 32:.2f} %, top-5 100.00 % of 32 videos" in capfd.readouterr().out
        assert summary["top1"] >= 80


# --- killed, and started again ---


def twelve_steps(ucf: Path, few: Path, out: Path, workers: int = 0) -> list[str]:
    """Of pre-training, four in an epoch, with a checkpoint every three: most are in the middle of an epoch."""
    return [TINY, "--train_list", str(few), "--data_root", str(ucf), "--output_dir", str(out), "--batch_size", "8",
            "--epochs", "3", "--warmup_epochs", "0", "--save_strategy", "steps", "--save_steps", "3", "--use_cpu",
            "--dataloader_num_workers", str(workers), *QUIET]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(ucf: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain.main(twelve_steps(ucf, few, out)) == 0
    return out


class TestKilled:
    @pytest.mark.parametrize(
        ("workers", "kills"),
        [
            pytest.param(
                0,
                {
                    "compute_loss@1": [],
                    "_save_optimizer_and_scheduler@3": [],  # in the first checkpoint: there are but its weights
                    "compute_loss@4": [3],
                    "_save_rng_state@6": [3],
                    "compute_loss@7": [3, 6],
                    "_drop_oldest@9": [3, 6, 9],
                    "check_bad_videos@12": [9, 12],  # with the final model written
                },
                id="0 workers",
            ),
            pytest.param(2, {"compute_loss@4": [3], "_save_rng_state@9": [3, 6]}, id="2 workers"),
        ],
    )
    def test_the_same_command_goes_on(self, ucf, few, uninterrupted, tmp_path, caplog, workers, kills):
        arguments, half_written = twelve_steps(ucf, few, tmp_path, workers), None
        for kill, complete in kills.items():
            assert forked(lambda kill=kill: (hooks.kill(kill), pretrain.main(arguments))[1]) == [-9]
            assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in complete]
            half_written = None
            if kill.startswith("_save"):
                half_written = tmp_path / f"checkpoint-{kill.partition('@')[2]}"
                assert half_written.joinpath("model.safetensors").is_file()
            left = [tmp_path / f"checkpoint-{n}" for n in complete] + ([half_written] if half_written else [])
            assert sorted(tmp_path.glob("checkpoint-*")) == sorted(left)
        caplog.clear()
        assert pretrain.main(arguments) == 0
        assert any("was being written" in text for text in caplog.messages) == (half_written is not None)
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-12"]
        curve = losses(tmp_path)
        assert len(curve) == 12
        assert len(set(curve.values())) == 12
        assert curve == losses(uninterrupted)
        assert_same(weights(tmp_path), weights(uninterrupted))


# --- several processes ---


class TestTwoProcesses:
    def test_a_classifier_learns_as_in_one(self, ucf, few, pretrained, tmp_path):
        """With all tokens kept nothing is random but the clips, which depend on seed, epoch and place in the list, so
        that both runs see the same batches of 16. Losses differ by rounding."""
        arguments = [TINY, "--model", pretrained, "--num_labels", 4, "--train_list", few, "--data_root", ucf,
                     "--keep_ratio", 1, "--epochs", 2, "--warmup_epochs", 0, *ON_CPU]  # fmt: skip
        done = torchrun("finetune", *arguments, "--output_dir", tmp_path / "two", processes=2)
        assert done.returncode == 0, done.stderr
        assert run(finetune, *arguments, "--output_dir", tmp_path / "one") == 0
        one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
        assert sorted(one) == sorted(two) == [1, 2, 3, 4]
        assert two == pytest.approx(one, rel=1e-4)
        assert abs(one[4] - one[1]) > 1e-3  # they did learn

    def test_each_process_takes_as_many_steps_whatever_is_bad(self, ucf, few, tmp_path, capfd):
        """33 videos, three of them bad, in batches of 16: two steps an epoch of 8 clips in each process."""
        (tmp_path / "list.csv").write_text(
            few.read_text().replace("_train05", "_missing1").replace("_train11", "_missing2")
            + '"left/missing3.avi",1\n'
        )
        arguments = [TINY, "--train_list", tmp_path / "list.csv", "--data_root", ucf, "--epochs", 2, *ON_CPU]

        def job() -> int:
            hooks.tell(tmp_path)
            return run(pretrain, *arguments, "--output_dir", tmp_path / "run")

        assert forked(job, processes=2) == [2, 2]  # 3 of 33 are more than 1 %
        said = capfd.readouterr().err
        told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert told[0]["shapes"] == told[1]["shapes"] == [[8, 8, 3, 64, 64]] * 4
        assert told[0]["seed"] != told[1]["seed"]  # or both would hide the same places of their clips
        bad = {Path(path).name for rank in told for path in rank["bad"]}
        assert told[0]["bad"] != told[1]["bad"]
        assert f"{len(bad)} of 33 videos could not be read, more than max_bad_fraction 0.01" in said
        assert all(name in said.rpartition("max_bad_fraction")[2] for name in bad)
        assert (tmp_path / "run" / "model.safetensors").is_file()
        assert run(pretrain, *arguments, "--output_dir", tmp_path / "one") == 2
        one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
        assert sorted(one) == sorted(two) == [1, 2, 3, 4]
        # The same clips, of which other tokens are hidden: before the first update that hardly matters.
        assert two[1] == pytest.approx(one[1], rel=0.02)

    def test_sharded_by_fsdp2_saved_and_resumed(self, ucf, few, tmp_path):
        """As far as CPUs can show it; the sharded run must be the unsharded one, step for step."""
        arguments = [TINY, "--train_list", few, "--data_root", ucf, "--epochs", 3, "--warmup_epochs", 0, *ON_CPU]
        assert forked(lambda: run(pretrain, *arguments, "--output_dir", tmp_path / "whole"), processes=2) == [0, 0]

        def job() -> int:
            hooks.shard_on_cpu()
            return run(pretrain, *arguments, *SHARDED, "--output_dir", tmp_path / "sharded")

        assert forked(job, processes=2) == [0, 0]
        assert (tmp_path / "sharded" / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
        curve, model = losses(tmp_path / "sharded"), weights(tmp_path / "sharded")
        assert curve == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        VideoMAEForPreTraining.from_pretrained(tmp_path / "sharded")
        (tmp_path / "sharded" / "checkpoint-6" / "complete").unlink()
        assert forked(job, processes=2) == [0, 0]
        assert (tmp_path / "sharded" / "checkpoint-6" / "complete").is_file()
        assert losses(tmp_path / "sharded") == curve
        assert_same(weights(tmp_path / "sharded"), model)

    def test_views_are_tested_once_each(self, ucf, lists, finetuned, tmp_path, capfd):
        """15 videos, one of them bad, between two processes, of which one tests a video twice."""
        test_list = tmp_path / "test.csv"
        videos = [line for line in (lists / "test.csv").read_text().splitlines() if not line.startswith("#")]
        test_list.write_text("\n".join([*videos[:14], '"no/such.avi",1']) + "\n")
        arguments = [TINY, "--model", finetuned, "--test_list", test_list, "--data_root", ucf,
                     "--keep_ratio", 1, "--use_cpu", "--dataloader_num_workers", 0]  # fmt: skip
        two = forked(lambda: run(evaluate, *arguments, "--predictions", tmp_path / "two.jsonl"), processes=2)
        assert two == [0, 0]
        assert capfd.readouterr().out.count("top-1") == 1
        assert run(evaluate, *arguments, "--predictions", tmp_path / "one.jsonl") == 0
        one, two = (
            [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
            for name in ("one.jsonl", "two.jsonl")
        )
        assert len(one) == 15
        for line, other in zip(one, two, strict=True):
            assert line.pop("probabilities", []) == pytest.approx(other.pop("probabilities", []), abs=1e-5)
            assert line == other


# --- bad files ---

REASONS = {"corrupted.avi": "undecodable", "sound.avi": "audio only", "missing.avi": "no such file"}


def with_bad_files(folder: Path, videos: list[str], ucf: Path) -> Path:
    """A list of these and three bad ones, all of label 0, among them."""
    good = next(ucf.glob("down/*.avi")).read_bytes()
    start = good.index(b"movi")
    (folder / "corrupted.avi").write_bytes(good[:start] + b"movi" + b"\xff" * (len(good) - start - 4))
    write_sound(folder / "sound.avi")
    bad = [f'"{folder / name}",0' for name in REASONS]
    path = folder / "list.csv"
    path.write_text("\n".join([bad[0], *videos[:5], bad[1], *videos[5:], bad[2]]) + "\n")
    return path


def write_sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def list_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


class TestBadFiles:
    """Three of sixty."""

    @pytest.fixture
    def arguments(self, ucf, lists, pretrained, tmp_path):
        path = with_bad_files(tmp_path, list_lines(lists / "train.csv")[:57], ucf)
        return [TINY, "--model", str(pretrained), "--num_labels", "4", "--train_list", str(path), "--data_root",
                str(ucf), "--output_dir", str(tmp_path / "run"), "--batch_size", "12", "--epochs", "2",
                "--warmup_epochs", "0", *ON_CPU]  # fmt: skip

    def test_a_few_are_left_out(self, arguments, tmp_path, caplog, monkeypatch):
        batches = []
        compute_loss = VideoTrainer.compute_loss

        def record(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append((tuple(inputs["pixel_values"].shape), tuple(inputs["labels"].shape)))
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        monkeypatch.setattr(VideoTrainer, "compute_loss", record)
        assert finetune.main([*arguments, "--max_bad_fraction", "0.1"]) == 0
        assert batches == [((12, 8, 3, 64, 64), (12,))] * 10  # each epoch has all sixty
        for name, reason in REASONS.items():
            told = [text for text in caplog.messages if text.startswith(f"left out {tmp_path / name}: ")]
            assert len(told) == 1  # although it was met in both epochs
            assert reason in told[0]
        assert sum(text.startswith("left out") for text in caplog.messages) == 3
        assert "3 of 60 videos could not be read" in caplog.messages
        counts = [line["bad_videos"] for line in last_state(tmp_path / "run")["log_history"] if "loss" in line]
        assert counts == sorted(counts)
        assert counts[4:] == [3] * 6

    def test_too_many_end_in_an_error_but_not_without_the_model(self, arguments, tmp_path, capfd):
        assert finetune.main(arguments) == 2
        message = capfd.readouterr().err.splitlines()[-1]
        assert "3 of 60 videos could not be read, more than max_bad_fraction 0.01" in message
        assert all(str(tmp_path / name) in message for name in REASONS)
        VideoMAEForVideoClassification.from_pretrained(tmp_path / "run")
        assert len(losses(tmp_path / "run")) == 10

    def test_in_a_test_they_are_missing_and_wrong(self, ucf, lists, finetuned, tmp_path, capfd):
        path = with_bad_files(tmp_path, list_lines(lists / "test.csv")[:12], ucf)
        predictions = tmp_path / "predictions.jsonl"
        arguments = [TINY, "--model", str(finetuned), "--test_list", str(path), "--data_root", str(ucf),
                     "--predictions", str(predictions), "--use_cpu", "--dataloader_num_workers", "0"]  # fmt: skip
        assert evaluate.main(arguments) == 0
        lines = [json.loads(line) for line in predictions.read_text().splitlines()]
        assert len(lines) == 15
        problems = {Path(line["video"]).name: line["problem"] for line in lines if "problem" in line}
        assert problems.keys() == REASONS.keys()
        assert all(reason in problems[name] for name, reason in REASONS.items())
        correct = sum(line.get("top5", [None])[0] == line["label"] for line in lines)
        assert 9 <= correct <= 12  # four in five of those that can be read
        summary = json.loads((tmp_path / "predictions.summary.json").read_text())
        assert summary == {"videos": 15, "top1": 100 * correct / 15, "top5": 80.0, "missing": 3}
        assert "3 of them unreadable and counted as wrong" in capfd.readouterr().out


def test_a_loader_that_is_killed_in_a_test_is_three_lines(ucf, lists, finetuned, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate.TestViews, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    arguments = [TINY, "--model", finetuned, "--test_list", lists / "test.csv", "--data_root", ucf, "--use_cpu"]
    assert run(evaluate, *arguments, "--predictions", tmp_path / "p.jsonl") == 4
    first, second, third = capfd.readouterr().err.splitlines()[-3:]
    assert "a process that decodes videos was killed: DataLoader worker" in first
    assert "--dataloader_num_workers" in second
    assert third == "Run it again as it is"


# --- wrong settings ---


class TestWrongSettings:
    """One line and status 2, before any video is read: those in the list don't exist."""

    @pytest.fixture(autouse=True)
    def _no_reading(self, monkeypatch):
        def read(*args: Any, **kwargs: Any) -> None:
            pytest.fail("a video was read")

        monkeypatch.setattr("clips.read_frames", read)

    @pytest.fixture
    def names(self, pretrained, finetuned, tmp_path):
        """What {…} stands for in the arguments below."""
        lists = {"list": [f"no/such{i}.mp4 {i % 4}" for i in range(16)], "empty": ["# nothing"], "seven": ["a.mp4 7"]}
        for name, lines in lists.items():
            (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
        (tmp_path / "bare").mkdir()
        (tmp_path / "wrong.yaml").write_text("pretraining: {epohcs: 3}\nfinetuning: {epohcs: 3}\ntesting: {clisp: 3}\n")
        reference = randomize(FineTuningModel("videomae", img_size=48, embed_dim=384, num_heads=6, depth=1))
        torch.save({"model": reference.state_dict()}, tmp_path / "videomae.pth")
        return {name: str(tmp_path / f"{name}.csv") for name in lists} | {
            "tiny": TINY, "wrong": str(tmp_path / "wrong.yaml"), "pretrained": str(pretrained),
            "finetuned": str(finetuned), "here": str(tmp_path),
            "bare": str(tmp_path / "bare"), "pth": str(tmp_path / "videomae.pth"), "out": str(tmp_path / "out"),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("script", "arguments", "expected"),
        [
            ("pretrain", "{tiny} --train_list {list} --epohcs 3", ["no such setting: --epohcs 3"]),
            ("pretrain", "{wrong} --train_list {list}", ["{wrong}", "no such setting in pretraining: epohcs"]),
            ("pretrain", "{tiny} --train_list {list} --epochs many", ["--epochs", "many"]),
            ("pretrain", "{tiny} --train_list {empty}", ["{empty}", "the list is empty"]),
            ("pretrain", "{tiny} --train_list {here}/none.csv", ["{here}/none.csv", "no such file"]),
            ("pretrain", "{tiny}", ["data is not set", "train_list"]),
            ("pretrain", "{tiny} --train_list {list} --batch_size 32", ["train_list has 16 videos", "batch_size"]),
            ("pretrain", "{tiny} --train_list {list} --data_root {here}/none", ["data_root", "{here}/none"]),
            ("pretrain", "{tiny} --train_list {list}", ["train_list: none of its first 5 videos exists", "data_root"]),
            ("pretrain", "{tiny} --train_list {list} --model {here}/none", ["model: {here}/none is no file, no fol"]),
            ("pretrain", "{tiny} --train_list {list} --model {bare}", ["model: {bare} can't be loaded"]),
            ("pretrain", "{tiny} --train_list {list} --model {pretrained} --size 32",
             ["model: {pretrained} takes 8 frames of 64² pixels", "size 32"]),
            ("pretrain", "{tiny} --train_list {list} --model {pth} --size 48", ["model: {pth}", "pixel decoder"]),
            ("finetune", "{tiny} --train_list {list} --data {here} --num_labels 4", ["data and train_list both"]),
            ("pretrain", "{tiny} --train_list {list} --model {pretrained} --decoder_depth 4",
             ["decoder_depth is of a model that is built anew"]),
            ("finetune", "{tiny} --train_list {list} --model {pretrained} --num_labels 4 --patch_size 8",
             ["patch_size is of a model that is built anew, {pretrained} has its own"]),
            ("finetune", "{tiny} --train_list {list} --model {pretrained} --num_labels 4 --family mvd",
             ["family is of a .pth, {pretrained} is none"]),
            ("finetune", "{tiny} --train_list {list} --model {pretrained}", ["num_labels"]),
            ("finetune", "{tiny} --train_list {seven} --model {pretrained} --num_labels 4",
             ["{seven}:1", "at most 3 (4 labels)", "7"]),
            ("finetune", "{tiny} --train_list {list} --eval_list {seven} --model {pretrained} --num_labels 4",
             ["{seven}:1", "at most 3 (4 labels)"]),
            ("finetune", "{tiny} --train_list {list} --model {here}/none --num_labels 4",
             ["model: {here}/none is no file, no folder"]),
            ("finetune", "{tiny} --train_list {list} --model no-such-model --num_labels 4",
             ["model: no-such-model is no file, no folder"]),
            ("finetune", "{tiny} --train_list {list} --model {bare} --num_labels 4", ["model: {bare} can't be loaded"]),
            ("finetune", "{tiny} --train_list {list} --model {pretrained} --num_labels 4 --num_frames 16",
             ["model: {pretrained} takes 8 frames of 64² pixels", "num_frames 16"]),
            ("finetune", "{tiny} --train_list {list} --model {pth} --num_labels 4 --size 40",
             ["model: {pth}", "image_size=40"]),
            ("evaluate", "{tiny} --test_list {list} --clisp 3 --model {pretrained}", ["no such setting: --clisp 3"]),
            ("evaluate", "{wrong} --test_list {list} --model {pretrained}", ["no such setting in testing: clisp"]),
            ("evaluate", "{tiny} --model {pretrained}", ["data is not set", "test_list"]),
            ("evaluate", "{tiny} --test_list {list} --model {here}/none", ["model: {here}/none is no file, no folder"]),
            ("evaluate", "{tiny} --test_list {seven} --model {finetuned}", ["{seven}:1", "7"]),
            ("evaluate", "{tiny} --test_list {empty} --model {finetuned}", ["{empty}", "the list is empty"]),
            ("evaluate", "{tiny} --test_list {list} --model {pretrained} --crops 2", ["crops must be 1 or 3, got 2"]),
        ],
    )  # fmt: skip
    def test_one_line_and_status_2(self, names, capfd, script, arguments, expected):
        main = {"pretrain": pretrain.main, "finetune": finetune.main, "evaluate": evaluate.main}[script]
        given = [argument.format(**names) for argument in arguments.split()]
        given += ["--use_cpu"] if script == "evaluate" else ["--output_dir", names["out"], *ON_CPU]
        assert main(given) == 2
        *before, message = capfd.readouterr().err.splitlines()
        assert not [line for line in before if "Error" in line or "Traceback" in line]
        for part in expected:
            assert part.format(**names) in message
        assert not list(Path(names["out"]).glob("*"))

    def test_a_batch_smaller_than_the_number_of_processes(self, names, capfd, monkeypatch):
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda training: 32))
        assert pretrain.main([TINY, "--train_list", names["list"], "--output_dir", names["out"], *ON_CPU]) == 2
        assert "batch_size 16 can't be spread over 32 processes" in capfd.readouterr().err.splitlines()[-1]

    def test_sharding_where_accelerate_would_not_say_that_it_does_not(self, names, capfd):
        arguments = [TINY, "--train_list", names["list"], "--output_dir", names["out"], *ON_CPU, *SHARDED]
        assert 2 in forked(lambda: run(pretrain, *arguments), processes=2)
        assert "fsdp: accelerate shards a model on GPUs only, this run is on the cpu" in capfd.readouterr().err


# --- views ---


class Reads:
    """A model whose probabilities for a view are those of its row of a table, in the order in which it sees them."""

    def __init__(self, table: list[list[float]]) -> None:
        self.logits = iter((torch.tensor(table).log() + 2).unbind())  # softmax doesn't see what is added
        self.seen: list[Tensor] = []

    def __call__(self, pixel_values: Tensor) -> Any:
        self.seen.append(pixel_values)
        return type("Output", (), {"logits": torch.stack([next(self.logits) for _ in pixel_values])})


class TestViews:
    def test_the_mean_is_of_probabilities(self):
        # Two views favour class 0 slightly, one favours class 1 strongly: a vote, or a mean of logits, says otherwise.
        model = Reads([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.01, 0.98, 0.01]])
        views = torch.zeros(3, 2, 3, 4, 4, dtype=torch.uint8)
        views[2] = 255
        mean = evaluate.mean_softmax(model, BatchAugmentation(), views, at_once=2)
        assert mean.tolist() == pytest.approx([1.11 / 3, 1.68 / 3, 0.21 / 3])
        assert [len(part) for part in model.seen] == [2, 1]
        red, _, blue = model.seen[1][0, 0, :, 0, 0].tolist()
        assert red == pytest.approx((1 - 0.485) / 0.229, rel=1e-4)  # ImageNet's
        assert blue == pytest.approx((1 - 0.406) / 0.225, rel=1e-4)

    def test_lines_by_hand(self):
        entry = Entry(Path("a/b.mp4"), 2)
        mean = torch.tensor([0.05, 0.1, 0.4, 0.1234567, 0.3, 0.0265433])
        assert evaluate.line_for(entry, mean, "") == {
            "video": "a/b.mp4", "label": 2, "top5": [2, 4, 3, 1, 0], "probabilities": [0.4, 0.3, 0.123457, 0.1, 0.05]
        }  # fmt: skip
        assert evaluate.line_for(entry, mean[:2], "")["top5"] == [1, 0]
        assert evaluate.line_for(entry, None, "gone") == {"video": "a/b.mp4", "label": 2, "problem": "gone"}

    def test_scores_by_hand(self):
        lines = [
            {"label": 2, "top5": [2, 4, 3, 1, 0]},
            {"label": 0, "top5": [2, 4, 3, 1, 0]},
            {"label": 5, "top5": [2, 4, 3, 1, 0]},
            {"label": 0, "problem": "gone"},
            {"label": 1, "top5": [1, 0, 2, 3, 4]},
            {"label": 4, "top5": [0, 4, 2, 3, 1]},
            {"label": 3, "top5": [4, 3, 2, 1, 0]},
            {"label": 3, "problem": "gone"},
        ]
        assert evaluate.score(lines) == evaluate.Scores(videos=8, top1=25.0, top5=62.5, missing=2)
