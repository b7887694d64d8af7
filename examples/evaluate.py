"""Test a fine-tuned VideoMAE on several views of each video: temporal clips × crops, the mean of their softmax.

    python examples/evaluate.py examples/recipes/own.yaml --model fine-tuned --data videos
    python examples/evaluate.py examples/recipes/ucf101.yaml --model fine-tuned --test_list lists/test.csv \\
        --data_root videos --predictions predictions.jsonl
    python examples/evaluate.py examples/recipes/own.yaml --model fine-tuned --data videos \\
        --keep_ratios 0.2 0.3 0.45 0.6 1.0 --baselines random tube

Of `--data` the test part is tested, else val, else what was held out of it when the model was trained. One process or
several (torchrun, accelerate launch). A video that can't be read counts as wrong and is reported. With `--keep_ratios`
every video is decoded once and tested at each of them; budgets.py's table and picture lie beside the model then.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from augmentation import BatchAugmentation
from budgets import Way, costs, name_of, write_table
from clips import Sampling, TestViews, collate
from data import find, held_out_of_trained
from keep_ratios import check_model, check_ratios
from recipe import SettingsParser, frames_of, load_trained, read_section
from recorded import read
from run import tell
from streams import find_held_out, is_shards
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import VideoMAEForVideoClassification, set_seed
from video_list import Entry, read_list

import everest_tokens as et
from everest_tokens.selectors import TokenSelector

logger = logging.getLogger(__name__)

BASELINES = {"rero": et.ReRoSelector, "random": et.RandomSelector, "tube": et.TubeSelector}


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TestRecipe:
    """Settings of a test; clips and crops are the recipe's (Table 8), the rest is what the model was trained with."""

    model: str = _setting("", "folder that finetune.py wrote, or a hub id")
    data: str | None = _setting(None, "folder of videos, Hugging Face data set or folder of shards, see data.py")
    test_list: str | None = _setting(None, "in place of data a list of videos, one a line: path label [start end]")
    data_root: str | None = _setting(None, "folder that the list's paths are relative to; its own if not given")
    clips: int = _setting(5, "temporal clips of a video")
    crops: int = _setting(3, "spatial crops of a clip, 1 or 3")
    stride: int | None = _setting(None, "frames from one to the next, 0 for equal segments; the model's if not given")
    keep_ratio: float | None = _setting(None, "share of the tokens that is kept; the model's own if not given")
    keep_ratios: list[float] = _setting([], "in its place several: accuracy and cost at each, a table and a picture")  # noqa: RUF009
    baselines: list[str] = _setting([], f"selectors to compare with the model's: {', '.join(BASELINES)}")  # noqa: RUF009
    views_at_once: int = _setting(16, "views in a forward")
    dataloader_num_workers: int = _setting(4, "decoding processes")
    use_cpu: bool = _setting(not torch.accelerator.is_available(), "run on the CPU even where there is a GPU")
    predictions: str = _setting("predictions.jsonl", "where a line for each video goes")


