"""benchmarks/motion_accuracy.py: the runs that the questions need, what a model is fed, and that a run learns."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import motion_accuracy
import pytest
import torch
from motion_accuracy import Batches, Settings, accuracies, clips_of, fit
from motion_clips import TEST_PHOTOS, TRAINING_PHOTOS, Task, make_clips, photographs
from motion_runs import ALL, COLOURED, DRAWN, EXPERIMENTS, LARGE, MIXTURE, NONE, SELECTORS, Run, chosen_runs, key_of
from torch import nn
from torchvision.transforms import v2
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.patching import is_patched

CPU = torch.device("cpu")
SMALL = Settings(
    steps=2, pretraining_steps=2, finetuning_steps=2, training_clips=12, labelled_clips=6, test_clips=16, batch_size=4
)


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    clips_of.cache_clear()
    motion_accuracy.pretrained.cache_clear()


def train(run: Run, settings: Settings, device: torch.device) -> dict:
    """The record of a run that is tested as it was trained."""
    (record,) = motion_accuracy.train([run], settings, device)
    return record


def settings_of(experiment: str) -> set[tuple]:
    """Its runs on the plain task: (method, keep_ratio, pretraining, pretraining_keep_ratio)."""
    runs = EXPERIMENTS[experiment]
    assert all(run.task == Task() for run in runs)
    return {(run.method, run.keep_ratio, run.pretraining, run.pretraining_keep_ratio) for run in runs}


def test_the_runs_of_the_papers_figures_and_tables():
    assert settings_of("keep-ratio") == {
        (ALL, None, None, None),
        *(
            (method, ratio, None, None)
            for method in ("rero", "random", "tube")
            for ratio in (0.05, 0.1, 0.15, 0.3, 0.6)
        ),
        *((method, ratio, None, None) for method in ("rero", "running cell") for ratio in (0.25, 0.5)),
        ("ascending", 0.15, None, None),
    }  # Figure 5, Table 10
    orders = ("ascending", "rero")
    assert settings_of("order") == {(last, 0.3, first, 0.3) for first in orders for last in orders} | {
        ("rero", 0.3, NONE, None)
    }  # Table 16
    before = ((NONE, None), ("running cell", 0.5), ("rero", 0.3))
    assert settings_of("running-cell") == {(*last, *first) for last in ((ALL, None), ("rero", 0.3)) for first in before}
    distances = ("rero", "l1", "cosine", "cka")
    assert settings_of("distance") == {("rero", 0.3, distance, 0.3) for distance in distances} | {
        (distance, 0.15, None, None) for distance in distances
    }  # Table 9
    assert [run.task for run in EXPERIMENTS["frames"]] == [Task(), Task(frames=24)]  # Table 12
    assert {(run.method, run.keep_ratio) for run in EXPERIMENTS["frames"]} == {("rero", 0.3)}
    assert {run.method for run in EXPERIMENTS["longer"]} == {ALL, "random", "tube"}
    assert {run.steps for run in EXPERIMENTS["longer"]} == {4 * Settings().steps}


def test_the_selectors_are_what_their_names_say():
    kinds = {name: make(0.5) for name, make in SELECTORS.items()}
    energy, run_length = kinds.pop("energy"), kinds.pop("run length")
    assert (type(energy), energy.cover, type(run_length)) == (et.EnergyBudget, 0.5, et.RunLengthSelector)
    assert run_length.threshold == 0.5
    assert all(kind.keep_ratio == 0.5 for kind in kinds.values())
    compensated = kinds.pop("rero compensated")
    assert (type(compensated), compensated.camera, kinds["rero"].camera) == (et.ReRoSelector, "compensate", "ignore")
    others = {"random": et.RandomSelector, "tube": et.TubeSelector, "running cell": et.RunningCellSelector}
    assert {name: type(kinds.pop(name)) for name in others} == others
    assert all(type(kind) is et.ReRoSelector for kind in kinds.values())
    assert {name: (kind.distance, kind.descending, kind.anchor) for name, kind in kinds.items()} == {
        "rero": ("l2", True, None),
        "rero first": ("l2", True, "first"),
        "rero middle": ("l2", True, "middle"),
        "ascending": ("l2", False, None),
        **{distance: (distance, True, None) for distance in ("l1", "cosine", "cka")},
    }


def test_what_was_measured_before_there_were_colours_is_not_trained_again():
    """A record has the key of its run, with and without the fields that came later."""
    asked = {key_of(asdict(run)) for run in chosen_runs(list(EXPERIMENTS), None, 3)}
    stored = json.loads((motion_accuracy.RESULTS / "motion_accuracy.json").read_text())
    assert {key_of(record) for record in stored["runs"]} <= asked
    assert any("colours" not in record["task"] and "trained" not in record for record in stored["runs"])
    assert motion_accuracy.Settings(**stored["settings"]) == Settings()
    plain = asdict(Run("keep-ratio", Task(camera=0.5), "rero", 0.3, seed=2))
    key = key_of(plain)
    del plain["task"]["colours"], plain["trained"], plain["steps"]
    assert key_of(plain) == key
    for changes in ({"trained": ALL}, {"steps": 7}, {"task": {**plain["task"], "colours": 8}}):
        assert key_of(plain | changes) != key


_WINDOWS = {1.3: 20, 1.5: 24, 1.8: 28, 2.0: 32}  # 2·⌊8·α⌋ frames


def test_the_frame_samplers_of_table_13():
    runs = EXPERIMENTS["frame-sampler"]
    for run in runs:
        assert run.task.frames * run.task.action == pytest.approx(16)  # a third of it, as many as the model takes
        assert run.task.frames == 48
        assert (run.method, run.keep_ratio, run.model_frames) == ("rero", 0.15, 16)
    drawn = {(alpha, window, 1, uniform) for alpha, window in _WINDOWS.items() for uniform in (False, True)}
    assert {(run.alpha, run.window, run.every, run.uniform) for run in runs} == {
        (None, 16, 1, False),
        (None, 32, 2, False),
        *drawn,
    }


def test_the_uniform_sampler_is_blind_to_the_tokens():
    """Its draws are those of equal counts, whatever the counts; in evaluation the steps are spread over the window."""
    sampler = motion_accuracy.UniformFrameSampler(1.5)
    counts = torch.tensor([[50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).expand(2000, -1)
    drawn = sampler(counts, 8, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) > 0).all()
    share = torch.bincount(drawn.flatten(), minlength=12) / 2000
    assert share == pytest.approx([8 / 12] * 12, abs=0.05)  # 0.667 ± 5 standard deviations of 0.0105
    assert sampler.most_probable(counts[:1], 8).tolist() == [[0, 2, 3, 5, 6, 8, 9, 11]]


def test_every_model_is_trained_once_and_can_be_built():
    runs = chosen_runs(list(EXPERIMENTS), None, 2)
    assert len({json.dumps({**asdict(run), "experiment": None}) for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # whole seeds first
    asked = [run for wanted in EXPERIMENTS.values() for run in wanted]
    assert len(asked) > len(runs) / 2  # 16 frames and 0.3, for one, is asked for twice
    once = {json.dumps({**asdict(run), "experiment": None}) for run in asked}
    for seed in (0, 1):
        assert {json.dumps({**asdict(run), "experiment": None, "seed": 0}) for run in runs if run.seed == seed} == once
    built = set()
    for run in runs[: len(runs) // 2]:
        window = run.window or run.task.frames
        assert window <= run.task.frames
        candidates = run.model_frames if run.alpha is None else 2 * math.floor(run.alpha * 8 + 1e-9)
        assert len(range(0, window, run.every)) == candidates
        config = motion_accuracy.config_of(run, Settings())
        built |= {(VideoMAEForVideoClassification, run.method, run.keep_ratio, config.num_frames)}
        built |= {(VideoMAEForPreTraining, run.pretraining, run.pretraining_keep_ratio, config.num_frames)}
    for cls, method, ratio, frames in built:
        if method in (None, NONE, ALL):
            continue
        with torch.device("meta"):
            model = cls(motion_accuracy.config_of(Run("", Task(frames=frames), method), Settings()))
        et.patch_videomae(model, SELECTORS[method](ratio))  # refuses what can't work
    only = chosen_runs(["keep-ratio", "longer"], ["tube"], 1)
    assert {run.method for run in only} == {"tube"}
    assert len(only) == 6


def test_training_and_test_clips_come_from_their_own_photographs_and_seeds():
    task = Task(frames=4)
    drawn = {}
    for seed in (0, 1):
        for training in (True, False):
            drawn[seed, training] = clips_of(task, seed, training, 6)
            generator = torch.Generator().manual_seed(2 * seed + training)
            names = TRAINING_PHOTOS if training else TEST_PHOTOS
            expected = make_clips(task, photographs(names), 6, generator)
            assert all(map(torch.equal, drawn[seed, training], expected))
    assert len({tuple(labels.tolist()) for _, labels in drawn.values()}) == 4


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_normalised_windows_of_frames_in_a_row(training):
    run = Run("", Task(frames=20), "rero", 0.3, window=12, every=2, seed=3)
    batches = Batches(run, replace(SMALL, training_clips=64, test_clips=64), CPU, training)
    clips, labels = clips_of(run.task, 3, training, 64)
    index = torch.arange(64).flip(0)
    taken, given = batches.take(index)
    assert taken.dtype == torch.float32
    assert taken.shape == (64, 6, 3, 48, 48)
    assert torch.equal(given, labels.flip(0))
    assert torch.equal(batches.take(index[5:7])[0], taken[5:7])  # the same window each time
    normalise = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    starts = Counter()
    for clip, frames in zip(clips.flip(0), taken, strict=True):
        windows = {start: normalise(clip[start : start + 12 : 2]) for start in range(9)}
        fits = [start for start, window in windows.items() if torch.allclose(frames, window, atol=1e-5)]
        assert len(fits) == 1
        starts.update(fits)
    assert set(starts) == set(range(9))  # from the first place to the last


class Oracle(nn.Module):
    """Knows the labels of two clips in three, from a batch that is the clips' numbers."""

    def __init__(self, labels):
        super().__init__()
        self.labels, self.modes = labels, []

    def forward(self, pixels):
        self.modes.append((self.training, torch.is_grad_enabled()))
        number = pixels.long()
        answer = torch.where(number % 3 == 0, (self.labels[number] + 1) % 8, self.labels[number])
        return SimpleNamespace(logits=nn.functional.one_hot(answer, 8).float() - 3)


