"""Pre-train a small model on one clip until it knows it by heart, save it, and draw what it reconstructs.

It shows what `paper_figures.py reconstruction` draws, not what EVEREST learns: for that, give it a model that was
pre-trained on a data set. Takes some minutes on a CPU.

    python examples/pictures/reconstruction.py VIDEO --start 30 --stride 2 --out reconstruction.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from paper_figures import figure, parser
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForPreTraining

import everest_tokens as et
from everest_tokens.video import load_clip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("video", type=Path)
    arguments.add_argument("--start", type=int, default=0, help="first frame of the clip")
    arguments.add_argument("--stride", type=int, default=4, help="frames from one sampled frame to the next")
    arguments.add_argument(
        "--steps", type=int, default=800, help="of training, four random selections of the clip each"
    )
    arguments.add_argument("--out", type=Path, default=Path("reconstruction.png"))
    options = arguments.parse_args()

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=128,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=512,
        decoder_hidden_size=96,
        decoder_num_attention_heads=3,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=256,
    )
    model = et.patch_videomae(VideoMAEForPreTraining(config), et.ReRoSelector(0.5)).train()
    clip = load_clip(options.video, start=options.start, stride=options.stride, size=config.image_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tqdm(range(options.steps), desc="training", unit="step") as bar:
        for _ in bar:
            loss = model(clip.expand(4, -1, -1, -1, -1)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        clip_of = ["--start", str(options.start), "--stride", str(options.stride)]
        figure(
            parser().parse_args(
                ["reconstruction", str(options.video), "--model", folder, "--out", str(options.out), *clip_of]
            )
        )
    print(f"drawn in {options.out.resolve()}")


if __name__ == "__main__":
    main()
