"""What a model was trained with: recorded in its folder, the default of its test, and what a run can go on with."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import finetune
import pretrain
import pytest
import torch
from checkpoints import mark_complete
from recipe import FinetuningRecipe, parse
from recorded import check_goes_on, read, record, write
from run import TRAINING_DEFAULTS
from training_runs import EXAMPLES, ON_CPU, TINY
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, ViTConfig

import everest_tokens as et
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))


def for_training(path: Path, *more: str) -> tuple[FinetuningRecipe, Any]:
    needed = ["--train_list", "train.csv", "--model", "m", "--num_labels", "4", "--use_cpu"]
    return parse(FinetuningRecipe, [str(path), *needed, *more], TRAINING_DEFAULTS)


def for_testing(path: Path, model: Path, *more: str) -> tuple[Any, dict[str, Any]]:
    recipe = evaluate.parse([str(path), "--model", str(model), "--test_list", "test.csv", *more])
    return recipe, evaluate.settle(recipe)


class TestTheFile:
    def test_it_is_written_whole_or_stays_as_it_was(self, tmp_path, monkeypatch):
        write(tmp_path, {"size": 64})
        original = Path.write_text

        def cut_short(path: Path, text: str, **settings: Any) -> None:
            original(path, text[:5], **settings)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", cut_short)
            with pytest.raises(OSError, match="No space"):
                write(tmp_path, {"size": 32})
        assert read(tmp_path) == {"size": 64}
        write(tmp_path, {"size": 32})
        assert read(tmp_path) == {"size": 32}
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]

    @pytest.mark.parametrize("content", [b"", b'{"size": 6', b"[1]", b"\xff"])
    def test_a_broken_one_is_named(self, tmp_path, content):
        (tmp_path / "recipe.json").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/recipe.json is broken: ")):
            read(tmp_path)


class TestARecipeIsTestedAsItTrains:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_all_that_is_recorded_is_the_default(self, path, tmp_path, caplog):
        recipe, training = for_training(path)
        write(tmp_path, record(recipe, training))
        tested, trained = for_testing(path, tmp_path)
        assert tested.stride == recipe.stride
        assert tested.keep_ratio is None  # the model's own, which its config has
        expected = {name: getattr(recipe, name) for name in ("num_frames", "size", "stride", "keep_ratio", "alpha")}
        expected |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "section": "finetuning"}
        assert {name: trained[name] for name in expected} == expected
        assert not caplog.messages

    @pytest.mark.parametrize("name", ["stride", "keep_ratio"])
    def test_what_differs_is_said_in_a_line(self, name, tmp_path, caplog):
        recipe, training = for_training(Path(TINY))
        write(tmp_path, record(recipe, training))
        tested, _ = for_testing(Path(TINY), tmp_path, f"--{name}", "1" if name == "keep_ratio" else "0")
        assert getattr(tested, name) == (1.0 if name == "keep_ratio" else 0)
        assert caplog.messages == [
            f"{name} is {getattr(tested, name)} in this test, the model was trained with {getattr(recipe, name)}"
        ]

    def test_a_model_of_which_nothing_is_recorded(self, tmp_path, caplog):
        tested, trained = for_testing(Path(TINY), tmp_path)
        assert (tested.stride, trained) == (4, {})
        assert caplog.messages == [f"nothing in {tmp_path} says how it was trained: it is tested with stride 4"]

    def test_a_hub_model_of_which_nothing_is_recorded(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert read("nobody/no-such-model") == {}

    def test_the_pixels_are_normalised_as_in_training(self, untrained, tmp_path, monkeypatch, capfd):
        folder = untrained(VideoMAEForVideoClassification)
        write(folder, {"stride": 1, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]})
        seen = []
        white = torch.full((1, 8, 3, 64, 64), 255, dtype=torch.uint8)
        views = [{"pixel_values": white, "labels": 0, "index": 0, "problem": ""}]
        monkeypatch.setattr(evaluate, "TestViews", lambda *_: views)
        forward = VideoMAEForVideoClassification.forward
        monkeypatch.setattr(VideoMAEForVideoClassification, "forward", lambda model, pixel_values: (
            seen.append(pixel_values), forward(model, pixel_values=pixel_values)
        )[1])  # fmt: skip
        (tmp_path / "list.csv").write_text("a.mp4 0\n")
        assert evaluate.main([TINY, "--model", str(folder), "--test_list", str(tmp_path / "list.csv"), "--predictions",
                              str(tmp_path / "p.jsonl"), *TESTED]) == 0  # fmt: skip
        assert seen[-1][0, 0, :, 0, 0].tolist() == pytest.approx([0.9, 0.4, 0.175])


TESTED = ["--use_cpu", "--dataloader_num_workers", "0"]


@pytest.fixture
def untrained(tmp_path: Path) -> Callable[..., Path]:
    """Folders of models of the tiny recipe's shape, as `save_pretrained` writes them."""

    def save(kind: Any, **settings: Any) -> Path:
        config = VideoMAEConfig(image_size=64, patch_size=16, num_frames=8, hidden_size=32, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=64, decoder_hidden_size=32,
                                decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
                                decoder_intermediate_size=64, **settings)  # fmt: skip
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        return folder

    return save


