"""Does the selection carry the signal? A small VideoMAE learns a motion task from chosen tokens, all else equal.

The task is in motion_clips.py. Each experiment asks one question, at a size that a CPU trains in minutes. Of the paper:

    keep-ratio      ReRo, random, tube, running cell and all tokens, at 5 to 60 % of the tokens (Figure 5, Table 10)
    longer          all tokens, random and tube with 4,000 steps
    order           most against least changed tokens, in pre-training and in fine-tuning (Table 16)
    distance        the four distances, in pre-training (Table 9) and in training from scratch
    running-cell    ReRo against running cells in pre-training, then fine-tuning (Table 17)
    frame-sampler   InfoFrameSampler's α on clips whose action fills a third of the video (Table 13)
    frames          16 against 24 frames (Table 12)
    camera, flicker, noise   where change is no sign of the action any more

Beyond it:

    appearance           a second label that no change shows, the colour of a disc at rest; ReRo with anchors too
    appearance-at-test   the same selectors on a model that was trained on all tokens
    one-checkpoint       one model trained with keep ratios drawn for each step, against one model a ratio
    mixture              as many tokens for each clip as it needs against the same share of each, where cameras of
                         half the clips move
    camera-96            a moving camera and ReRo that compensates for it, on frames of 96 pixels

Nothing here reproduces the paper's accuracies: see MOTION.md for what the task is and isn't.

    python benchmarks/motion_accuracy.py                                    # everything; hours on two cores
    python benchmarks/motion_accuracy.py --experiments keep-ratio --seeds 1 # minutes
    python benchmarks/motion_accuracy.py --steps 6000 --methods "all tokens" --out long.json

A run that was stopped goes on where it was: what stands in the file with the same settings isn't trained again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from documents import RESULTS, cpu_name, header, write
from motion_camera import known, turned_motion
from motion_clips import DIRECTIONS, TEST_PHOTOS, TRAINING_PHOTOS, Task, make_clips, photographs, turned
from motion_runs import ALL, DRAWN, DRAWN_RATIOS, EXPERIMENTS, NONE, SELECTORS, Run, chosen_runs, key_of
from table_text import grouped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.camera import camera_motion
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

# Of the colour's cross-entropy in the loss, the motion's counts 1. Colour is learned at once and its gradients then set
# AdamW's scale, it seems: with equal weights models of all tokens stayed at chance on the motion (MOTION.md).
COLOUR_WEIGHT = 0.2
TUBELET = 2  # frames of a time step
LOOKS = 5  # how often accuracy is taken during a training


@dataclass(frozen=True)
class Settings:
    """How every model is built and trained."""

    steps: int = 1000
    pretraining_steps: int = 1200
    finetuning_steps: int = 400
    training_clips: int = 4096
    labelled_clips: int = 512  # of the training clips, what fine-tuning after pre-training sees
    test_clips: int = 1024
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    patch: int = 12
    width: int = 64
    depth: int = 2
    heads: int = 4
    decoder_width: int = 32
    decoder_depth: int = 1


@lru_cache(maxsize=2)
def clips_of(task: Task, seed: int, training: bool, count: int) -> tuple[Tensor, Tensor]:
    """The clips and labels of a task, the same for every run with this seed."""
    generator = torch.Generator().manual_seed(2 * seed + training)
    return make_clips(task, photographs(TRAINING_PHOTOS if training else TEST_PHOTOS), count, generator)


class Batches:
    """What a model is fed: windows of clips, turned if for training, normalised, on its device."""

    def __init__(self, run: Run, settings: Settings, device: torch.device, training: bool) -> None:
        count = settings.training_clips if training else settings.test_clips
        self.clips, self.labels = clips_of(run.task, run.seed, training, count)
        self.clips, self.labels = self.clips.to(device), self.labels.to(device)
        # The same windows in every epoch: a clip's window is a part of the data.
        frames = run.task.frames if run.window is None else run.window
        generator = torch.Generator().manual_seed(run.seed)
        start = torch.randint(run.task.frames - frames + 1, (count, 1), generator=generator)
        self.frames = (start + torch.arange(0, frames, run.every)).to(device)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.mean, self.scale = 255 * mean, 1 / (255 * std)
        self.motion = None  # what the camera does in each clip, where a selector asks
        if run.method in SELECTORS and getattr(selector_of(run), "camera", "ignore") == "compensate":
            pieces = torch.arange(count, device=device).split(32)
            self.motion = torch.cat([camera_motion(self.take(piece)[0], TUBELET) for piece in pieces])

    def camera_of(self, index: Tensor, turn: int = 0) -> AbstractContextManager[None]:
        """Within it the model knows what the camera does in the clips that `take` gives for the same index and turn."""
        return known(None if self.motion is None else turned_motion(self.motion[index], turn))

    def take(self, index: Tensor, turn: int = 0) -> tuple[Tensor, Tensor]:
        """float32 (B, T, 3, size, size) and labels, (B,) or with colours (B, 2)."""
        clips, labels = turned(self.clips[index[:, None], self.frames[index]], self.labels[index], turn)
        return (clips.contiguous().float() - self.mean) * self.scale, labels


class UniformFrameSampler(et.InfoFrameSampler):
    """The control for InfoFrameSampler: all steps are equally likely; in evaluation, evenly spaced ones."""

    def __call__(self, counts: Tensor, num_steps: int, generator: torch.Generator | None = None) -> Tensor:
        """counts (B, ⌊α·τ⌋), not looked at → (B, τ)."""
        return super().__call__(torch.ones_like(counts), num_steps, generator)

    def most_probable(self, counts: Tensor, num_steps: int) -> Tensor:
        """As `__call__`."""
        steps = torch.linspace(0, counts.shape[1] - 1, num_steps, device=counts.device).round().long()
        return steps.expand(len(counts), -1)


def config_of(run: Run, settings: Settings) -> VideoMAEConfig:
    return VideoMAEConfig(
        image_size=run.task.size,
        patch_size=settings.patch,
        num_frames=run.model_frames,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        decoder_hidden_size=settings.decoder_width,
        decoder_num_hidden_layers=settings.decoder_depth,
        decoder_num_attention_heads=settings.heads,
        decoder_intermediate_size=4 * settings.decoder_width,
        num_labels=DIRECTIONS + run.task.colours,
        use_mean_pooling=True,
    )


def initialised(model: Any) -> Any:
    """Linear and convolution weights with standard deviation 1/√fan-in, but for the classifier's.

    transformers' 0.02 is made for a width of 768; at 64 it keeps every model at chance for hundreds of steps.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) and name != "classifier":
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def heads(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of each label with it, the direction's and, where labels are (B, 2), the colour's."""
    # Without colours the second part of the logits is empty, and there is no label for it.
    return zip(logits.tensor_split([DIRECTIONS], dim=1), labels.reshape(len(labels), -1).unbind(1), strict=False)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the direction, and a share of the colour's."""
    motion, *colour = (cross_entropy(*head) for head in heads(logits, labels))
    return motion + COLOUR_WEIGHT * colour[0] if colour else motion


def fit(
    model: Any,
    batches: Batches,
    steps: int,
    clips: int,
    seed: int,
    settings: Settings,
    look: Any = None,
    keep_ratios: Sequence[float] = (),
) -> float:
    """Train for `steps` on the first `clips` clips; returns the mean loss of the last tenth of the steps.

    With `keep_ratios` each step draws one of them, by the seed alone, so that all methods draw the same.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    # A tenth of 10 steps is a warm-up of length 0, by which OneCycleLR would divide.
    warm_up = 0.1 if steps > 10 else 0.3
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=warm_up
    )
    labelled = isinstance(model, VideoMAEForVideoClassification)
    device = batches.clips.device
    generator = torch.Generator().manual_seed(seed)
    if keep_ratios:  # by a generator of their own: the batches stay those of every other training
        ratios = torch.Generator().manual_seed(1000 + seed)
        drawn = torch.randint(len(keep_ratios), (steps,), generator=ratios).tolist()
    losses = []
    for step in range(1, steps + 1):
        if keep_ratios:
            model.everest.selector.keep_ratio = keep_ratios[drawn[step - 1]]
        index = torch.randint(clips, (settings.batch_size,), generator=generator).to(device)
        turn = int(torch.randint(8, (), generator=generator))
        pixels, labels = batches.take(index, turn)
        with batches.camera_of(index, turn):
            output = model(pixels)
        loss = loss_of(output.logits, labels) if labelled else output.loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if look is not None and step * LOOKS // steps > (step - 1) * LOOKS // steps:
            look(step)
    return torch.stack(losses[-max(steps // 10, 1) :]).mean().item()


@torch.no_grad()
def accuracies(model: Any, batches: Batches) -> list[float]:
    """The share of the test clips that get their own label, for each label."""
    model.eval()
    right = torch.zeros(batches.labels[:1].numel(), dtype=torch.int64)
    for index in torch.arange(len(batches.labels), device=batches.clips.device).split(128):
        pixels, labels = batches.take(index)
        with batches.camera_of(index):
            output = model(pixels)
        for i, (logits, own) in enumerate(heads(output.logits, labels)):
            right[i] += (logits.argmax(-1) == own).sum().cpu()
    model.train()
    return [int(count) / len(batches.labels) for count in right]


@torch.no_grad()
def mean_kept(model: Any, batches: Batches) -> float:
    """Tokens that are kept of a clip; where that differs by clip, the mean over all of them."""
    selection = et.select_tokens(model, batches.take(torch.arange(1, device=batches.clips.device))[0])
    if selection.lengths is None:
        return float(selection.kept.shape[1])
    clips = torch.arange(len(batches.labels), device=batches.clips.device)
    kept = [et.select_tokens(model, batches.take(index)[0]).lengths for index in clips.split(128)]
    return torch.cat(kept).sum().item() / len(clips)


@lru_cache(maxsize=2)
def pretrained(run: Run, settings: Settings, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """The encoder's weights after pre-training, and the loss at its end. `run` without what comes after."""
    model = initialised(VideoMAEForPreTraining(config_of(run, settings))).to(device).train()
    assert run.pretraining is not None
    # V2's dual masking sees a tube of 10 %; the others see a tenth of the clip, drawn from what they keep.
    visible = et.TubeSelector(0.1) if run.pretraining == "running cell" else None
    et.patch_videomae(model, SELECTORS[run.pretraining](run.pretraining_keep_ratio or 0.3), visible=visible)
    batches = Batches(run, settings, device, training=True)
    loss = fit(model, batches, settings.pretraining_steps, settings.training_clips, run.seed, settings)
    return model.videomae.state_dict(), loss


def selector_of(run: Run) -> Any:
    """None for all tokens."""
    return None if run.method == ALL else SELECTORS[run.method](run.keep_ratio or 1.0)


def patch(model: Any, run: Run) -> None:
    """Give the model the selector of this run, in the place of the one it has."""
    kind = UniformFrameSampler if run.uniform else et.InfoFrameSampler
    sampler = None if run.alpha is None else kind(run.alpha)
    et.patch_videomae(model, selector_of(run), frame_sampler=sampler)


def train(runs: Sequence[Run], settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """Train one model and test it as each of `runs` says, which have their `training` in common."""
    run = runs[0].training
    torch.manual_seed(run.seed)
    began = time.perf_counter()
    steps, clips = run.steps or settings.steps, settings.training_clips
    weights, pretraining_loss = None, None
    if run.pretraining is not None:
        steps, clips = settings.finetuning_steps, settings.labelled_clips
    if run.pretraining not in (None, NONE):
        before = replace(run, experiment="", method="", keep_ratio=None)
        weights, pretraining_loss = pretrained(before, settings, device)
    torch.manual_seed(run.seed)
    model = initialised(VideoMAEForVideoClassification(config_of(run, settings)))
    if weights is not None:
        model.videomae.load_state_dict(weights, strict=False)  # the encoder's last norm is the classifier's fc_norm
    if run.method != ALL:
        patch(model, run)
    model = model.to(device).train()
    test, curve = Batches(run, settings, device, training=False), []
    drawn = run.trained == DRAWN
    loss = fit(
        model,
        Batches(run, settings, device, training=True),
        steps,
        clips,
        run.seed,
        settings,
        # In the middle of drawn ratios the model has whichever came last.
        None if drawn else lambda step: curve.append([step, *accuracies(model, test)]),
        DRAWN_RATIOS if drawn else (),
    )
    tokens = (run.model_frames // 2) * (run.task.size // settings.patch) ** 2
    records = []
    for one in sorted(runs, key=lambda one: one.trained is not None):  # first the one that is tested as it was trained
        if one.trained is not None:
            patch(model, one)
            torch.manual_seed(one.seed)  # random tokens are then the same, whatever was tested before
        scores = curve[-1][1:] if one.trained is None else accuracies(model, test)
        kept = float(tokens) if one.method == ALL else mean_kept(model, test)
        record = {
            **asdict(one),
            "tokens": tokens,
            "kept": int(kept) if kept.is_integer() else kept,  # of a budget the mean over the test clips
            "gflops": et.count_flops(model, None if one.method == ALL else round(kept)).total / 1e9,
            "accuracy": scores[0],
            "colour_accuracy": scores[1] if one.task.colours else None,
            "curve": curve if one.trained is None else [],
            "loss": loss,
            "pretraining_loss": pretraining_loss,
            "seconds": time.perf_counter() - began,  # the first one's with the training
        }
        records.append(record)
        began = time.perf_counter()
    return records


def _worker(job: tuple[list[Run], Settings, str]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    runs, settings, device = job
    return train(runs, settings, torch.device(device))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--methods", nargs="+", choices=[ALL, *SELECTORS], help="only these; all if not given")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default: 3)")
    parser.add_argument("--workers", type=int, help="processes; default: one a core on a CPU, one on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "motion_accuracy.json")
    for name in ("steps", "pretraining_steps", "finetuning_steps", "training_clips", "labelled_clips", "test_clips"):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__ if name in options})
    for name in ("seeds", "steps", "pretraining_steps", "finetuning_steps", "training_clips", "test_clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not 1 <= settings.labelled_clips <= settings.training_clips:
        parser.error(f"--labelled-clips must be in 1…{settings.training_clips}, got {settings.labelled_clips}")

    on_cpu = torch.device(options.device).type == "cpu"
    arguments = sys.argv[1:] if arguments is None else arguments
    document = header("motion_accuracy.py", arguments, torch.device(options.device), settings=asdict(settings))
    if on_cpu:
        document["device"] = f"{cpu_name()}, 1 thread a model"
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        for name in ("settings", "device", "versions"):
            if before.get(name) != document[name]:
                parser.error(f"{options.out} holds runs with other {name}: give another --out, or delete it")
        document["runs"] = before["runs"]
        commands = [*before["command"].split(" && "), document["command"]]
        document["command"] = " && ".join(dict.fromkeys(commands))  # all that it took, each once
    done = {key_of(record) for record in document["runs"]}
    runs = chosen_runs(options.experiments, options.methods, options.seeds)
    if not runs:
        parser.error(f"no model of {', '.join(options.experiments)} is trained with {', '.join(options.methods)}")
    waiting = [run for run in runs if key_of(asdict(run)) not in done]
    jobs = grouped(waiting, lambda run: key_of(asdict(run.training)))  # each model is trained once, however many tests
    workers = options.workers or (os.cpu_count() or 1 if on_cpu else 1)
    pool = multiprocessing.get_context("spawn").Pool(min(workers, max(len(jobs), 1)))
    with pool, tqdm(total=len(jobs), desc="models", unit="model") as bar:
        for records in pool.imap_unordered(_worker, [(job, settings, options.device) for job in jobs.values()]):
            document["runs"] += records
            write(document, options.out)
            last = records[-1]
            bar.set_postfix_str(f"{last['experiment']} {last['method']}: {last['accuracy']:.0%}")
            bar.update()
    write(document, options.out)
    print_table(document["runs"], {key_of(asdict(run)) for run in runs})
    print(f"\nwritten to {options.out}")


def print_table(records: list[dict[str, Any]], wanted: set[str]) -> None:
    """Mean and spread over the seeds, a line a setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if key_of(record) in wanted:
            groups.setdefault(key_of({**record, "seed": None}), []).append(record)
    columns = f"{'experiment':<20}{'trained':<14}{'method':<18}{'kept':>9}{'GFLOPs':>10}{'accuracy':>10}"
    print(f"{columns}  over seeds; colour")
    for group in groups.values():
        first = group[0]
        values = [record["accuracy"] for record in group]
        colours = [record["colour_accuracy"] for record in group if first["task"].get("colours")]
        task = ", ".join(f"{k} {v}" for k, v in first["task"].items() if v != getattr(Task, k))
        kept = f"{first['kept']:g}/{first['tokens']}"
        every = f"every {first['every']} of {first['window']}" if first["every"] > 1 else None
        colour = f"colour {sum(colours) / len(colours):.1%}" if colours else None
        more = ", ".join(filter(None, [colour, task, first["alpha"] and f"α {first['alpha']}", every]))
        trained = first.get("trained") or first["pretraining"] or ""
        print(
            f"{first['experiment']:<20}{trained:<14}{first['method']:<18}{kept:>9}"
            f"{first['gflops']:>10.5f}{sum(values) / len(values):>10.1%}"
            f"  {min(values):.1%} to {max(values):.1%}  {more}"
        )


if __name__ == "__main__":
    main()
