"""A model tested at several keep ratios: what is counted, measured and drawn, and that each video is decoded once."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import budgets
import evaluate
import finetune
import pytest
import torch
from budgets import costs, draw, name_of
from clips import TestViews
from forking import forked
from motion_videos import write_motion_set
from training_runs import ON_CPU, TINY
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

RATIOS = [0.2, 0.5, 1.0]
TOKENS = {0.2: 12, 0.5: 32, 1.0: 64}  # of (4, 4, 4)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    write_motion_set(root, 16)
    return root


@pytest.fixture(scope="module")
def fine(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fine"
    arguments = [TINY, "--data", videos, "--output_dir", out, "--epochs", 2, "--warmup_epochs", 0, "--batch_size", 8]
    arguments += ["--val_fraction", 0.5, "--keep_ratios", *RATIOS, *ON_CPU]
    assert finetune.main([str(argument) for argument in arguments]) == 0
    return out


def status(fine: Path, videos: Path, out: Path, *more: Any) -> int:
    """Of evaluate.py on what was held out."""
    arguments = [TINY, "--model", fine, "--data", videos, "--predictions", out, "--use_cpu",
                 "--dataloader_num_workers", 0, *more]  # fmt: skip
    return evaluate.main([str(argument) for argument in arguments])


def predictions(fine: Path, videos: Path, folder: Path, *more: Any) -> list[dict[str, Any]]:
    assert status(fine, videos, folder / "predictions.jsonl", *more) == 0
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "keep_ratios.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestEvaluation:
    def test_each_ratio_is_what_it_is_alone(self, fine, videos, tmp_path, monkeypatch, capfd):
        alone = {ratio: predictions(fine, videos, tmp_path, "--keep_ratio", ratio) for ratio in RATIOS}
        assert alone[0.2] != alone[0.5] != alone[1.0]
        decoded: Counter[int] = Counter()
        original = TestViews.__getitem__
        monkeypatch.setattr(TestViews, "__getitem__", lambda views, i: (decoded.update([i]), original(views, i))[1])
        together = predictions(fine, videos, tmp_path, "--keep_ratios", *RATIOS)
        assert decoded == dict.fromkeys(range(8), 1)
        said, table = capfd.readouterr().out, rows(fine)
        assert [float(row["keep_ratio"]) for row in table] == RATIOS
        for ratio, row in zip(RATIOS, table, strict=True):
            lines = [line for line in together if line["keep_ratio"] == ratio]
            assert lines == [{**line, "selector": "ReRoSelector", "keep_ratio": ratio} for line in alone[ratio]]
            right = sum(line["label"] == line["top5"][0] for line in lines)
            assert (float(row["top1"]), int(row["videos"]), int(row["missing"])) == (100 * right / 8, 8, 0)
            assert int(row["tokens"]) == TOKENS[ratio]
            assert f"ReRoSelector, keep ratio {ratio:g}: top-1 {100 * right / 8:.2f} %, {TOKENS[ratio]} tokens" in said
        assert (fine / "keep_ratios.png").read_bytes()[:4] == b"\x89PNG"

    def test_baselines_are_lines_of_their_own(self, fine, videos, tmp_path):
        lines = predictions(fine, videos, tmp_path, "--keep_ratios", 0.2, 1, "--baselines", "random", "tube")
        table = rows(fine)
        names = ["ReRoSelector", "RandomSelector", "TubeSelector"]
        assert [(row["selector"], row["keep_ratio"]) for row in table] == [
            (a, b) for a in names for b in ("0.2", "1.0")
        ]
        assert [row["tokens"] for row in table] == ["12", "64", "12", "64", "16", "64"]  # 4 of 16 places in each step
        assert len(lines) == 8 * 6
        whole = [[line["probabilities"] for line in lines if (line["selector"], line["keep_ratio"]) == (name, 1.0)]
                 for name in names]  # fmt: skip
        for other in whole[1:]:  # all of the tokens are all, whoever keeps them
            for ours, theirs in zip(whole[0], other, strict=True):
                assert theirs == pytest.approx(ours, abs=2e-6)

    def test_two_processes_are_one(self, fine, videos, tmp_path):
        one = predictions(fine, videos, tmp_path, "--keep_ratios", *RATIOS)
        before = rows(fine)
        out = tmp_path / "two.jsonl"
        assert forked(lambda: status(fine, videos, out, "--keep_ratios", *RATIOS), processes=2) == [0, 0]
        two = [json.loads(line) for line in out.read_text().splitlines()]
        for line, other in zip(one, two, strict=True):
            assert line.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
            assert line == other
        measured = {"clips_per_second"}
        assert [{k: v for k, v in row.items() if k not in measured} for row in rows(fine)] == [
            {k: v for k, v in row.items() if k not in measured} for row in before
        ]

    def test_a_ratio_that_was_trained_is_no_other(self, fine, videos, tmp_path, caplog):
        predictions(fine, videos, tmp_path, "--keep_ratio", 0.2)
        assert "keep_ratio is" not in caplog.text
        predictions(fine, videos, tmp_path, "--keep_ratio", 0.3)
        assert "keep_ratio is 0.3 in this test, the model was trained with 0.5" in caplog.messages

    def test_a_model_of_a_number_of_tokens(self, fine, videos, tmp_path, caplog):
        """Is tested at a share of them if asked to, or at several, its anchor as it was."""
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(fine))
        model.everest.selector = et.ReRoSelector(keep_tokens=20, anchor="first")
        model.save_pretrained(tmp_path / "counted")
        recorded = json.loads((fine / "recipe.json").read_text()) | {"keep_ratio": None, "keep_tokens": 20}
        (tmp_path / "counted" / "recipe.json").write_text(json.dumps(recorded | {"keep_ratios": []}))
        with_own = predictions(tmp_path / "counted", videos, tmp_path)
        as_much = predictions(tmp_path / "counted", videos, tmp_path, "--keep_ratio", 20 / 64)
        assert with_own == as_much
        assert "keep_ratio is 0.3125 in this test, the model was trained with keep_tokens 20" in caplog.messages
        at_both = predictions(tmp_path / "counted", videos, tmp_path, "--keep_ratios", 20 / 64, 1.0)
        same = [line for line in at_both if line["keep_ratio"] == 20 / 64]
        assert [line["probabilities"] for line in same] == [line["probabilities"] for line in with_own]
        assert [row["tokens"] for row in rows(tmp_path / "counted")] == ["20", "64"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--keep_ratios"], "--keep_ratios"),
            (["--keep_ratios", 0.2, 2], "keep_ratios must be numbers in (0, 1], got 2.0"),
            (["--keep_ratios", 0.2, 0.2], "expected each once, got [0.2, 0.2]"),
            (["--keep_ratios", 0.2, "--keep_ratio", 0.2], "keep_ratio and keep_ratios both say"),
            (["--keep_ratios", 0.2, 0.01], "keep_ratio 0.01 leaves no token of grid (4, 4, 4)"),
            (["--keep_ratio", 0.01], "keep_ratio 0.01 leaves no token of grid (4, 4, 4)"),
            (["--baselines", "tube"], "go with keep_ratios, got tube"),
            (["--keep_ratios", 0.2, "--baselines", "tubes"], "baselines are of rero, random, tube"),
        ],
    )
    def test_wrong_settings_are_one_line(self, fine, videos, tmp_path, monkeypatch, capfd, arguments, message):
        monkeypatch.setattr("clips.read_frames", lambda *_, **__: pytest.fail("a video was read"))
        given = [TINY, "--model", fine, "--data", videos, "--use_cpu", *arguments]
        assert evaluate.main([str(argument) for argument in given]) == 2
        said = capfd.readouterr().err
        assert message in said.splitlines()[-1]
        assert "Traceback" not in said


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return et.patch_videomae(make_model(VideoMAEForVideoClassification, image_size=64), et.ReRoSelector(0.5))


class TestCosts:
    def test_flops_are_those_of_a_model_that_is_patched_so(self, model, make_model):
        ways = {("a", 0.2): et.ReRoSelector(0.2), ("b", 0.5): et.TubeSelector(0.5)}
        found = costs(model, ways, batch=2, repeats=1)
        for way, selector in ways.items():
            alone = et.patch_videomae(make_model(VideoMAEForVideoClassification, image_size=64), selector)
            assert found[way]["gflops"] == round(et.count_flops(alone).total / 1e9, 4)
            assert found[way]["tokens"] == selector.num_kept((4, 4, 4))
        assert model.everest.selector.keep_ratio == 0.5
        assert type(model.everest.selector) is et.ReRoSelector

    def test_speed_is_the_median_of_forwards_in_turn(self, model, monkeypatch):
        """By a clock of ours: the runs of two ways one after the other, each in its own time."""
        seen: list[tuple[int, int]] = []
        model.videomae.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        times = iter([9.0, 9, 9, 9, 1, 2, 5, 8, 3, 4])  # seconds; two rounds warm up

        def clock(run: Callable[[], Any], device: Any) -> float:
            assert torch.is_inference_mode_enabled()
            run()
            return float(next(times))

        monkeypatch.setattr(budgets, "seconds_of", clock)
        ways = {("a", 0.2): et.ReRoSelector(0.2), ("a", 1.0): et.ReRoSelector(1.0)}
        found = costs(model, ways, batch=6, repeats=3)
        assert [found[way]["clips_per_second"] for way in ways] == [2.0, 1.5]  # 6 clips in 3 and in 4 seconds
        assert seen[:10] == [(6, 12), (6, 64)] * 5


def test_names_say_what_is_not_usual():
    assert name_of(et.ReRoSelector(0.3)) == "ReRoSelector"
    assert (
        name_of(et.ReRoSelector(0.3, "cosine", descending=False)) == "ReRoSelector(distance='cosine', descending=False)"
    )
    assert name_of(et.ReRoSelector(0.3, anchor="first")) == "ReRoSelector(anchor='first')"
    assert name_of(et.TubeSelector(0.2)) == "TubeSelector"


def test_a_line_for_each_selector():
    """In the order of cost, whatever the order of the rows."""
    table = [
        {"selector": name, "keep_ratio": ratio, "gflops": 10 * ratio, "clips_per_second": 1 / ratio, "top1": top1,
         "videos": 7, "device": "cpu"}
        for name, ratio, top1 in (("a", 1.0, 90.0), ("a", 0.2, 70.0), ("b", 0.5, 40.0))
    ]  # fmt: skip
    for axis, xs in zip(draw(table).axes, ([2, 10], [5, 1]), strict=True):
        a, b = axis.lines
        assert (a.get_label(), b.get_label()) == ("a", "b")
        assert list(a.get_xdata()) == pytest.approx(xs)
        assert list(a.get_ydata()) == [70, 90]
        assert [text.get_text() for text in axis.texts] == ["0.2", "1"]
