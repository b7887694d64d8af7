"""What the commands do, beside what each has a file of its own for."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from everest_tokens.checkpoints import describe_checkpoint, load_videomae
from everest_tokens.comparing import compare
from everest_tokens.demo import demo as run_demo
from everest_tokens.drawing import frames_of, kept, strategies, unit_of
from everest_tokens.exporting import export as export_model
from everest_tokens.movies import play
from everest_tokens.patching import patch_videomae, select_tokens
from everest_tokens.prediction import classify, reading_of
from everest_tokens.selection import TokenSelection, compensates
from everest_tokens.selectors import ReRoSelector
from everest_tokens.video import load_clip, load_views
from everest_tokens.visualization import check_out, draw, path_row, pixels_of, selection_part

logger = logging.getLogger(__name__)

_POSITIONS = {"sinusoid": "VideoMAE's sinusoid", "mvd": "MVD's 3D sin-cos", "stored": "the file's own table"}


def demo(**options: Any) -> None:
    """Compare a model before and after patching; `options` are arguments of demo.py's. See `demo --help`."""
    run_demo(progress=partial(_bar, desc="steps before and after, in turn", leave=False), **options)


def visualize(
    videos: list[Path],
    out: Path | None,
    draws: str,
    stride: int,
    start: list[int] | None,
    columns: int,
    keep_ratio: float | None,
    seed: int,
    **selecting: Any,
) -> None:
    """Draw a clip of each video, or play one; `selecting` are arguments of `patched_model`. See `visualize --help`."""
    out = out or Path(f"everest-{draws}.png")
    check_out(out, ".png", ".pdf", ".svg", ".gif", ".mp4")
    starts: list[Any] = start or [None]
    if len(starts) not in (1, len(videos)):
        raise ValueError(f"expected one start, or one for each of {len(videos)} videos, got {len(starts)}")
    plays = out.suffix.lower() in (".gif", ".mp4")
    if plays and len(videos) > 1:
        raise ValueError(f"expected one video to play in {out.name}, got {len(videos)}")
    if plays and out.resolve() == videos[0].resolve():
        raise ValueError(f"{out} is the video itself: give another --out")
    if out.suffix.lower() == ".mp4" and start:
        raise ValueError(f"{out.name} plays the whole video: --start is of a clip")
    model = patched_model(keep_ratio=keep_ratio if draws == "kept" else None, seed=seed, **selecting)
    unit, ratio = unit_of(model.everest.selector), 0.5 if keep_ratio is None else keep_ratio
    model.everest.frame_sampler = None
    shape, _, _ = model.everest.host.example(model.everest.root)
    reading: dict[str, Any] = {"num_frames": shape[1], "stride": stride, "size": tuple(shape[-2:])}

    def select(clip: Any) -> dict[str, TokenSelection]:
        return kept(model, clip) if draws == "kept" else strategies(model, clip, ratio=ratio, seed=seed)

    if plays:
        play(videos[0], out, select, start=starts[0], unit=unit, progress=partial(_bar, desc="frames"), **reading)
    else:
        parts = []
        for number, video in enumerate(_bar(videos, desc="clips", disable=len(videos) == 1)):
            clip = load_clip(video, start=starts[number % len(starts)], **reading)
            title = video.name if len(videos) > 1 else ""
            parts.append(selection_part(pixels_of(clip), select(clip), title=title, unit=unit))
            if draws == "kept" and compensates(model.everest.selector):
                parts[-1].rows.append(path_row(clip))
        draw(parts, columns=columns).savefig(out)
    logger.info("drawn in %s", out.resolve())


def _bar(*given: Any, disable: bool = False, **options: Any) -> Any:
    """A progress bar; none where the command is to be quiet."""
    from tqdm import tqdm  # of the demo extra, as matplotlib

    return tqdm(*given, disable=disable or not logger.isEnabledFor(logging.INFO), **options)


def patched_model(
    model: str | None,
    keep_ratio: float | None = None,
    distance: str | None = None,
    seed: int = 0,
    anchor: str | None = None,
    camera: str | None = None,
) -> Any:
    """Load a model and patch it with the settings that it records, else the paper's, to look at what it keeps.

    Args:
        model: folder or hub id of transformers, or a checkpoint file of the VideoMAE family; None for a ViT-B's tubelet
            embedding with random weights, without blocks.
        keep_ratio, distance, anchor, camera: in place of the model's own.

    Raises:
        ValueError: not to be found, or no model that can be patched.
    """
    try:
        if model is None:
            logger.info("no --model: a ViT-B's tubelet embedding with random weights selects")
            transformers.set_seed(seed)
            config = transformers.VideoMAEConfig(num_hidden_layers=0, decoder_num_hidden_layers=0)
            loaded: Any = transformers.VideoMAEForPreTraining(config)
        elif Path(model).is_file():
            loaded = load_videomae(model, for_pretraining=True)
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            kind = (config.architectures or ["VideoMAEModel"])[0]
            loaded = getattr(transformers, kind).from_pretrained(model)
        policy = patch_videomae(loaded.float().eval()).everest  # clips are float32, whatever a folder was saved in
    except Exception as error:  # what a broken file makes transformers and safetensors raise has no class in common
        problem = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(problem if model is None else f"{model}: {problem}") from error
    given = {"distance": distance, "anchor": anchor, "camera": camera}
    given = {name: value for name, value in given.items() if value is not None}
    if not all(hasattr(policy.selector, name) for name in given):
        if policy.packs and keep_ratio is None:
            raise ValueError(f"{model}: {policy.selector} takes no {' and '.join(given)}: give a keep ratio too")
        policy.selector = ReRoSelector(keep_ratio or policy.share_kept())
    for name, value in given.items():
        setattr(policy.selector, name, value)
    if keep_ratio is not None:
        policy.selector.keep_ratio = keep_ratio
    return loaded


