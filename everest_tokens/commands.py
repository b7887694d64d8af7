"""What the commands `visualize`, `inspect` and `convert` do; the demo has a file of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import transformers

from everest_tokens.checkpoints import describe_checkpoint, load_videomae
from everest_tokens.demo import demo as demo
from everest_tokens.patching import patch_videomae, select_tokens
from everest_tokens.selectors import ReRoSelector
from everest_tokens.video import load_clip
from everest_tokens.visualization import check_out, draw, pixels_of, selection_part

_POSITIONS = {"sinusoid": "VideoMAE's sinusoid", "mvd": "MVD's 3D sin-cos", "stored": "the file's own table"}


def visualize(
    videos: list[Path], out: Path, stride: int, start: list[int] | None, columns: int, **selecting: Any
) -> None:
    """Draw a clip of each video; `selecting` are arguments of `patched_model`. See `visualize --help`."""
    from tqdm import tqdm  # of the demo extra, as matplotlib

    check_out(out, ".png", ".pdf", ".svg")
    starts: list[Any] = start or [None]
    if len(starts) not in (1, len(videos)):
        raise ValueError(f"expected one start, or one for each of {len(videos)} videos, got {len(starts)}")
    model, parts = patched_model(**selecting), []
    policy, config = model.everest, model.config
    policy.frame_sampler = None  # a clip's own frames are drawn, and which of the kept tokens are visible is not
    policy.visible, policy.mask_ratio = None, 1 - policy.selector.keep_ratio / 2
    frames = {"num_frames": config.num_frames, "stride": stride, "size": config.image_size}
    for number, video in enumerate(tqdm(videos, desc="clips", disable=len(videos) == 1)):
        clip = load_clip(video, start=starts[number % len(starts)], **frames)
        title = video.name if len(videos) > 1 else ""
        parts.append(selection_part(pixels_of(clip), {"kept": select_tokens(model, clip)}, title=title))
    draw(parts, columns=columns).savefig(out)
    print(f"drawn in {out.resolve()}")


def patched_model(
    model: str | None, keep_ratio: float | None = None, distance: str | None = None, seed: int = 0
) -> Any:
    """Load a model and patch it with the settings that it records, else the paper's, to look at what it keeps.

    Args:
        model: folder or hub id of transformers, or a checkpoint file of the VideoMAE family; None for a ViT-B's tubelet
            embedding with random weights, without blocks.
        keep_ratio, distance: in place of the model's own.

    Raises:
        ValueError: not to be found, or no model that can be patched.
    """
    try:
        if model is None:
            print("no --model: a ViT-B's tubelet embedding with random weights selects")
            transformers.set_seed(seed)
            config = transformers.VideoMAEConfig(num_hidden_layers=0, decoder_num_hidden_layers=0)
            loaded: Any = transformers.VideoMAEForPreTraining(config)
        elif Path(model).is_file():
            loaded = load_videomae(model, for_pretraining=True)
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            kind = (config.architectures or ["VideoMAEModel"])[0]
            loaded = getattr(transformers, kind).from_pretrained(model)
        policy = patch_videomae(loaded.eval()).everest
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{model}: {str(error).splitlines()[0]}") from error
    if distance is not None:
        policy.selector = ReRoSelector(policy.selector.keep_ratio, distance)
    if keep_ratio is not None:
        policy.selector.keep_ratio = keep_ratio
    return loaded


def convert(checkpoint: Path, out: Path, **loading: Any) -> None:
    """Write a checkpoint as a folder; `loading` are arguments of `load_videomae`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder to write into")
    model = load_videomae(checkpoint, **loading)
    model.save_pretrained(out)
    print(f"wrote {type(model).__name__} to {out}")


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