@pytest.mark.parametrize("count", [3, 300])
def test_accuracy_is_the_share_of_right_answers(count):
    labels = torch.randint(8, (count,))
    turns = []

    def take(index, turn=0):
        turns.append(turn)
        return index.float(), labels[index]

    batches = SimpleNamespace(labels=labels, clips=labels, take=take, camera_of=lambda *_: nullcontext())
    model = Oracle(labels).train()
    assert accuracies(model, batches) == pytest.approx([(count - math.ceil(count / 3)) / count])
    assert model.training
    assert set(model.modes) == {(False, False)}
    assert set(turns) == {0}


def test_two_labels_are_two_heads_of_one_model():
    logits = torch.tensor([[0.0] * 8 + [3.0, 0.0, 0.0], [5.0] + [0.0] * 10])
    labels = torch.tensor([[7, 0], [0, 1]])
    losses = [nn.functional.cross_entropy(*head).item() for head in motion_accuracy.heads(logits, labels)]
    # By hand: −log of 1/8 and e⁵/(e⁵ + 7), then of e³/(e³ + 2) and 1/3.
    assert losses[0] == pytest.approx((math.log(8) + math.log1p(7 * math.exp(-5))) / 2, rel=1e-5)
    assert losses[1] == pytest.approx((math.log1p(2 * math.exp(-3)) + math.log(3)) / 2, rel=1e-5)
    assert motion_accuracy.loss_of(logits, labels).item() == pytest.approx(
        losses[0] + motion_accuracy.COLOUR_WEIGHT * losses[1]
    )
    whole = nn.functional.cross_entropy(logits[:, :8], labels[:, 0]).item()
    assert motion_accuracy.loss_of(logits[:, :8], labels[:, 0]).item() == whole
    assert [
        nn.functional.cross_entropy(*head).item() for head in motion_accuracy.heads(logits[:, :8], labels[:, 0])
    ] == [whole]

    batches = SimpleNamespace(labels=labels, clips=labels, take=lambda index: (index, labels[index]))
    batches.camera_of = lambda *_: nullcontext()
    model = nn.Module()
    model.forward = lambda index: SimpleNamespace(logits=logits[index])
    assert accuracies(model, batches) == [0.5, 0.5]  # the first clip's colour, the second's direction
    config = motion_accuracy.config_of(Run("", replace(Task(), colours=5), ALL), Settings())
    assert config.num_labels == 8 + 5


