"""Training at drawn keep ratios: which are drawn, that nothing but the steps sees them, and what a killed run draws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import finetune
import hooks
import pytest
import torch
from forking import forked
from keep_ratios import KeepRatios, check_model, kept, ratio_of
from motion_videos import write_motion_set
from plan import memory
from trainer import VideoTrainer
from training_runs import ON_CPU, TINY, assert_same, last_state, losses, video_trainer, weights
from transformers import TrainerCallback, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et

RATIOS = [0.2, 0.3, 0.45, 0.6, 1.0]
TOKENS = dict(zip(RATIOS, (12, 19, 28, 38, 64), strict=True))  # ⌊ratio·64⌋ of the tiny recipe's grid (4, 4, 4), by hand
OWN = 0.5


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """(4, 2, 2): 16 tokens."""
    return et.patch_videomae(make_model(VideoMAEForVideoClassification, image_size=32), et.ReRoSelector(OWN))


class TestRatioOf:
    def test_each_is_equally_likely_whatever_came_before(self, check_frequencies):
        drawn = torch.tensor([RATIOS.index(ratio_of(RATIOS, 7, step)) for step in range(2001)])
        check_frequencies(drawn[:, None], {(i,): 1 / 5 for i in range(5)})
        pairs = torch.stack([drawn[:-1], drawn[1:]], dim=1)
        check_frequencies(pairs, {(i, j): 1 / 25 for i in range(5) for j in range(5)})

    def test_another_seed_draws_others(self, check_frequencies):
        drawn = torch.tensor([RATIOS.index(ratio_of(RATIOS, seed, 0)) for seed in range(1000)])
        check_frequencies(drawn[:, None], {(i,): 1 / 5 for i in range(5)})
        a, b = ([ratio_of(RATIOS, seed, step) for step in range(1000)] for seed in (0, 1))
        assert 140 < sum(x == y for x, y in zip(a, b, strict=True)) < 260  # 200 ± 4.7 standard deviations

    def test_it_disturbs_no_other_generator(self, global_rng_untouched):
        with global_rng_untouched():
            assert ratio_of(RATIOS, 0, 3) == ratio_of(RATIOS, 0, 3)


EVENTS = ("step_begin", "step_end", "epoch_end", "evaluate", "prediction_step", "save", "log", "train_end")


class Look(TrainerCallback):
    """(live, recorded) keep ratio of the model whenever an event occurs."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[float, float]]] = {}
        for event in EVENTS:
            setattr(self, f"on_{event}", partial(self.look, event))

    def look(self, event: str, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        recorded = model.config.everest["selector"]["keep_ratio"]
        self.seen.setdefault(event, []).append((model.everest.selector.keep_ratio, recorded))


def forwards(model: Any) -> list[tuple[bool, int]]:
    """(training, tokens that its first block gets), of each forward to come."""
    seen: list[tuple[bool, int]] = []
    block = model.videomae.encoder.layer[0]
    block.register_forward_pre_hook(lambda block, args: seen.append((block.training, args[0].shape[1])))
    return seen


class TestInATrainer:
    def test_steps_alone_see_what_is_drawn(self, model, tmp_path):
        """Two micro-batches a step, an evaluation and a checkpoint every two steps."""
        first, last, ran = Look(), Look(), forwards(model)
        trainer = video_trainer(
            model, tmp_path, count=16, callbacks=[first, KeepRatios(RATIOS), last], gradient_accumulation_steps=2,
            max_steps=8, eval_strategy="steps", eval_steps=2, save_steps=2, seed=3,
        )  # fmt: skip
        trainer.train()
        drawn = [ratio_of(RATIOS, 3, step) for step in range(8)]
        assert len(set(drawn)) > 2
        tokens = {ratio: int(ratio * 16 + 1e-9) for ratio in (*RATIOS, OWN)}
        assert [n for training, n in ran if training] == [tokens[ratio] for ratio in drawn for _ in range(2)]
        assert [n for training, n in ran if not training] == [8] * 4 * 4  # 16 clips, 4 at once
        assert last.seen.pop("step_begin") == [(ratio, ratio) for ratio in drawn]
        assert first.seen.keys() - {"step_begin"} == last.seen.keys()
        assert last.seen.keys() == set(EVENTS) - {"step_begin"}
        for event in (*first.seen.values(), *last.seen.values()):
            assert set(event) == {(OWN, OWN)}
        for step in (2, 4, 6, 8):
            config = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())
            assert config["everest"]["selector"]["keep_ratio"] == OWN
        logged = [line["kept_tokens"] for line in last_state(tmp_path)["log_history"] if "loss" in line]
        assert logged == [tokens[ratio] for ratio in drawn]

    def test_a_step_that_fails_leaves_nothing_behind_for_the_next_training(self, model, tmp_path, monkeypatch):
        settings = {"max_steps": 2, "eval_strategy": "epoch", "eval_on_start": True}
        trainer = video_trainer(model, tmp_path, callbacks=[KeepRatios([1.0])], **settings)

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(VideoTrainer, "training_step", fail)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        assert model.everest.selector.keep_ratio == 1.0  # nobody could put it back
        ran = forwards(model)
        trainer.train()
        assert ran[:2] == [(False, 8)] * 2  # eight clips, four at once
        assert model.everest.selector.keep_ratio == OWN

    def test_one_graph_for_each_ratio(self, tmp_path):
        """One more than torch is set to keep; in a Python of its own, because what has compiled can't be forked."""
        ratios = [0.3, 0.5, 1.0]
        assert {ratio_of(ratios, 0, step) for step in range(12)} == set(ratios)
        tests = Path(__file__).parents[1]
        paths = [str(tests), str(tests / "examples"), str(tests.parent / "examples")]
        job = f"""
import sys
sys.path[:0] = {paths!r}
import everest_tokens as et
import torch
from keep_ratios import KeepRatios
from tiny_videomae import build_model
from torch._dynamo.utils import counters
from training_runs import video_trainer
from transformers import VideoMAEForVideoClassification

torch._dynamo.config.recompile_limit = 2
model = build_model(VideoMAEForVideoClassification, image_size=32, num_hidden_layers=1)
video_trainer(
    et.patch_videomae(model, et.ReRoSelector({OWN})), {str(tmp_path)!r}, callbacks=[KeepRatios({ratios})], max_steps=12,
    save_strategy="no", seed=0, eval_strategy="steps", eval_steps=6, torch_compile=True, torch_compile_backend="eager",
).train()
print("graphs", counters["stats"]["unique_graphs"])
"""
        ran = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, timeout=300)
        assert "graphs 3\n" in ran.stdout, ran.stderr[-2000:]

    def test_in_pre_training_too(self, make_model, tmp_path):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining, image_size=32), et.ReRoSelector(OWN))
        trainer = video_trainer(model, tmp_path, callbacks=[KeepRatios([0.3, 1.0])], max_steps=4, save_strategy="no")
        trainer.train()
        logged = [line["kept_tokens"] for line in trainer.state.log_history if "loss" in line]
        assert logged == [{0.3: 4, 1.0: 16}[ratio_of([0.3, 1.0], 42, step)] for step in range(4)]
        with pytest.raises(ValueError, match="gives 1 visible of 1 kept tokens"):
            video_trainer(model, tmp_path, callbacks=[KeepRatios([0.1, 1.0])])


