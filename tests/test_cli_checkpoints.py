"""cli.py: `inspect` says what a checkpoint file is, `convert` makes a transformers folder of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from checkpoint_case import (
    MVD_ARGS,
    SMALL,
    Call,
    assert_classifies,
    assert_replays,
    clips_for,
    fine_tuned,
    pre_trained,
    write,
)
from family_models import MVDPreTrainingModel, randomize
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.cli import main

SIZES = ["--num-heads", "2", "--num-frames", "8", "--image-size", "24"]


def printed(capsys: Any, *arguments: Any) -> str:
    """What a command that succeeds writes on its standard output."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


class TestConvert:
    @pytest.mark.parametrize(
        ("family", "options", "said"),
        [
            ("videomae", {}, ["eps"]),
            ("mvd", {"use_cls_token": True}, ["eps", "position", "class token"]),
            ("videomae", {"use_learnable_pos_emb": True}, ["eps", "position"]),
        ],
    )
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_classifier(self, tmp_path, capsys, caplog, family, options, said, suffix):
        reference = fine_tuned(family, **options)
        source, out = write(tmp_path / f"w{suffix}", reference), tmp_path / "folders" / "out"
        shown = printed(capsys, "convert", source, out, "--family", family, *SIZES)
        assert str(out) in shown
        lacking = (shown + caplog.text).replace("_", " ")  # on which stream is logging's to choose
        assert all(word in lacking for word in said), lacking
        model = VideoMAEForVideoClassification.from_pretrained(out).eval()
        assert_classifies(et.patch_videomae(model, et.ReRoSelector(1.0)), reference)

    def test_pretraining(self, tmp_path, capsys):
        reference = pre_trained("everest", decoder_num_heads=2)
        printed(capsys, "convert", write(tmp_path / "w.pth", reference), tmp_path / "out", "--pretraining", *SIZES)
        model = VideoMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
        assert_replays(model, reference, clips_for(reference))

    def test_fresh_head(self, tmp_path, capsys):
        printed(
            capsys, "convert", write(tmp_path / "w.pth", fine_tuned()), tmp_path / "out", "--num-labels", 11, *SIZES
        )
        model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "out")
        assert model.config.num_labels == 11
        assert model.classifier.weight.shape == (11, 32)


class TestInspect:
    def test_fine_tuned(self, tmp_path, capsys):
        # Every number another one, so that none can stand for another.
        path = write(tmp_path / "w.pth", fine_tuned(depth=3, mlp_ratio=1.75, num_classes=7))
        shown = printed(capsys, "inspect", path, "--num-heads", 4, "--num-frames", 10, "--image-size", 40)
        numbers = set(re.findall(r"\d+", shown))  # width, depth, MLP, heads, frames, size, patch, classes, tokens
        assert {"32", "3", "56", "4", "10", "40", "8", "7", "125"} <= numbers
        assert "VideoMAEForVideoClassification" in shown
        assert "VideoMAEForPreTraining" not in shown
        assert set(tmp_path.iterdir()) == {path}

    def test_pre_trained(self, tmp_path, capsys):
        path = write(tmp_path / "w.safetensors", pre_trained(decoder_depth=5, decoder_num_heads=2))
        shown = printed(capsys, "inspect", path, "--pretraining", *SIZES)
        assert "VideoMAEForPreTraining" in shown
        assert {"24", "5"} <= set(re.findall(r"\d+", shown))  # the decoder's width and depth
        assert "VideoMAEForVideoClassification" in printed(capsys, "inspect", path, *SIZES)

    def test_family(self, tmp_path, capsys):
        student = write(tmp_path / "a.pth", randomize(MVDPreTrainingModel(**SMALL | {"num_frames": 16})))
        shown = printed(capsys, "inspect", student, "--num-heads", "2")
        assert re.search("mvd", shown, re.IGNORECASE)
        assert {"16", "24"} <= set(re.findall(r"\d+", shown))  # frames and size, of the stored table
        by_arguments = write(tmp_path / "b.pth", fine_tuned("mvd"), args=MVD_ARGS)
        assert re.search("mvd", printed(capsys, "inspect", by_arguments, *SIZES), re.IGNORECASE)
        assert re.search("assumed.*family", printed(capsys, "inspect", write(tmp_path / "c.pth", fine_tuned()), *SIZES))


def poisoned(path: Any) -> Any:
    payload = Call(os.system, f'echo > "{path.with_name("ran")}"')
    torch.save({"model": dict(fine_tuned().state_dict()), "args": payload}, path)
    return path


def without_fc2(path: Any) -> Any:
    return write(path, {name: value for name, value in fine_tuned().state_dict().items() if "fc2" not in name})


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        pytest.param(lambda path: path, SIZES, "w.pth", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04") and path, SIZES, "w.pth", id="truncated"),
        pytest.param(poisoned, SIZES, f"{os.system.__module__}.system", id="payload"),
        pytest.param(lambda path: write(path, {}), SIZES, "w.pth", id="empty"),
        pytest.param(lambda path: write(path, fine_tuned()), [], "num_heads", id="heads"),
        pytest.param(without_fc2, SIZES, "blocks.1.mlp.fc2.bias", id="missing keys"),
        pytest.param(
            lambda path: write(path, {n: v / 0 for n, v in fine_tuned().state_dict().items()}), SIZES, "NaN", id="NaN"
        ),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, capsys, command, source, options, message):
    path, out = source(tmp_path / "w.pth"), tmp_path / "out"
    assert main([command, str(path), *([str(out)] if command == "convert" else []), *options]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("everest-tokens: ")
    assert message in line
    assert not captured.out
    assert not out.exists()
    assert not (tmp_path / "ran").exists()


def test_unknown_family(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):  # argparse's own refusal
        main(["inspect", str(write(tmp_path / "w.pth", fine_tuned())), "--family", "vit", *SIZES])
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(family in error for family in ("videomae", "videomaev2", "mme", "mvd", "everest"))


def test_as_a_program(tmp_path):
    """In a process of its own, where log lines and warnings reach standard error as a user sees them."""

    def run(state: Any, out: str, *more: str, **written: Any) -> subprocess.CompletedProcess[str]:
        path = write(tmp_path / "w.pth", state, **written)
        command = [sys.executable, "-m", "everest_tokens", "convert", str(path), str(tmp_path / out), *more, *SIZES]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run(fine_tuned("mvd"), "out", args=MVD_ARGS)
    assert good.returncode == 0
    assert str(tmp_path / "out") in good.stdout
    assert "position" in good.stdout + good.stderr  # plain transformers has other ones
    assert "Traceback" not in good.stderr

    bad = run(fine_tuned("videomaev2", cos_attn=True), "other", "--pretraining")
    assert bad.returncode == 2
    assert not bad.stdout
    (line,) = bad.stderr.splitlines()
    assert "attn.scale" in line