@dataclass
class Scores:
    """Accuracies over a list, in percent; videos that could not be read count as wrong."""

    videos: int
    top1: float
    top5: float
    missing: int


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong settings end in one line on standard error and status 2."""
    return tell(run, sys.argv[1:] if arguments is None else arguments)


def run(arguments: list[str]) -> None:
    recipe = parse(arguments)
    accelerator = Accelerator(cpu=recipe.use_cpu)
    model = load_trained(VideoMAEForVideoClassification, recipe.model)
    trained = settle(recipe)
    entries = find_entries(recipe, model, trained)
    ways, policy = ways_to_run(et.patch_videomae(model), recipe), model.everest
    set_seed(0)  # baselines draw
    views = TestViews(
        entries, Sampling(frames_of(model), recipe.stride or None), recipe.clips, recipe.crops, model.config.image_size
    )
    loader = DataLoader(
        views, batch_size=1, num_workers=recipe.dataloader_num_workers, collate_fn=collate, shuffle=False
    )
    model, loader = accelerator.prepare(model.eval(), loader)
    normalise = BatchAugmentation()
    for name in ("mean", "std"):
        getattr(normalise, name).copy_(torch.tensor(trained[name]).view(3, 1, 1)) if name in trained else None
    lines: dict[int, list[dict[str, Any]]] = {}
    for batch in tqdm(loader, desc="testing", unit="video", disable=not accelerator.is_local_main_process):
        for position, index in enumerate(batch["index"].tolist()):
            problem, lines[index] = batch["problem"][position], []
            for way, selector in ways.items():
                policy.selector, mean = selector, None
                if not problem:
                    mean = mean_softmax(model, normalise, batch["pixel_values"][position], recipe.views_at_once)
                line = dict(zip(("selector", "keep_ratio"), way, strict=True)) if recipe.keep_ratios else {}
                lines[index].append(line_for(entries[index], mean, problem) | line)
    if accelerator.num_processes > 1:
        gathered: list[Any] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(gathered, lines)
        lines = {index: line for part in gathered for index, line in part.items()}  # padded: once each
    if accelerator.is_main_process:
        ordered = [lines[index] for index in sorted(lines)]
        out = Path(recipe.predictions)
        out.write_text("".join(json.dumps(line) + "\n" for of_video in ordered for line in of_video))
        scores = {way: score(list(of_way)) for way, of_way in zip(ways, zip(*ordered, strict=True), strict=True)}
        if recipe.keep_ratios:
            compare(policy.root, ways, scores, recipe)
            return
        (result,) = scores.values()
        print(f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.videos} videos", end="")
        print(f", {result.missing} of them unreadable and counted as wrong" if result.missing else "")
        out.with_suffix(".summary.json").write_text(json.dumps(asdict(result)) + "\n")


def parse(arguments: list[str]) -> TestRecipe:
    """`[RECIPE.yaml] [--setting value …]`: the recipe's section "testing", the command line wins."""
    parser = SettingsParser([TestRecipe], description="Test a fine-tuned VideoMAE on several views of each video.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="settings, see examples/recipes/")
    values, _, _ = read_section(parser, "testing", arguments)
    recipe = TestRecipe(**{item.name: values[item.name] for item in fields(TestRecipe)})
    if not recipe.model:
        raise ValueError("model is not set (see --help)")
    if recipe.data is None and recipe.test_list is None:
        raise ValueError("data is not set: a folder of videos (or test_list: a file with a video a line)")
    if recipe.data is not None and recipe.test_list is not None:
        raise ValueError("data and test_list both say what is tested: give one of them")
    for name, least in {"clips": 1, "views_at_once": 1, "stride": 0, "dataloader_num_workers": 0}.items():
        if (getattr(recipe, name) or 0) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
    if recipe.crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {recipe.crops}")
    if recipe.keep_ratios:
        check_ratios(recipe.keep_ratios)
        if recipe.keep_ratio is not None:
            raise ValueError("keep_ratio and keep_ratios both say what is kept: give one of them")
    for name in recipe.baselines:
        if name not in BASELINES or not recipe.keep_ratios:
            raise ValueError(f"baselines are of {', '.join(BASELINES)} and go with keep_ratios, got {name}")
    return recipe


def ways_to_run(model: Any, recipe: TestRecipe) -> dict[Way, TokenSelector]:
    """The selectors to test a patched model with: its own, at one keep ratio or several, and baselines.

    Raises:
        ValueError: the model can't run at one of the ratios.
    """
    own = model.everest.selector
    if recipe.keep_ratio is not None:
        own.keep_ratio = recipe.keep_ratio
        check_model(model, [recipe.keep_ratio])
    if not recipe.keep_ratios:
        return {(type(own).__name__, own.keep_ratio): own}
    ways = {}
    for selector in (copy.deepcopy(own), *(BASELINES[name](1.0) for name in recipe.baselines)):
        if getattr(selector, "keep_tokens", None) is not None:
            selector.keep_ratio = recipe.keep_ratios[0]  # shares were asked for, in place of the number
        model.everest.selector = selector
        check_model(model, recipe.keep_ratios)
        for ratio in recipe.keep_ratios:
            ways[name_of(selector), ratio] = copy.deepcopy(selector)
            ways[name_of(selector), ratio].keep_ratio = ratio
    model.everest.selector = own
    return ways


def compare(model: Any, ways: dict[Way, TokenSelector], scores: dict[Way, Scores], recipe: TestRecipe) -> None:
    """Say what each way gives and costs, and write it beside the model; beside the predictions for one of the hub."""
    found = costs(model, ways, min(recipe.views_at_once, recipe.clips * recipe.crops))
    rows = []
    for (selector, ratio), result in scores.items():
        way = found[selector, ratio]
        rows.append({"selector": selector, "keep_ratio": ratio, **way, **asdict(result)})
        print(
            f"{selector}, keep ratio {ratio:g}: top-1 {result.top1:.2f} %, {way['tokens']} tokens, "
            f"{way['gflops']:.4g} GFLOPs, {way['clips_per_second']:.4g} clips a second"
        )
    folder = Path(recipe.model) if Path(recipe.model).is_dir() else Path(recipe.predictions).parent
    write_table(folder, rows)
    print(f"{folder / 'keep_ratios.csv'}, {folder / 'keep_ratios.png'}")


def settle(recipe: TestRecipe) -> dict[str, Any]:
    """What the model was trained with, as far as recorded; the recipe's stride is that one unless it is given."""
    trained = read(recipe.model)
    for name in ("stride", "keep_ratio"):
        given = getattr(recipe, name)
        if name == "keep_ratio" and given in trained.get("keep_ratios", ()):
            continue
        if given is not None and given != trained.get(name, given):
            was = trained[name] if trained[name] is not None else f"keep_tokens {trained['keep_tokens']}"
            logger.warning("%s is %s in this test, the model was trained with %s", name, given, was)
    if recipe.stride is None:
        recipe.stride = trained.get("stride", 4)
        if not trained:
            logger.warning("nothing in %s says how it was trained: it is tested with stride 4", recipe.model)
    return trained


def find_entries(recipe: TestRecipe, model: Any, trained: dict[str, Any]) -> list[Entry]:
    """The videos to test on, with labels as the model numbers them: of `data`, what it wasn't trained on.

    Raises:
        ValueError: there are none, or they have labels that the model doesn't know.
    """
    if recipe.data is None:
        return read_list(recipe.test_list, recipe.data_root, labelled=True, num_labels=model.config.num_labels)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    found = (
        find_held_out(recipe.data, labels)
        if is_shards(recipe.data)
        else find(recipe.data, labelled=True, labels=labels)
    )
    held_out = held_out_of_trained(found.train, trained, recipe.data)
    for what, entries in (("test", found.test), ("val", found.val), ("what was held out", held_out)):
        if entries:
            logger.info("tested: %s of %s, %d videos", what, recipe.data, len(entries))
            return entries
    if not found.train:
        raise ValueError(f"data: {recipe.data} has no videos to test on")
    logger.warning("no test, no val, nothing known to be held out: all %d videos are tested", len(found.train))
    return found.train


@torch.inference_mode()
def mean_softmax(model: Any, normalise: Any, views: Tensor, at_once: int) -> Tensor:
    """uint8 views (V, T, C, H, W) of one video → the mean of their class probabilities, (classes,) on the CPU."""
    parts = []
    for part in views.split(at_once):
        clips, _ = normalise(part, None, False)
        parts.append(model(pixel_values=clips).logits.float().softmax(dim=1))
    return torch.cat(parts).mean(dim=0).cpu()


def line_for(entry: Entry, mean: Tensor | None, problem: str) -> dict[str, Any]:
    """What is written of one video."""
    line: dict[str, Any] = {"video": str(entry.path), "label": entry.label}
    if mean is None:
        return {**line, "problem": problem}
    best = mean.topk(min(5, len(mean)))
    return {**line, "top5": best.indices.tolist(), "probabilities": [round(value, 6) for value in best.values.tolist()]}


def score(lines: list[dict[str, Any]]) -> Scores:
    """Top-1 and top-5 over all videos of the list, the unreadable ones included."""
    top1 = sum(line["label"] == line["top5"][0] for line in lines if "top5" in line)
    top5 = sum(line["label"] in line["top5"] for line in lines if "top5" in line)
    missing = sum("problem" in line for line in lines)
    return Scores(len(lines), 100 * top1 / len(lines), 100 * top5 / len(lines), missing)


if __name__ == "__main__":
    sys.exit(main())