def first_half(tokens: torch.Tensor, grid: Any) -> torch.Tensor:
    """A selector of one's own."""
    return torch.arange(tokens.shape[1] // 2, device=tokens.device).expand(len(tokens), -1)


class TestRefused:
    @pytest.mark.parametrize(
        ("ratios", "message"),
        [
            ([], "numbers in (0, 1], got none"),
            ([0.2, 0.0], "numbers in (0, 1], got 0.0"),
            ([0.2, 1.1], "numbers in (0, 1], got 1.1"),
            ([0.2, float("nan")], "numbers in (0, 1], got nan"),
            ([True, 0.5], "numbers in (0, 1], got True"),
            (["0.5"], "numbers in (0, 1], got '0.5'"),
            ([0.2, 0.6, 0.2], "expected each once, got [0.2, 0.6, 0.2]"),
        ],
    )
    def test_ratios_that_cannot_be(self, ratios, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            KeepRatios(ratios)

    @pytest.mark.parametrize(
        ("selector", "ratios", "message"),
        [
            (et.RunningCellSelector(0.5), [0.25, 0.3], "keep_ratio must be 0.25, 0.5 or 0.75"),
            (
                lambda tokens, grid: tokens[..., 0].argsort()[:, :8].sort().values,
                [0.5],
                "expected a selector with a keep",
            ),
            (
                et.ReRoSelector(keep_tokens=8),
                [0.5],
                "with a keep_ratio, got ReRoSelector(keep_ratio=None, keep_tokens=8",
            ),
            (et.ReRoSelector(0.5), [0.5, 0.05], "keep_ratio 0.05 leaves no token of grid (4, 2, 2) (16 tokens)"),
        ],
    )
    def test_a_model_that_cannot_run_at_them(self, model, tmp_path, selector, ratios, message):
        et.patch_videomae(model, selector)
        before = json.dumps(model.config.everest)
        with pytest.raises(ValueError, match=re.escape(message)):
            video_trainer(model, tmp_path, callbacks=[KeepRatios(ratios)])
        assert json.dumps(model.config.everest) == before

    def test_a_model_that_is_not_patched(self, make_model):
        with pytest.raises(ValueError, match="VideoMAEForVideoClassification is not patched"):
            check_model(make_model(VideoMAEForVideoClassification), [0.5])

    def test_a_model_that_was_patched_anew_after_the_trainer_was_built(self, model, tmp_path):
        trainer = video_trainer(model, tmp_path, callbacks=[KeepRatios([0.5, 0.3])])
        model.everest.selector = et.RunningCellSelector(0.5)
        with pytest.raises(ValueError, match=r"0\.75, whole places of a cell, got 0\.3"):
            trainer.train()
        assert model.everest.selector.keep_ratio == 0.5


# --- finetune.py ---


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixteen, four of each direction."""
    root = tmp_path_factory.mktemp("videos")
    write_motion_set(root, 16)
    return root


def eight_steps(videos: Path, out: Path, *more: Any) -> list[str]:
    """Four in an epoch, with a checkpoint every three."""
    return [TINY, "--data", str(videos), "--output_dir", str(out), "--batch_size", "4", "--epochs", "2",
            "--warmup_epochs", "0", "--save_steps", "3", *ON_CPU, "--keep_ratios", *map(str, RATIOS),
            *map(str, more)]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert finetune.main(eight_steps(videos, out)) == 0
    return out


def kept_tokens(run: Path) -> list[int]:
    return [line["kept_tokens"] for line in last_state(run)["log_history"] if "loss" in line]


class TestFinetuning:
    def test_killed_it_goes_on_with_the_same_draws(self, videos, uninterrupted, tmp_path):
        drawn = [TOKENS[ratio_of(RATIOS, 42, step)] for step in range(8)]
        assert kept_tokens(uninterrupted) == drawn
        arguments = eight_steps(videos, tmp_path)
        for moment in ("compute_loss@1", "compute_loss@5", "_save_rng_state@6"):
            assert forked(lambda moment=moment: (hooks.kill(moment), finetune.main(arguments))[1]) == [-9]
        assert finetune.main(arguments) == 0
        assert kept_tokens(tmp_path) == drawn
        assert losses(tmp_path) == losses(uninterrupted)
        assert_same(weights(tmp_path), weights(uninterrupted))

    def test_processes_draw_alike(self, videos, uninterrupted, tmp_path):
        def job() -> int:
            seen: list[int] = []

            def note(trainer: Any, *_: Any) -> None:
                seen.append(trainer.model.everest.selector.num_kept(trainer._grid()))

            def tell(*_: Any) -> None:
                (tmp_path / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))

            hooks.before("compute_loss", note)
            hooks.before("check_bad_videos", tell)
            return finetune.main(eight_steps(videos, tmp_path / "run", "--gradient_accumulation_steps", 2))

        assert forked(job, processes=2) == [0, 0]
        told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert told[0] == told[1] == [n for n in kept_tokens(uninterrupted) for _ in range(2)]

    def test_what_is_written_says_so(self, uninterrupted):
        config = json.loads((uninterrupted / "config.json").read_text())
        assert config["everest"]["selector"]["keep_ratio"] == OWN
        assert json.loads((uninterrupted / "recipe.json").read_text())["keep_ratios"] == RATIOS
        card = (uninterrupted / "README.md").read_text()
        assert "0.2, 0.3, 0.45, 0.6 or 1" in card
        assert "model.everest.selector.keep_ratio = 0.2" in card

    def test_the_plan_is_for_the_most_tokens(self, videos, tmp_path, caplog):
        caplog.set_level("INFO")
        assert finetune.main(eight_steps(videos, tmp_path, "--epochs", 0.25)) == 0
        assert "8 frames of 64²: 12, 19, 28, 38 or 64 of 64 tokens kept" in caplog.text
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(tmp_path))
        with kept(model, 1.0):
            assert f"4 clips at {memory(model)[1] / 1e6:.1f} MB" in caplog.text
        assert memory(model)[1] / 1e6 < 0.8 * float(caplog.text.partition("4 clips at ")[2].partition(" MB")[0])

    def test_of_a_recipe(self, videos, tmp_path, caplog):
        file = tmp_path / "mine.yaml"
        file.write_text(Path(TINY).read_text().replace("finetuning:\n", "finetuning:\n  keep_ratios: [0.2, 1]\n"))
        arguments = [*eight_steps(videos, tmp_path / "run", "--epochs", 1)]
        start = arguments.index("--keep_ratios")
        del arguments[start : start + 1 + len(RATIOS)]
        assert finetune.main([str(file), *arguments[1:]]) == 0
        assert kept_tokens(tmp_path / "run") == [TOKENS[ratio_of([0.2, 1.0], 42, step)] for step in range(4)]
        assert "keep_ratio 0.5, which is evaluated and saved, is none of keep_ratios" in caplog.messages

    def test_a_number_of_tokens_and_a_whole_step(self, videos, tmp_path):
        """What the recipe says of the selector, without ratios."""
        arguments = [TINY, "--data", videos, "--output_dir", tmp_path, "--epochs", 1, "--batch_size", 8, *ON_CPU]
        arguments += ["--keep_tokens", 20, "--anchor", "first"]
        assert finetune.main([str(argument) for argument in arguments]) == 0
        assert kept_tokens(tmp_path) == [20, 20]
        selector = json.loads((tmp_path / "config.json").read_text())["everest"]["selector"]
        assert (selector["keep_ratio"], selector["keep_tokens"], selector["anchor"]) == (None, 20, "first")
        assert "keeping 20 of a\nclip's tokens" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize(
        ("ratios", "message"),
        [
            ([], "--keep_ratios"),
            ([0.2, 1.5], "keep_ratios must be numbers in (0, 1], got 1.5"),
            ([0.2, 0.2], "expected each once, got [0.2, 0.2]"),
            (["many"], "many"),
            ([0.5, 0.01], "keep_ratio 0.01 leaves no token of grid (4, 4, 4)"),
            ([0.5, 0.2, "--anchor", "first"], "anchor='first' keeps the 16 tokens"),
            ([0.5, "--keep_tokens", 20], "keep_ratios: keep_tokens 20 says what is kept: give keep_ratio"),
        ],
    )
    def test_wrong_ones_are_one_line(self, videos, tmp_path, capfd, monkeypatch, ratios, message):
        monkeypatch.setattr("clips.read_frames", lambda *_, **__: pytest.fail("a video was read"))
        arguments = [TINY, "--data", videos, "--output_dir", tmp_path / "run", *ON_CPU, "--keep_ratios", *ratios]
        assert finetune.main([str(argument) for argument in arguments]) == 2
        said = capfd.readouterr().err
        assert message in said.splitlines()[-1]
        assert "Traceback" not in said