def predict(
    model: str,
    videos: list[Path],
    top: int,
    views: str,
    stride: int | None,
    keep_ratio: float | None,
    as_json: bool,
    heatmap: Path | None,
) -> int:
    """Print what a classifier says of each video; returns 1 where one couldn't be read. See `predict --help`."""
    loaded, results, drawn = _on_device(patched_model(model, keep_ratio)), [], Counter[str]()
    if heatmap is not None:
        heatmap.mkdir(parents=True, exist_ok=True)
        reading = reading_of(loaded, model, stride)
    bar = _bar(videos, desc="videos", disable=len(videos) == 1)
    for video, result in zip(bar, classify(loaded, model, videos, views=views, stride=stride, top=top), strict=True):
        results.append(result)
        if "problem" in result:
            print(f"everest-tokens: {result['problem']}", file=sys.stderr)
            continue
        if heatmap is not None:
            clip = load_views(video, clips=1, crops=1, **reading).to(loaded.device)
            pixels, selection = pixels_of(clip, reading["processor"]), select_tokens(loaded, clip)
            picture = draw([selection_part(frames_of(loaded, pixels, selection), {"kept": selection})])
            name = "-".join(video.absolute().parts[-2:]).lstrip("/-")
            drawn[name] += 1  # videos of one name in folders of one name
            picture.savefig(heatmap / f"{name}{f'-{drawn[name]}' if drawn[name] > 1 else ''}.png")
        if not as_json:
            named = ", ".join(f"{label} {score:.3f}" for label, score in result["top"])
            bar.write(f"{video}: {named} ({result['milliseconds']:.0f} ms)")
    if as_json:
        print(json.dumps(results, indent=1))
    return int(any("problem" in result for result in results))


def export(model: str, out: Path | None, kind: str, keep_ratio: float | None) -> None:
    """Write a model as a file that needs no library of ours, and print what came of it. See `export --help`."""
    about = export_model(patched_model(model, keep_ratio), out or Path(f"everest.{kind}"), kind)
    for name, value in about.items():
        print(f"{name:<12}{value}")


def benchmark(model: str, keep_ratios: list[float] | None, batch_size: int, repeats: int, training: bool) -> None:
    """Print what a model costs with all tokens and with fewer, measured in turn. See `benchmark --help`."""
    loaded = _on_device(patched_model(model))
    ratios = keep_ratios or [loaded.everest.share_kept()]
    with _bar(total=(len(ratios) + 1) * (repeats + 2), desc="runs", leave=False) as bar:
        costs = compare(
            loaded, ratios, batch_size=batch_size, repeats=repeats, training=training, progress=lambda: bar.update()
        )
    what, where = "training steps" if training else "forwards", loaded.device
    print(f"{what} of {batch_size} clip(s) on {where}, medians of {repeats} in turn")
    print(f"{'':<22}{'clips a second':>15}{'time':>8}{'peak memory':>14}{'ratio':>8}")
    all_seconds, all_memory = costs[None]
    for ratio, (seconds, memory) in costs.items():
        name = "all tokens, unpatched" if ratio is None else f"keep ratio {ratio:.4g}"
        time = median(mine / its for mine, its in zip(seconds, all_seconds, strict=True))
        print(
            f"{name:<22}{batch_size / median(seconds):>15.2f}{time:>8.2f}"
            f"{memory / 2**20:>10.{int(all_memory < 2**25)}f} MiB{memory / all_memory:>8.2f}"
        )


def _on_device(model: Any) -> Any:
    return model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def convert(checkpoint: Path, out: Path, **loading: Any) -> None:
    """Write a checkpoint as a folder; `loading` are arguments of `load_videomae`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder to write into")
    model = load_videomae(checkpoint, **loading)
    model.save_pretrained(out)
    logger.info("wrote %s to %s", type(model).__name__, out)


def inspect(checkpoint: Path, **loading: Any) -> None:
    """Print what a checkpoint is, then what `load_videomae` would make of it."""
    info = describe_checkpoint(checkpoint, **loading)
    config = info.model.config
    side, patch, tubelet = config.image_size, config.patch_size, config.tubelet_size
    grid = (config.num_frames // tubelet, side // patch, side // patch)
    positions = _POSITIONS[config.everest["position"]]
    if config.everest.get("class_token"):
        positions += ", class token without one"
    if hasattr(info.model, "decoder"):
        last = ("decoder", _blocks(config, "decoder_"))
    else:
        pooling = "the mean of the tokens" if config.use_mean_pooling else "the first token"
        last = ("head", f"{config.num_labels} labels on {pooling}")
    lines = [
        ("family", info.family),
        ("encoder", _blocks(config)),
        ("tubelets", f"{tubelet}×{patch}×{patch}, {config.num_channels} channels"),
        ("frames", "{} of {}×{}: {}×{}×{} = {} tokens".format(config.num_frames, side, side, *grid, math.prod(grid))),
        ("positions", positions),
        ("classifier", f"{info.labels} labels" if info.labels is not None else "none in the file"),
        ("loaded as", type(info.model).__name__),
        last,
        *(("freshly made", part) for part in info.fresh),
        *(("not loaded", part) for part in info.ignored),
        *(("assumed", part) for part in info.assumed),
    ]
    for name, value in lines:
        print(f"{name:<18}{value}")


def _blocks(config: Any, prefix: str = "") -> str:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    return "{} blocks, width {}, MLP {}, {} heads".format(*(getattr(config, prefix + name) for name in names))