class Shades:
    """Clips that are as bright as their label: a toy that a model learns in a few steps."""

    def __init__(self, count=64):
        self.clips = self.labels = torch.arange(count) % 8
        self.asked, self.turns = [], []

    def take(self, index, turn=0):
        self.asked += index.tolist()
        self.turns.append(turn)
        labels = self.labels[index]
        shade = nn.functional.one_hot(labels, 8).float().repeat_interleave(2, dim=1)  # 8 bands of 2 rows
        return shade[:, None, None, :, None].expand(-1, 4, 3, -1, 16), labels

    def camera_of(self, index, turn=0):
        return nullcontext()


def toy(seed=0):
    torch.manual_seed(seed)
    settings = Settings(patch=16, width=16, depth=1, heads=2, batch_size=16, learning_rate=3e-3)
    config = motion_accuracy.config_of(Run("", Task(frames=4, size=16), ALL), settings)
    return motion_accuracy.initialised(VideoMAEForVideoClassification(config)), settings


def test_fit_learns_a_toy_at_a_rate_that_warms_up_and_decays(monkeypatch):
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["weight_decay"] == 0.05
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    model, settings = toy()
    assert accuracies(model, Shades())[0] < 0.5
    batches, looks = Shades(), []
    assert fit(model, batches, 200, 40, 0, settings, looks.append) < 0.3 < math.log(8)
    assert looks == [40, 80, 120, 160, 200]
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert 10 <= rates.index(max(rates)) <= 24  # a tenth of the steps
    assert max(rates[0], rates[-1]) < settings.learning_rate / 10
    assert len(batches.asked) == 200 * 16
    assert set(batches.asked) == set(range(40))  # the first clips, all of them
    assert set(batches.turns) == set(range(8))
    assert accuracies(model, Shades())[0] > 0.95


