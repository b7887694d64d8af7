"""A pre-training step and a fine-tuning step on one clip with random weights: the shortest complete use.

python examples/quickstart.py [VIDEO]
"""

from __future__ import annotations

import sys

import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.demo import sample_video
from everest_tokens.video import load_clip


def main() -> None:
    video = sys.argv[1] if len(sys.argv) > 1 else sample_video()
    clip = load_clip(video)  # (1, 16, 3, 224, 224)

    # Your own checkpoint: VideoMAEForPreTraining.from_pretrained("MCG-NJU/videomae-base")
    model = et.patch_videomae(VideoMAEForPreTraining(VideoMAEConfig()))
    loss = model(clip).loss  # no bool_masked_pos any more
    loss.backward()
    selection = et.select_tokens(model, clip)
    print(
        f"pre-training: loss {loss.item():.3f}; the encoder saw {selection.visible.shape[1]} tokens and the decoder "
        f"predicted {selection.target.shape[1]} of {selection.importance.shape[1]}"
    )

    model = et.patch_videomae(VideoMAEForVideoClassification(VideoMAEConfig(num_labels=400)))
    loss = model(clip, labels=torch.tensor([7])).loss
    loss.backward()
    selection = et.select_tokens(model, clip)
    print(
        f"fine-tuning: loss {loss.item():.3f} from {selection.kept.shape[1]} of {selection.importance.shape[1]} tokens"
    )
    print("kept tokens at each time step:", selection.frame_counts[0].tolist())


if __name__ == "__main__":
    main()
