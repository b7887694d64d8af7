"""`--data`: from a folder of videos to a model that a pipeline takes; its split, its batch, its labels; streams."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import evaluate
import finetune
import hooks
import pretrain
import pytest
import torch
from checkpoints import mark_complete
from data import held_out_of_trained, load_data
from decoding import read_frames
from forking import forked
from made_videos import write_frames
from motion_videos import moving_shape
from pipelines import for_pipeline
from recipe import FinetuningRecipe, fit, parse
from recorded import record, write
from run import TRAINING_DEFAULTS
from training_runs import ON_CPU, TINY, assert_same, last_state, losses, weights
from transformers import AutoImageProcessor, TrainingArguments, VideoMAEForVideoClassification, pipeline
from video_list import Entry

import everest_tokens as et
from everest_tokens.video import load_clip

LABELS = {"a": "up", "b": "left"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/1.mp4 … a/8.mp4, b/1.mp4 …: two directions of motion, and what lies around in such folders."""
    root = tmp_path_factory.mktemp("own") / "videos"
    for label, direction in LABELS.items():
        for number in range(1, 9):
            write_frames(root / label / f"{number}.mp4", moving_shape(direction, 100 * (label == "b") + number))
    (root / "a" / ".DS_Store").touch()
    (root / "notes.txt").touch()
    return root