def test_fit_does_the_same_with_the_same_seed():
    ends, weights = [], []
    for seed in (0, 0, 1):
        model, settings = toy()
        ends.append(fit(model, Shades(), 11, 40, seed, settings))
        weights.append(torch.cat([value.flatten() for value in model.parameters()]))
    assert ends[0] == ends[1] != ends[2]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_fit_draws_a_keep_ratio_each_step_by_the_seed_alone():
    drawn, asked = {}, {}
    for seed, ratios in ((0, ()), (0, (0.2, 0.6, 1.0)), (1, (0.2, 0.6, 1.0)), (0, (0.5, 0.7, 0.9))):
        model, settings = toy()
        selector = SimpleNamespace(keep_ratio=None)
        model.everest = SimpleNamespace(selector=selector)
        seen = drawn[seed, ratios] = []
        model.register_forward_pre_hook(lambda *_, selector=selector, seen=seen: seen.append(selector.keep_ratio))
        batches = Shades()
        fit(model, batches, 60, 40, seed, settings, keep_ratios=ratios)
        asked[seed, ratios] = batches.asked, batches.turns
    assert drawn[0, ()] == [None] * 60
    zero = drawn[0, (0.2, 0.6, 1.0)]
    assert len(zero) == 60
    counts = Counter(zero)
    assert set(counts) == {0.2, 0.6, 1.0}
    assert min(counts.values()) >= 8  # 20 − 3.3 standard deviations of 3.65
    assert zero != drawn[1, (0.2, 0.6, 1.0)]
    assert [{0.2: 0.5, 0.6: 0.7, 1.0: 0.9}[ratio] for ratio in zero] == drawn[0, (0.5, 0.7, 0.9)]
    assert asked[0, ()] == asked[0, (0.2, 0.6, 1.0)]  # the clips are those of every other training


@pytest.fixture
def fits(monkeypatch):
    """What `train` trains, in order, with every weight of the model changed in the place of a training."""
    seen = []

    def fake(model, batches, steps, clips, seed, settings, look=None, keep_ratios=()):
        begin = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(steps)))
        seen.append(SimpleNamespace(**{**locals(), "end": {k: v.clone() for k, v in model.state_dict().items()}}))
        if look is not None:
            look(steps)
        return 1.5

    monkeypatch.setattr(motion_accuracy, "fit", fake)
    return seen


PHASES = replace(SMALL, steps=11, pretraining_steps=12, finetuning_steps=13)


def encoder_of(state):
    return {name.removeprefix("videomae."): v for name, v in state.items() if name.startswith("videomae.")}


