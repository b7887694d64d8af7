"""The recipes' values against Tables 7 and 8, typed from the paper, and how settings are read and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe import FinetuningRecipe, PretrainingRecipe, parse, selection_of, set_warmup
from run import TRAINING_DEFAULTS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
S, B, L = "small", "base", "large"

# Table 7. A value for each backbone where the paper has several.
PRETRAINING: dict[str, dict[str, Any]] = {
    "k400": {"base_lr": {S: 1.5e-4, B: 3e-4, L: 1.5e-4}, "batch_size": {S: 1024, B: 1024, L: 512}, "flip": True,
             "warmup_epochs": 40, "keep_ratio": 0.3, "stride": 4, "epochs": 200, "alpha": 0},
    "ssv2": {"base_lr": 1.5e-4, "batch_size": 256, "flip": False, "warmup_epochs": 40, "keep_ratio": 0.3, "stride": 2,
             "epochs": 200, "alpha": 0},
    "ucf101": {"base_lr": 1e-3, "batch_size": 192, "flip": True, "warmup_epochs": 40, "keep_ratio": 0.3, "stride": 4,
               "epochs": 3200, "alpha": 0},
    "hmdb51": {"base_lr": 1e-3, "batch_size": 192, "flip": True, "warmup_epochs": 40, "keep_ratio": 0.3, "stride": 2,
               "epochs": 4800, "alpha": 0},
    "oscc": {"base_lr": 1e-3, "batch_size": 256, "flip": True, "warmup_epochs": 20, "keep_ratio": 0.5, "stride": 4,
             "epochs": 400, "alpha": 1.5},
}  # fmt: skip
# Table 8; stride 0 is segment-based sampling.
FINETUNING: dict[str, dict[str, Any]] = {
    "k400": {"base_lr": {S: 5e-4, B: 1e-3, L: 2e-3}, "batch_size": {S: 384, B: 384, L: 128}, "flip": True,
             "keep_ratio": 0.6, "stride": 4, "epochs": {S: 75, B: 35, L: 35}, "num_labels": 400},
    "ssv2": {"base_lr": 5e-4, "batch_size": 48, "flip": False, "keep_ratio": 0.8, "stride": 0, "epochs": 50,
             "num_labels": 174},
    "ucf101": {"base_lr": 1e-3, "batch_size": 128, "flip": True, "keep_ratio": 0.6, "stride": 4, "epochs": 100,
               "num_labels": 101},
    "hmdb51": {"base_lr": 1e-3, "batch_size": 128, "flip": True, "keep_ratio": 0.6, "stride": 2, "epochs": 50,
               "num_labels": 51},
    "oscc": {"base_lr": 1e-4, "batch_size": 32, "flip": True, "stride": 10, "epochs": 30, "num_labels": 2},
}  # fmt: skip
VIEWS = {"k400": (2, 3), "ssv2": (2, 3), "ucf101": (5, 3), "hmdb51": (10, 3), "oscc": (2, 3)}
COMMON = {"warmup_epochs": 5, "layer_decay": 0.75, "randaugment": [9, 0.5], "label_smoothing": 0.1, "drop_path": 0.1}


def read(kind: Any, *arguments: str) -> tuple[Any, Any]:
    needed = ["--train_list", "train.csv", "--use_cpu", *(["--model", "m"] if kind is FinetuningRecipe else [])]
    return parse(kind, [*arguments, *needed], TRAINING_DEFAULTS | {"report_to": "none"})


def for_backbone(values: dict[str, Any], backbone: str) -> dict[str, Any]:
    return {name: value[backbone] if isinstance(value, dict) else value for name, value in values.items()}


class TestTables:
    @pytest.mark.parametrize("backbone", [S, B, L])
    @pytest.mark.parametrize("name", PRETRAINING)
    def test_pretraining(self, name, backbone):
        recipe, training = read(PretrainingRecipe, str(RECIPES / f"{name}.yaml"), "--backbone", backbone)
        expected = for_backbone(PRETRAINING[name], backbone)
        assert {key: getattr(recipe, key) for key in expected} == expected
        assert recipe.mask_ratio == 0.9
        assert recipe.num_frames == 16
        assert recipe.size == 224
        assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.05)
        assert (training.lr_scheduler_type, training.optim) == ("cosine", "adamw_torch")
        assert training.learning_rate == pytest.approx(expected["base_lr"] * expected["batch_size"] / 256)

    @pytest.mark.parametrize("backbone", [S, B, L])
    @pytest.mark.parametrize("name", FINETUNING)
    def test_finetuning(self, name, backbone):
        recipe, training = read(FinetuningRecipe, str(RECIPES / f"{name}.yaml"), "--backbone", backbone)
        expected = for_backbone(FINETUNING[name], backbone) | COMMON
        assert {key: getattr(recipe, key) for key in expected} == expected
        assert recipe.alpha == recipe.mixup == recipe.cutmix == 0
        assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.999, 0.05)
        assert (training.lr_scheduler_type, training.optim) == ("cosine", "adamw_torch")
        assert training.learning_rate == pytest.approx(expected["base_lr"] * expected["batch_size"] / 256)

    @pytest.mark.parametrize("name", VIEWS)
    def test_multi_view_testing(self, name):
        testing = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["testing"]
        assert (testing["clips"], testing["crops"]) == VIEWS[name]

    def test_every_recipe_is_tested(self):
        assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PRETRAINING, "tiny", "own"}


class TestSettings:
    def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("pretraining: {epochs: 7, batch_size: 8, save_total_limit: 5}\n")
        recipe, training = read(PretrainingRecipe, str(path), "--epochs", "9")
        assert (recipe.epochs, recipe.batch_size) == (9, 8)
        assert (training.save_total_limit, training.num_train_epochs) == (5, 9)
        assert training.max_grad_norm == 0

    def test_a_rate_that_is_given_is_not_scaled(self, tmp_path):
        _, training = read(PretrainingRecipe, "--learning_rate", "0.5", "--batch_size", "8")
        assert training.learning_rate == 0.5

    def test_accumulated_steps_share_the_batch(self):
        recipe, training = read(
            PretrainingRecipe,
            "--batch_size",
            "24",
            "--gradient_accumulation_steps",
            "3",
            "--repeats",
            "2",
        )
        assert training.per_device_train_batch_size == 4  # videos: 24 clips in 3 steps of 8, two of each video
        set_warmup(training, recipe, 50)
        assert training.warmup_steps == 40 * (50 // 12)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("pretraining: {epohcs: 7}", "epohcs"),
            ("pretraining: {by_backbone: {base: {epohcs: 7}}}", "epohcs"),
            ("finetuning: {epochs: 7}", "pretraining"),
            ("[1, 2]", "pretraining"),
            ("pretraining: {epochs: [", "recipe"),
        ],
    )
    def test_files_that_are_wrong(self, tmp_path, text, message):
        path = tmp_path / "wrong.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(PretrainingRecipe, str(path))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--epohcs", "7"], "epohcs"),
            (["--epochs", "0"], "epochs"),
            (["--keep_ratio", "1.5"], "keep_ratio"),
            (["--backbone", "huger"], "backbone"),
            (["--batch_size", "0"], "batch_size"),
            (["--batch_size", "3", "--repeats", "2"], "repeats"),
            (["--batch_size", "4", "--gradient_accumulation_steps", "8"], "batch_size"),
            (["--num_frames", "0"], "num_frames"),
            (["--base_lr", "nan"], "base_lr"),
            (["no/such/recipe.yaml"], "recipe.yaml"),
        ],
    )
    def test_values_that_cannot_be(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            read(PretrainingRecipe, *arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--num_labels", "1"], "num_labels"), (["--num_labels", "5", "--randaugment", "9"], "randaugment")],
    )
    def test_values_that_cannot_be_in_finetuning(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            read(FinetuningRecipe, *arguments)

    @pytest.mark.parametrize("kind", [PretrainingRecipe, FinetuningRecipe])
    def test_a_number_of_tokens_or_a_share_of_them(self, kind, tmp_path):
        """The one that is nearer to the user."""
        path, labels = tmp_path / "mine.yaml", ["--num_labels", "5"] if kind is FinetuningRecipe else []
        path.write_text(f"{kind.section}: {{keep_tokens: 300, anchor: middle, camera: compensate}}\n")
        for given, expected in (([], (None, 300)), (["--keep_ratio", "0.4"], (0.4, None))):
            recipe, _ = read(kind, str(path), *labels, *given)
            assert (recipe.keep_ratio, recipe.keep_tokens) == expected
            selector = selection_of(recipe)["selector"]
            assert (selector.keep_ratio, selector.keep_tokens, selector.anchor) == (*expected, "middle")
            assert selector.camera == "compensate"
        recipe, _ = read(kind, *labels, "--keep_tokens", "9")
        assert (recipe.keep_ratio, recipe.keep_tokens, recipe.anchor) == (None, 9, None)
        with pytest.raises(ValueError, match="keep_ratio and keep_tokens say the same in two ways"):
            read(kind, *labels, "--keep_tokens", "9", "--keep_ratio", "0.4")
        for name, value in (("anchor", "last"), ("camera", "shake"), ("keep_tokens", "0"), ("alpha", "0.5")):
            with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
                read(kind, *labels, f"--{name}", value)

    def test_what_must_be_set(self):
        with pytest.raises(ValueError, match="train_list"):
            parse(PretrainingRecipe, ["--use_cpu"], TRAINING_DEFAULTS)
        with pytest.raises(ValueError, match="num_labels"):
            parse(FinetuningRecipe, ["--use_cpu", "--train_list", "l"], TRAINING_DEFAULTS)

    def test_a_list_shorter_than_a_batch(self):
        recipe, training = read(PretrainingRecipe, "--batch_size", "8")
        with pytest.raises(ValueError, match=r"7 videos.*batch"):
            set_warmup(training, recipe, 7)