def run(script: Any, capfd: Any, *arguments: Any) -> str:
    """The line that a script ends with, with status 2."""
    assert script.main([TINY, *map(str, arguments)]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A list of sixteen that exist, but that nobody can read."""
    path = tmp_path / "list.csv"
    path.write_text("".join(f'"{tmp_path}/list.csv",{i % 4}\n' for i in range(16)))
    return path


class TestRandomWeights:
    """Whatever is said to be trained has to be in the file."""

    def test_a_test_of_a_head_that_was_not_trained(self, untrained, videos, capfd):
        folder = untrained(VideoMAEForPreTraining)
        line = run(evaluate, capfd, "--model", folder, "--test_list", videos, *TESTED)
        assert (
            f"model: {folder} lacks weights of a VideoMAEForVideoClassification, which would be random: class" in line
        )

    def test_a_decoder_that_was_not_trained(self, untrained, videos, capfd, tmp_path):
        folder = untrained(VideoMAEForVideoClassification)
        line = run(
            pretrain, capfd, "--model", folder, "--train_list", videos, "--output_dir", tmp_path / "out", *ON_CPU
        )
        assert f"model: {folder} lacks weights of a VideoMAEForPreTraining, which would be random: decoder." in line

    def test_an_encoder_that_is_none(self, tmp_path, videos, capfd):
        from transformers import ViTForImageClassification

        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        ViTForImageClassification(ViTConfig(image_size=64, **small)).save_pretrained(tmp_path / "vit")
        line = run(finetune, capfd, "--model", tmp_path / "vit", "--num_labels", 4, "--train_list", videos,
                   "--output_dir", tmp_path / "out", *ON_CPU)  # fmt: skip
        assert f"model: {tmp_path}/vit " in line
        assert "lacks weights of a VideoMAEForVideoClassification" in line or "can't be loaded" in line  # by version

    def test_what_is_trained_is_taken(self, untrained):
        """With query and value biases, which files name otherwise than models; and patched, as training leaves it."""
        from recipe import load_trained

        folder = untrained(VideoMAEForVideoClassification, use_mean_pooling=True)
        load_trained(VideoMAEForVideoClassification, str(folder))
        load_trained(VideoMAEForVideoClassification, str(folder), ("classifier.",), num_labels=7,
                     ignore_mismatched_sizes=True)  # fmt: skip
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(folder))
        model.save_pretrained(folder)
        load_trained(VideoMAEForVideoClassification, str(folder))


class TestAnotherRunsFolder:
    @pytest.fixture
    def folders(self, untrained, tmp_path):
        """Folders of a pre-training and of a fine-tuning of four classes, with a checkpoint each."""
        made = {}
        for section, kind in (("pretraining", VideoMAEForPreTraining), ("finetuning", VideoMAEForVideoClassification)):
            folder = made[section] = tmp_path / section
            settings = json.loads(json.dumps(record(*for_training(Path(TINY)))))
            if section == "pretraining":
                settings = {name: settings[name] for name in ("num_frames", "size", "batch_size")}
            for place in (folder, folder / "checkpoint-3"):
                place.mkdir(parents=True)
                write(place, settings | {"section": section})
            mark_complete(folder / "checkpoint-3")
            made[kind] = untrained(kind)
        return made

    @pytest.mark.parametrize(
        ("script", "folder", "settings", "expected"),
        [
            (finetune, "pretraining", [], "holds a run of pretraining: give finetuning another"),
            (pretrain, "finetuning", [], "holds a run of finetuning: give pretraining another"),
            (finetune, "finetuning", ["--num_labels", 5], "holds a run with num_labels 4, not 5: give another"),
            (finetune, "finetuning", ["--batch_size", 8], "holds a run with batch_size 16, not 8: give another"),
            (finetune, "finetuning", ["--optim", "sgd"], "holds a run with optim adamw_torch, not sgd: give another"),
            (finetune, "the model", [], "is the folder of model: give another"),
        ],
    )
    def test_one_line_and_status_2(self, folders, videos, capfd, script, folder, settings, expected):
        out = folders[VideoMAEForPreTraining] if folder == "the model" else folders[folder]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        model = ["--model", folders[VideoMAEForPreTraining], "--num_labels", 4] if script is finetune else []
        line = run(script, capfd, *model, "--train_list", videos, "--output_dir", out, *ON_CPU, *settings)
        assert f"output_dir: {out} {expected}" in line
        after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "run.lock"}
        assert after == before

    def test_a_checkpoint_that_is_none(self, folders, videos, capfd, tmp_path):
        line = run(pretrain, capfd, "--train_list", videos, "--output_dir", tmp_path / "new",
                   "--resume_from_checkpoint", "true", *ON_CPU)  # fmt: skip
        assert "resume_from_checkpoint: true is no folder" in line

    @pytest.mark.parametrize(("before", "now"), [(0.2, 0.5), (0.0, 0.2), (0.2, 0.0)])
    def test_another_share_to_hold_out(self, tmp_path, before, now):
        """Videos would be tested that were trained on."""
        checkpoint = tmp_path / "checkpoint-3"
        checkpoint.mkdir()
        settings = {"section": "finetuning", "model": None, "val_fraction": before}
        write(checkpoint, settings)
        check_goes_on(str(checkpoint), str(tmp_path), settings)
        for out, where in (
            (tmp_path, f"output_dir: {tmp_path} holds"),
            (tmp_path / "new", f"resume_from_checkpoint: {checkpoint} is of"),
        ):
            with pytest.raises(ValueError, match=f"{where} a run with val_fraction {before}, not {now}: give"):
                check_goes_on(str(checkpoint), str(out), settings | {"val_fraction": now})