@pytest.mark.parametrize("pretraining", ["ascending", "cosine"])
def test_fine_tuning_begins_where_pretraining_ended(fits, pretraining):
    record = train(Run("order", Task(), "rero", 0.6, pretraining, 0.3, seed=4), PHASES, CPU)
    before, after = fits
    assert isinstance(before.model, VideoMAEForPreTraining)
    assert isinstance(after.model, VideoMAEForVideoClassification)
    assert (before.steps, before.clips, before.seed) == (12, 12, 4)
    assert (after.steps, after.clips, after.seed) == (13, 6, 4)
    learned, begun = encoder_of(before.end), encoder_of(after.begin)
    assert learned
    assert set(learned) == set(begun)
    assert all(torch.equal(value, begun[name]) for name, value in learned.items())
    assert not any(torch.equal(learned[name], value) for name, value in encoder_of(before.begin).items())
    expected = {"ascending": ("l2", False), "cosine": ("cosine", True)}[pretraining]
    assert (before.model.everest.selector.distance, before.model.everest.selector.descending) == expected
    assert before.model.everest.selector.keep_ratio == 0.3
    assert before.model.everest.visible is None
    after_selector = after.model.everest.selector
    assert (after_selector.distance, after_selector.descending, after_selector.keep_ratio) == ("l2", True, 0.6)
    chosen = et.select_tokens(before.model, before.batches.take(torch.arange(3))[0])
    assert chosen.visible.shape == (3, 12)  # a tenth of 128
    assert chosen.target.shape == (3, 38 - 12)
    assert (record["loss"], record["pretraining_loss"]) == (1.5, 1.5)
    assert (record["kept"], record["tokens"]) == (76, 128)