@pytest.fixture(scope="module")
def pre(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pre")
    assert run(pretrain, "--data", videos, "--output_dir", out, "--epochs", 1, "--batch_size", 4, *ON_CPU) == 0
    assert sorted(losses(out)) == [1, 2, 3, 4]
    return out


@pytest.fixture(scope="module")
def fine(videos: Path, pre: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("product") / "fine"
    assert run(finetune, *small(videos, out, "--val_fraction", 0.25, "--model", pre)) == 0
    return out


@pytest.fixture(scope="module")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets", reason="the data extra is not installed")
    from test_streams import write_shard

    root = tmp_path_factory.mktemp("shards")
    files = sorted(videos.glob("*/*.mp4"))
    for shard in range(4):
        samples = {f"v{n:02}": (files[n].read_bytes(), int(files[n].parent.name == "b")) for n in range(shard, 16, 4)}
        write_shard(root / f"train-{shard}.tar", samples)
    write_shard(root / "val-0.tar", {"x": (files[0].read_bytes(), 0), "y": (files[-1].read_bytes(), 1)})
    return root


def run(script: Any, *arguments: Any) -> int:
    return script.main([TINY, *map(str, arguments)])


def small(videos: Path, out: Path, *more: Any) -> list[Any]:
    """Fine-tuning of one epoch without a pre-trained model."""
    return ["--data", videos, "--output_dir", out, "--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, *ON_CPU,
            *more]  # fmt: skip


class TestTheWholeWay:
    """The commands of docs/your-videos.md, one after the other."""

    def test_a_pipeline_gives_the_labels(self, videos, fine):
        pipe = pipeline("video-classification", str(fine))
        given: list[torch.Tensor] = []
        pipe.model.register_forward_pre_hook(
            lambda model, args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
        )
        model = VideoMAEForVideoClassification.from_pretrained(fine).eval()
        path = videos / "a" / "1.mp4"
        video = for_pipeline(path, 8)
        spread = getattr(pipe, "video_processor", None) is not None  # older ones take a video's first frames
        frames = read_frames(path, [number * 12 // 8 if spread else number for number in range(8)])
        clip = AutoImageProcessor.from_pretrained(fine)(list(frames.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        for keep_ratio in (None, 0.5):  # as plain transformers, then patched, with what training recorded
            if keep_ratio:
                et.patch_videomae(pipe.model)
                et.patch_videomae(model, et.ReRoSelector(keep_ratio))
            answers = {answer["label"]: answer["score"] for answer in pipe(video)}
            with torch.no_grad():
                scores = model(given[-1]).logits.softmax(dim=1)[0].tolist()
            torch.testing.assert_close(given[-1], clip["pixel_values"])
            assert answers == pytest.approx({"a": scores[0], "b": scores[1]}, abs=1e-6)

    def test_the_processor_gives_the_clips_of_training(self, videos, fine):
        """What the pipeline's processor makes of the frames is what load_clip does."""
        processor = AutoImageProcessor.from_pretrained(fine)
        video = videos / "a" / "1.mp4"
        torch.testing.assert_close(
            load_clip(video, num_frames=8, stride=1, processor=processor),
            load_clip(video, num_frames=8, stride=1, size=64),
        )

    def test_it_is_tested_on_what_was_held_out(self, videos, fine, tmp_path):
        out = tmp_path / "predictions.jsonl"
        assert (
            run(evaluate, "--model", fine, "--data", videos, "--predictions", out, "--dataloader_num_workers", 0) == 0
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        held_out = json.loads((fine / "recipe.json").read_text())["held_out"]
        assert sorted(line["video"] for line in lines) == sorted(str(videos / name) for name in held_out)
        assert Counter(Path(line["video"]).parent.name for line in lines) == {"a": 2, "b": 2}
        assert all("ab"[line["label"]] == Path(line["video"]).parent.name for line in lines)

    @pytest.mark.parametrize(("name", "tested"), [("videos", 4), ("other-videos", 16)])
    def test_the_split_is_found_again_where_the_folder_was_moved(self, videos, fine, tmp_path, name, tested):
        """One of another name may well be other data, whose videos have the same names."""
        moved = shutil.copytree(videos, tmp_path / "elsewhere" / name)
        out = tmp_path / "predictions.jsonl"
        assert run(evaluate, "--model", fine, "--data", moved, "--predictions", out, "--dataloader_num_workers", 0) == 0
        assert len(out.read_text().splitlines()) == tested

    def test_metrics_are_those_of_the_model(self, videos, fine):
        """Counted anew, with the model that was written, one clip at a time."""
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(fine)).eval()
        names = json.loads((fine / "recipe.json").read_text())["held_out"]
        right = 0
        for name in names:
            with torch.no_grad():
                logits = model(load_clip(videos / name, num_frames=8, stride=1, size=64)).logits
            right += int(logits.argmax()) == "ab".index(name[0])
        metrics = json.loads((fine / "metrics.json").read_text())
        assert metrics["videos"] == 4
        assert metrics["accuracy"] == right / 4
        assert (fine / "confusion.png").is_file()

    def test_labels_that_the_model_does_not_know_are_an_error(self, videos, fine, tmp_path, capsys):
        other = shutil.copytree(videos, tmp_path / "videos")
        (other / "b").rename(other / "c")
        assert run(evaluate, "--model", fine, "--data", other) == 2
        assert "labels that the model wasn't trained on: c" in capsys.readouterr().err


class TestFitted:
    def test_it_says_what_will_happen(self, videos, tmp_path, caplog):
        caplog.set_level("INFO")
        assert run(finetune, *small(videos, tmp_path / "run", "--val_fraction", 0.25)) == 0
        for line in (
            "12 to train on, 4 held out; left out: 1 hidden, 1 other files",
            "2: a, b",
            "3 of 4 clips, 1 epochs",
            "8 frames of 64²: 32 of 64 tokens kept",
        ):
            assert line in caplog.text

    def test_a_new_model_where_none_is_given(self, videos, tmp_path, caplog):
        assert run(finetune, *small(videos, tmp_path / "run")) == 0
        assert "no model is given: a new one is trained, tiny, from random weights" in caplog.text
        model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "run")
        assert model.config.id2label == {0: "a", 1: "b"}
        assert model.config.use_mean_pooling
        assert not (tmp_path / "run" / "metrics.json").exists()
        assert (tmp_path / "run" / "preprocessor_config.json").exists()

    def test_a_batch_is_no_more_than_the_clips(self, videos, tmp_path, caplog):
        recipe, training = parse(
            FinetuningRecipe, [TINY, "--data", str(videos), "--val_fraction", "0.25", "--output_dir", str(tmp_path),
                               "--repeats", "2", "--batch_size", "64", "--use_cpu"], TRAINING_DEFAULTS
        )  # fmt: skip
        data = load_data(recipe, training)
        fit(training, recipe, data)
        assert recipe.batch_size == 24  # 12 clips, each twice
        assert training.per_device_train_batch_size == 12
        assert training.learning_rate == pytest.approx(4.8e-2 * 24 / 256)
        assert "batch_size is 24, there are no more clips" in caplog.text
        assert (len(data.train), len(data.held_out), recipe.num_labels) == (12, 4, 2)

    def test_a_trial_of_the_whole_way(self, videos, tmp_path):
        out = tmp_path / "run"
        assert run(finetune, "--data", videos, "--val_fraction", 0.5, "--output_dir", out, "--limit", 4, *ON_CPU) == 0
        assert not out.exists()
        trial = tmp_path / "run-limit4"
        assert json.loads((trial / "metrics.json").read_text())["videos"] == 4
        assert last_state(trial)["global_step"] == 1
        assert {path.name for path in trial.iterdir()} >= {"README.md", "confusion.csv", "model.safetensors"}

    def test_a_folder_with_val_needs_no_fraction(self, videos, tmp_path, caplog):
        root = tmp_path / "videos"
        for part, number in (("train", 3), ("val", 2), ("test", 1)):
            for label in LABELS:
                (root / part / label).mkdir(parents=True)
                for video in range(1, number + 1):
                    shutil.copy(videos / label / f"{video}.mp4", root / part / label)
        out = tmp_path / "run"
        assert run(finetune, *small(root, out, "--batch_size", 6)) == 0
        assert json.loads((out / "metrics.json").read_text())["videos"] == 4
        caplog.set_level("INFO")
        predictions = tmp_path / "predictions.jsonl"
        assert run(evaluate, "--model", out, "--data", root, "--predictions", predictions) == 0
        assert "tested: test of" in caplog.text
        assert len(predictions.read_text().splitlines()) == 2

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ([], "data is not set: a folder of videos"),
            (["--data", "{videos}", "--train_list", "x"], "one of them"),
            (["--data", "./nothing"], "data: there is no folder ./nothing"),
            (["--data", "nothing"], "data: nothing is no folder"),
            (["--data", "{videos}/a"], "expected a folder for each label"),
            (["--data", "{videos}", "--val_fraction", "1"], "val_fraction must be between 0 and 1"),
            (["--data", "{videos}", "--load_best_model_at_end", "true"], "val_fraction"),
            (["--data", "{videos}", "--early_stopping", "2"], "early_stopping needs load_best_model_at_end"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, videos, tmp_path, capsys, settings, message):
        given = [setting.format(videos=videos) for setting in settings]
        assert run(finetune, *given, "--output_dir", tmp_path / "run", *ON_CPU) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


class TestLists:
    @pytest.fixture
    def train_list(self, videos, tmp_path):
        """Two parts of each video, with the names of the labels as prepare.py writes them."""
        path = tmp_path / "train.csv"
        lines = [
            f'"{video.relative_to(videos).as_posix()}",{int(video.parent.name == "b")},{start},{start + 0.2}'
            for video in sorted(videos.glob("*/*.mp4"))
            for start in (0, 0.2)
        ]
        path.write_text("\n".join(['# labels: ["upwards", "to the left"]', *lines]) + "\n")
        return path

    def test_videos_are_held_out_whole(self, videos, train_list, tmp_path):
        recipe = FinetuningRecipe(train_list=str(train_list), data_root=str(videos), num_labels=2, val_fraction=0.25)
        data = load_data(recipe, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
        assert (len(data.train), len(data.held_out)) == (24, 8)
        assert not {entry.path for entry in data.train} & {entry.path for entry in data.held_out}

    def test_labels_have_the_names_that_the_list_says(self, videos, train_list, tmp_path):
        settings = ["--train_list", train_list, "--data_root", videos, "--num_labels", 2, "--batch_size", 8]
        assert run(finetune, *settings, "--limit", 8, "--output_dir", tmp_path / "run", *ON_CPU) == 0
        model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "run-limit8")
        assert model.config.id2label == {0: "upwards", 1: "to the left"}


class TestHubVideos:
    def test_a_data_set_that_was_saved(self, videos, tmp_path):
        datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
        files = sorted(videos.glob("*/*.mp4"))
        rows = {"video": [{"path": path.name, "bytes": path.read_bytes()} for path in files],
                "label": [int(path.parent.name == "b") for path in files]}  # fmt: skip
        features = datasets.Features({"video": datasets.Video(), "label": datasets.ClassLabel(names=["a", "b"])})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
        out, predictions = tmp_path / "run", tmp_path / "predictions.jsonl"
        assert run(finetune, *small(tmp_path / "set", out, "--val_fraction", 0.25)) == 0
        assert VideoMAEForVideoClassification.from_pretrained(out).config.id2label == {0: "a", 1: "b"}
        assert run(evaluate, "--model", out, "--data", tmp_path / "set", "--predictions", predictions) == 0
        held_out = json.loads((out / "recipe.json").read_text())["held_out"]
        lines = [json.loads(line) for line in predictions.read_text().splitlines()]
        assert sorted(line["video"] for line in lines) == sorted(held_out)
        assert Counter(line["label"] for line in lines) == {0: 2, 1: 2}


class TestGoingOn:
    def test_the_split_stays_when_videos_are_added(self, videos, tmp_path):
        root = shutil.copytree(videos, tmp_path / "videos")
        recipe = FinetuningRecipe(data=str(root), val_fraction=0.25)
        new, old = (TrainingArguments(str(tmp_path / name), use_cpu=True) for name in ("new", "old"))
        before = load_data(recipe, old)
        Path(old.output_dir).mkdir()
        write(Path(old.output_dir), record(recipe, old, held_out=before.held_out_names))
        for number in range(20, 30):
            shutil.copy(root / "a" / "1.mp4", root / "a" / f"{number}.mp4")
        assert load_data(recipe, new).held_out_names != before.held_out_names
        other = dataclasses.replace(recipe, val_fraction=0.5)
        assert len(load_data(other, old).held_out) == (18 + 8) // 2  # where it is refused later if it has a checkpoint
        after = load_data(recipe, old)
        assert after.held_out == before.held_out
        assert len(after.train) == len(before.train) + 10

    def test_the_split_is_that_of_another_runs_checkpoint(self, videos, tmp_path):
        """Until the run that began from it has a checkpoint of its own."""
        recipe = FinetuningRecipe(data=str(videos), val_fraction=0.25)
        old, new = (tmp_path / name for name in ("old", "new"))
        begun = TrainingArguments(str(new), seed=7, use_cpu=True, resume_from_checkpoint=str(old / "checkpoint-3"))
        anew = load_data(recipe, begun)
        for folder, seed in ((old, 0), (new, 1)):
            training = TrainingArguments(str(folder), seed=seed, use_cpu=True)
            split = load_data(recipe, training).held_out_names
            assert split != anew.held_out_names
            (folder / "checkpoint-3").mkdir(parents=True)
            for place in (folder, folder / "checkpoint-3"):
                write(place, record(recipe, training, held_out=split))
            assert load_data(recipe, begun).held_out_names == json.loads((old / "recipe.json").read_text())["held_out"]
        mark_complete(new / "checkpoint-3")
        assert load_data(recipe, begun).held_out_names == split

    @pytest.mark.parametrize(
        ("place", "missing", "held_out"),
        [("then/videos", 0, True), ("then/videos", 1, True), ("now/videos", 0, True), ("now/videos", 1, False),
         ("now/others", 0, False)],
    )  # fmt: skip
    def test_what_was_held_out_is_of_the_data_that_was_trained_on(self, tmp_path, caplog, place, missing, held_out):
        names = ["a/1.mp4", "b/2.mp4"]
        trained = {"data": str(tmp_path / "then" / "videos"), "held_out": names}
        data = tmp_path / place
        entries = [Entry(data / name, 0) for name in ["a/0.mp4", *names[missing:]]]
        expected = entries[1:] if held_out else []
        assert held_out_of_trained(entries, trained, str(data)) == expected
        assert ("is not what the model was trained on" in caplog.text) != held_out

    def test_other_labels_are_an_error(self, videos, tmp_path, capsys):
        root = shutil.copytree(videos, tmp_path / "videos")
        assert run(finetune, *small(root, tmp_path / "run")) == 0
        (root / "b").rename(root / "c")
        assert run(finetune, *small(root, tmp_path / "run", "--epochs", 2)) == 2
        assert "labels ['a', 'b'], not ['a', 'c']" in capsys.readouterr().err

    def test_balanced_epochs_are_those_of_a_run_that_was_not_killed(self, videos, tmp_path):
        root = shutil.copytree(videos, tmp_path / "videos")
        for number in range(3, 9):
            (root / "b" / f"{number}.mp4").unlink()
        settings = ["--balanced", "--epochs", 2, "--keep_ratio", 1, "--save_strategy", "steps", "--save_steps", 1,
                    "--save_total_limit", 9]  # fmt: skip
        assert run(finetune, *small(root, tmp_path / "whole", *settings)) == 0
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
        shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
        assert run(finetune, *small(root, tmp_path / "killed", *settings)) == 0
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
        assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))

    def test_early_stopping_keeps_the_best(self, videos, tmp_path):
        """Without a learning rate no evaluation is better than the first."""
        settings = ["--early_stopping", 2, "--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy",
                    "--epochs", 20, "--learning_rate", 1e-12, "--val_fraction", 0.25]  # fmt: skip
        assert run(finetune, *small(videos, tmp_path / "run", *settings)) == 0
        state = last_state(tmp_path / "run")
        assert state["epoch"] == 3
        assert state["best_model_checkpoint"].endswith("checkpoint-3")


class TestStreams:
    def test_pretraining_goes_on_where_it_was_killed(self, shards, tmp_path):
        """With two micro-batches a step: a place in the stream is not a number of steps."""
        arguments = [TINY, "--data", shards, "--clips_per_epoch", 16, "--epochs", 2, "--batch_size", 4,
                     "--warmup_epochs", 0, "--save_strategy", "steps", "--save_steps", 3,
                     "--gradient_accumulation_steps", 2, *ON_CPU]  # fmt: skip
        assert pretrain.main([*map(str, arguments), "--output_dir", str(tmp_path / "whole")]) == 0
        again = [*map(str, arguments), "--output_dir", str(tmp_path / "killed")]
        assert forked(lambda: (hooks.kill("compute_loss@6"), pretrain.main(again))[1]) == [-9]
        assert forked(lambda: pretrain.main(again)) == [0]
        whole = losses(tmp_path / "whole")
        assert sorted(whole) == list(range(1, 9))
        assert losses(tmp_path / "killed") == whole
        assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))

    def test_what_was_unreadable_before_a_kill_counts(self, videos, tmp_path, capsys):
        """Four of sixteen samples, of which the last step has at most its own."""
        pytest.importorskip("datasets", reason="the data extra is not installed")
        from test_streams import write_shard

        files = sorted(videos.glob("*/*.mp4"))
        content = [b"no video" if number % 4 == 0 else file.read_bytes() for number, file in enumerate(files)]
        write_shard(tmp_path / "train-0.tar", {f"v{number:02}": (each, 0) for number, each in enumerate(content)})
        arguments = [TINY, "--data", str(tmp_path), "--clips_per_epoch", "16", "--epochs", "1", "--batch_size", "4",
                     "--warmup_epochs", "0", "--save_strategy", "steps", "--save_steps", "1", *ON_CPU,
                     "--max_bad_fraction", "0.2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
        assert forked(lambda: (hooks.kill("compute_loss@3"), pretrain.main(arguments))[1]) == [-9]
        assert pretrain.main(arguments) == 2
        assert (
            "4 of 16 videos could not be read, more than max_bad_fraction 0.2: v00, v04, v08" in capsys.readouterr().err
        )

    def test_two_processes_fine_tune(self, shards, tmp_path):
        out = tmp_path / "run"
        arguments = ["--data", shards, "--clips_per_epoch", 16, "--num_labels", 2, "--epochs", 1, "--batch_size", 8,
                     "--warmup_epochs", 0, "--output_dir", out, *ON_CPU]  # fmt: skip
        assert forked(lambda: run(finetune, *arguments), processes=2) == [0, 0]
        assert sorted(losses(out)) == [1, 2]
        assert json.loads((out / "metrics.json").read_text())["videos"] == 2
        assert run(evaluate, "--model", out, "--data", shards, "--predictions", tmp_path / "p.jsonl") == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ([], "clips_per_epoch is not set"),
            (["--clips_per_epoch", 16], "num_labels is not set"),
            (["--clips_per_epoch", 16, "--num_labels", 2, "--balanced"], "balanced"),
        ],
    )
    def test_what_a_stream_does_not_say(self, shards, tmp_path, capsys, settings, message):
        assert run(finetune, "--data", shards, "--output_dir", tmp_path / "run", *settings, *ON_CPU) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("val", [True, False])
    def test_nothing_has_to_be_held_out_where_there_are_shards_for_it(self, shards, tmp_path, val):
        """recipes/own.yaml has a val_fraction."""
        data = shards if val else shards / "train-*.tar"
        recipe = FinetuningRecipe(data=str(data), num_labels=2, clips_per_epoch=16, val_fraction=0.2)
        training = TrainingArguments(str(tmp_path / "run"), use_cpu=True)
        if val:
            assert len(load_data(recipe, training).held_out) == 2
        else:
            with pytest.raises(ValueError, match="val_fraction: nothing can be held out of a stream"):
                load_data(recipe, training)
