"""cli.py: `inspect` says what a checkpoint file is, `convert` makes a transformers folder of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from family_models import MVDPreTrainingModel, randomize
from test_checkpoints import (
    MVD_ARGS,
    SMALL,
    Payload,
    assert_close,
    assert_replays,
    classify,
    clips_for,
    expected_classes,
    fine_tuned,
    pre_trained,
    write,
)
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
            ("mvd", {}, ["eps", "position"]),
            ("mvd", {"use_cls_token": True}, ["eps", "position", "class token"]),
            ("videomae", {"use_learnable_pos_emb": True}, ["eps", "position"]),
        ],
    )
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_classifier(self, tmp_path, capsys, caplog, family, options, said, suffix):
        reference = fine_tuned(family, **options)
        source, out = write(tmp_path / f"w{suffix}", reference.state_dict()), tmp_path / "folders" / "out"
        shown = printed(capsys, "convert", source, out, "--family", family, *SIZES)
        assert str(out) in shown
        lacking = (shown + caplog.text).replace("_", " ")  # on which stream is logging's to choose
        assert all(word in lacking for word in said), lacking
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(out).eval(), et.ReRoSelector(1.0))
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    def test_pretraining(self, tmp_path, capsys):
        reference = pre_trained("everest", decoder_num_heads=2)
        source, out = write(tmp_path / "w.pth", reference.state_dict()), tmp_path / "out"
        printed(capsys, "convert", source, out, "--pretraining", *SIZES)
        assert_replays(VideoMAEForPreTraining.from_pretrained(out).eval(), reference, clips_for(reference))

    def test_fresh_head(self, tmp_path, capsys):
        source, out = write(tmp_path / "w.pth", fine_tuned().state_dict()), tmp_path / "out"
        printed(capsys, "convert", source, out, "--num-labels", "11", *SIZES)
        model = VideoMAEForVideoClassification.from_pretrained(out)
        assert model.config.num_labels == 11
        assert model.classifier.weight.shape == (11, 32)


class TestInspect:
    def test_fine_tuned(self, tmp_path, capsys):
        # Every number another one, so that none can stand for another.
        state = fine_tuned(depth=3, mlp_ratio=1.75, num_classes=7).state_dict()
        before = set(tmp_path.iterdir())
        path = write(tmp_path / "w.pth", state)
        shown = printed(capsys, "inspect", path, "--num-heads", "4", "--num-frames", "10", "--image-size", "40")
        numbers = set(re.findall(r"\d+", shown))
        assert {"32", "3", "4", "10", "40", "8", "7"} <= numbers  # width, depth, heads, frames, size, patch, classes
        assert "VideoMAEForVideoClassification" in shown
        assert "VideoMAEForPreTraining" not in shown
        assert set(tmp_path.iterdir()) == before | {path}

    def test_pre_trained(self, tmp_path, capsys):
        path = write(tmp_path / "w.safetensors", pre_trained(decoder_depth=5, decoder_num_heads=2).state_dict())
        shown = printed(capsys, "inspect", path, "--pretraining", *SIZES)
        assert "VideoMAEForPreTraining" in shown
        assert {"24", "5"} <= set(re.findall(r"\d+", shown))  # the decoder's width and depth
        assert "VideoMAEForVideoClassification" in printed(capsys, "inspect", path, *SIZES)

    def test_family(self, tmp_path, capsys):
        student = randomize(MVDPreTrainingModel(**SMALL | {"num_frames": 16}))
        shown = printed(capsys, "inspect", write(tmp_path / "a.pth", student.state_dict()), "--num-heads", "2")
        assert re.search("mvd", shown, re.IGNORECASE)
        assert {"16", "24"} <= set(re.findall(r"\d+", shown))  # frames and size, of the stored table
        by_arguments = write(tmp_path / "b.pth", fine_tuned("mvd").state_dict(), args=MVD_ARGS)
        assert re.search("mvd", printed(capsys, "inspect", by_arguments, *SIZES), re.IGNORECASE)
        assumed = printed(capsys, "inspect", write(tmp_path / "c.pth", fine_tuned().state_dict()), *SIZES)
        assert "assum" in assumed
        assert "family" in assumed


def truncated(path: Any) -> Any:
    write(path, fine_tuned().state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def poisoned(path: Any) -> Any:
    torch.save({"model": dict(fine_tuned().state_dict()), "args": Payload(path.with_name("ran"))}, path)
    return path


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        pytest.param(lambda path: path, SIZES, "w.pth", id="missing"),
        pytest.param(truncated, SIZES, "w.pth", id="truncated"),
        pytest.param(poisoned, SIZES, f"{os.system.__module__}.system", id="payload"),
        pytest.param(lambda path: write(path, {}), SIZES, "w.pth", id="empty"),
        pytest.param(lambda path: write(path, fine_tuned().state_dict()), [], "num_heads", id="heads"),
        pytest.param(
            lambda path: write(path, {n: v for n, v in fine_tuned().state_dict().items() if "fc2" not in n}),
            SIZES,
            "blocks.1.mlp.fc2.bias",
            id="missing keys",
        ),
        pytest.param(
            lambda path: write(path, fine_tuned("videomaev2", cos_attn=True).state_dict()),
            SIZES,
            "attn.scale",
            id="cosine attention",
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
    path = write(tmp_path / "w.pth", fine_tuned().state_dict())
    try:
        status = main(["inspect", str(path), "--family", "vit", *SIZES])
    except SystemExit as error:  # argparse's own refusal
        status = error.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(family in error for family in ("videomae", "videomaev2", "mme", "mvd", "everest"))


def run_program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where log lines and warnings reach standard error as a user sees them."""
    command = [sys.executable, "-m", "everest_tokens", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_as_a_program(tmp_path):
    path = write(tmp_path / "w.pth", fine_tuned("mvd").state_dict(), args=MVD_ARGS)
    good = run_program("convert", path, tmp_path / "out", *SIZES)
    assert good.returncode == 0
    assert str(tmp_path / "out") in good.stdout
    assert "position" in good.stdout + good.stderr  # plain transformers has other ones
    assert "Traceback" not in good.stderr

    path = write(tmp_path / "w.pth", fine_tuned("videomaev2", cos_attn=True).state_dict())
    bad = run_program("convert", path, tmp_path / "other", "--pretraining", *SIZES)
    assert bad.returncode == 2
    assert not bad.stdout
    (line,) = bad.stderr.splitlines()
    assert "attn.scale" in line