def test_running_cells_are_pretrained_with_dual_masking(fits):
    record = train(Run("running-cell", Task(), ALL, None, "running cell", 0.5), PHASES, CPU)
    before, after = fits
    assert isinstance(before.model.everest.selector, et.RunningCellSelector)
    assert isinstance(before.model.everest.visible, et.TubeSelector)
    assert (before.model.everest.selector.keep_ratio, before.model.everest.visible.keep_ratio) == (0.5, 0.1)
    chosen = et.select_tokens(before.model, before.batches.take(torch.arange(3))[0])
    visible = chosen.visible.reshape(3, 8, -1)  # a tube: the same places in each of the eight steps
    assert torch.equal(visible % 16, (visible % 16)[:, :1].expand_as(visible))
    assert torch.equal(visible // 16, torch.arange(8)[None, :, None].expand_as(visible))
    for seen, target in zip(chosen.visible.tolist(), chosen.target.tolist(), strict=True):
        assert not set(seen) & set(target)
        assert len(target) < 64  # half of the tokens but for those that are seen already
    assert not is_patched(after.model)
    assert (record["kept"], record["tokens"]) == (128, 128)
    assert record["gflops"] == et.count_flops(after.model).total / 1e9


def test_the_cameras_motion_is_estimated_once_for_all_turns(monkeypatch):
    """A model that is told of it selects as one that estimates it in each turned clip."""
    run = Run("camera-96", replace(LARGE, camera=3.0), "rero compensated", 0.15, seed=1)
    batches = Batches(run, replace(SMALL, training_clips=4), CPU, training=True)
    assert Batches(replace(run, method="rero"), replace(SMALL, training_clips=4), CPU, training=True).motion is None
    model = VideoMAEForVideoClassification(motion_accuracy.config_of(run, SMALL))
    motion_accuracy.patch(model, run)
    index = torch.tensor([2, 0])
    estimated = [et.select_tokens(model, batches.take(index, turn)[0]) for turn in range(8)]
    monkeypatch.setattr("everest_tokens.camera._estimated", None)  # what is called from here on must not estimate
    for turn, found in enumerate(estimated):
        with batches.camera_of(index, turn):
            told = et.select_tokens(model, batches.take(index, turn)[0])
        torch.testing.assert_close(told.importance, found.importance, rtol=1e-3, atol=1e-3)
    assert (batches.motion - torch.eye(2, 3)).abs().max() > 0.02  # a camera that moves was found


def test_methods_differ_in_the_selector_alone(fits):
    records = [
        train(Run("", Task(), ALL, seed=2), PHASES, CPU),
        train(Run("", Task(), "random", 0.15, seed=2), PHASES, CPU),
        train(Run("", Task(), "rero", 0.15, seed=2), PHASES, CPU),
        train(Run("", Task(), "tube", 0.3, seed=2, steps=17), PHASES, CPU),
    ]
    first = fits[0]
    for one in fits:
        assert all(torch.equal(value, one.begin[name]) for name, value in first.begin.items())
        assert one.batches.clips is first.batches.clips
        assert (one.clips, one.seed) == (12, 2)
    assert [one.steps for one in fits] == [11, 11, 11, 17]
    assert [is_patched(one.model) for one in fits] == [False, True, True, True]
    assert isinstance(fits[1].model.everest.selector, et.RandomSelector)
    assert fits[1].model.everest.selector.keep_ratio == 0.15
    assert [record["kept"] for record in records] == [128, 19, 19, 40]  # a tube: 5 of 16 places in each step
    assert all(record["pretraining_loss"] is None for record in records)
    record = train(Run("order", Task(), "rero", 0.3, NONE, seed=2), PHASES, CPU)  # as others do after pre-training
    assert (fits[-1].steps, fits[-1].clips, record["pretraining_loss"]) == (13, 6, None)
    assert all(torch.equal(value, fits[-1].begin[name]) for name, value in first.begin.items())
    train(Run("", Task(), ALL, seed=3), PHASES, CPU)
    assert not torch.equal(fits[-1].begin["classifier.weight"], first.begin["classifier.weight"])


def test_a_budget_is_recorded_with_the_mean_of_what_it_keeps(fits):
    run = Run("mixture", MIXTURE, "energy", 0.5, seed=2)
    record = train(run, PHASES, CPU)
    test = Batches(run, PHASES, CPU, training=False)
    kept = [len(et.select_tokens(fits[0].model, test.take(torch.tensor([i]))[0]).kept[0]) for i in range(16)]
    assert len(test.labels) == 16
    assert len(set(kept)) > 1
    assert record["kept"] == sum(kept) / 16
    assert record["gflops"] == et.count_flops(fits[0].model, round(record["kept"])).total / 1e9


def test_one_training_is_tested_with_every_selector(fits):
    """As each would be alone, whatever was tested before it."""
    runs = [replace(run, seed=2) for run in EXPERIMENTS["appearance-at-test"] if run.keep_ratio in (None, 0.2)]
    records = motion_accuracy.train(runs[::-1], PHASES, CPU)
    assert len(fits) == 1
    assert fits[0].seed == 2
    assert fits[0].model.config.num_labels == 8 + COLOURED.colours
    assert {key_of(record) for record in records} == {key_of(asdict(run)) for run in runs}
    whole, *others = records
    assert (whole["method"], whole["trained"], whole["kept"]) == (ALL, None, 128)
    assert whole["curve"] == [[11, whole["accuracy"], whole["colour_accuracy"]]]
    kept = {record["method"]: record["kept"] for record in others}
    assert kept == {"rero": 25, "rero first": 25, "rero middle": 25, "random": 25, "tube": 8 * (16 - 12)}
    assert whole["gflops"] > max(record["gflops"] for record in others)
    for record in others:
        run = next(run for run in runs if run.method == record["method"])
        (alone,) = motion_accuracy.train([run], PHASES, CPU)
        assert {**alone, "seconds": 0} == {**record, "seconds": 0}
        assert is_patched(fits[-1].model)
        assert fits[-1].model.everest.selector.keep_ratio == 0.2
    for state in (one.end for one in fits):
        assert all(torch.equal(value, state[name]) for name, value in fits[0].end.items())  # trained on all tokens


def test_drawn_ratios_train_one_model_of_a_method(fits):
    runs = [run for run in EXPERIMENTS["one-checkpoint"] if (run.method, run.trained) == ("rero first", DRAWN)]
    records = motion_accuracy.train(runs, PHASES, CPU)
    (one,) = fits
    assert one.keep_ratios == (0.2, 0.3, 0.45, 0.6, 1.0)
    assert one.look is None  # the model has another ratio in each step
    assert one.model.everest.selector.anchor == "first"
    assert [record["kept"] for record in records] == [25, 38, 57, 76, 128]
    assert {record["trained"] for record in records} == {DRAWN}
    (plain,) = motion_accuracy.train([replace(runs[0], trained=None)], PHASES, CPU)
    assert fits[-1].keep_ratios == ()
    assert plain["colour_accuracy"] is not None


def test_the_frame_sampler_takes_its_candidates_from_the_window(fits):
    for run in EXPERIMENTS["frame-sampler"]:
        record = train(run, PHASES, CPU)
        model, batches = fits[-1].model, fits[-1].batches
        assert model.config.num_frames == 16
        assert (record["tokens"], record["kept"]) == (128, 19)
        taken = batches.take(torch.arange(2))[0]
        if run.alpha is None:
            assert model.everest.frame_sampler is None
            assert taken.shape[1] == 16
        else:
            assert model.everest.frame_sampler.alpha == run.alpha
            assert taken.shape[1] == _WINDOWS[run.alpha]
        assert et.select_tokens(model, taken).kept.shape == (2, 19)


SMALLEST = [
    f"--{name.replace('_', '-')}={getattr(SMALL, name)}" for name in vars(SMALL) if name.endswith(("steps", "clips"))
]


class SameProcess(nullcontext):
    """A pool of no processes."""

    def imap_unordered(self, function, jobs):
        return map(function, jobs)


IN_PROCESS = SimpleNamespace(get_context=lambda kind: SimpleNamespace(Pool=SameProcess))


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(motion_accuracy, "multiprocessing", IN_PROCESS)


def run_main(out, *arguments):
    motion_accuracy.main([*SMALLEST, "--device", "cpu", "--workers", "1", "--out", str(out), *arguments])
    return json.loads(out.read_text())


def by_hand(frames: int, kept: int) -> int:
    """Multiply–accumulates of the default model's forward with `kept` of its tokens."""
    tokens = frames // 2 * 4 * 4
    embedding = tokens * (2 * 3 * 12 * 12) * 64
    distances = (frames // 2 - 1) * 4 * 4 * 64
    block = kept * (4 * 64 * 64 + 2 * 64 * 256) + 2 * kept * kept * 64
    return embedding + distances + 2 * block + 64 * 8


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "motion.json"
    frames = ["--experiments", "frames", "--seeds", "1"]
    document = run_main(out, *frames)  # in a process of its own, as always
    assert document["command"].startswith("python benchmarks/motion_accuracy.py --steps=2")
    assert document["settings"] == asdict(replace(SMALL, batch_size=32))
    assert document["device"].startswith("CPU ")
    assert document["device"].endswith(", 1 thread a model")
    runs = {run["task"]["frames"]: run for run in document["runs"]}
    assert sorted(runs) == [16, 24]
    for length, run in runs.items():
        assert (run["experiment"], run["method"], run["keep_ratio"], run["seed"]) == ("frames", "rero", 0.3, 0)
        assert run["tokens"] == {16: 8 * 16, 24: 12 * 16}[length]
        assert run["kept"] == {16: 38, 24: 57}[length]
        assert run["gflops"] == by_hand(length, run["kept"]) / 1e9
        assert (run["accuracy"] * 16).is_integer()
        assert 0 <= run["accuracy"] <= 1
        assert [step for step, _ in run["curve"]] == [1, 2]
        assert run["curve"][-1][1] == run["accuracy"]
        assert run["loss"] == pytest.approx(math.log(8), abs=0.7)  # untrained: every label as likely
        assert run["seconds"] > 0
    printed = capsys.readouterr().out
    assert f"{runs[16]['gflops']:.5f}" in printed
    assert "38/128" in printed
    assert "frames 24" in printed

    monkeypatch.setattr(motion_accuracy, "multiprocessing", IN_PROCESS)
    monkeypatch.setattr(motion_accuracy, "_worker", None)  # nothing is trained anew
    run_main(out, *frames)
    assert json.loads(out.read_text()) == document  # the seconds too, and the one command
    text = out.read_text()
    with pytest.raises(SystemExit):
        run_main(out, *frames, "--steps", "3")
    assert "other settings" in capsys.readouterr().err
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--test-clips", "0"], "--test-clips must be at least 1"),
        (["--labelled-clips", "13"], "--labelled-clips must be in 1…12"),
        (["--experiments", "colour"], "invalid choice"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        run_main(tmp_path / "motion.json", *option)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rero_learns_the_task_from_few_tokens():
    settings = Settings(steps=200, training_clips=512, test_clips=256)
    found = train(Run("", Task(), "rero", 0.15), settings, CPU)
    assert found["kept"] == 19
    # Chance is 12.5 %, with a standard deviation of 2 % over 256 clips. Seeds 1 and 2: 79 and 78 %.
    assert found["accuracy"] > 0.5
