"""Pre-train a model of EVEREST's repository: its loop stays as it is, the patched model only runs faster.

PYTHONPATH=EVEREST python examples/loops/everest.py VIDEO… [--model pretrain_videomae_base_patch16_224]

engine_for_pretraining.py with mask_type='motion-centric'; the patch takes the model's own token selection over.
"""

import argparse

import modeling_pretrain  # noqa: F401 of a clone of the repository: registers its models with timm
import timm
import torch
from einops import rearrange
from torch.utils.data import DataLoader

import everest_tokens as et
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD, load_clip


def normalised_patches(videos):
    """Pixels (B, C, T, H, W) → (B, N, 2·16²·3), of mean 0 and variance 1 in each patch and channel."""
    mean, std = (torch.tensor(each, device=videos.device).view(-1, 1, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = rearrange(videos * std + mean, "b c (t f) (h p) (w q) -> b (t h w) (f p q) c", f=2, p=16, q=16)
    centred = pixels - pixels.mean(dim=-2, keepdim=True)
    return (centred / (pixels.std(dim=-2, keepdim=True) + 1e-6)).flatten(2)


def train_one_epoch(model, loader, optimizer, device):
    model.train()
    for videos, bool_masked_pos in loader:
        videos = videos.to(device)
        videos_patch = normalised_patches(videos)
        B, _, C = videos_patch.shape
        with torch.autocast(device.type, torch.bfloat16):
            outputs, (_, mc_target_mask) = model(videos, bool_masked_pos)
            labels = videos_patch[~mc_target_mask].reshape(B, -1, C)
            loss = torch.nn.functional.mse_loss(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--model", default="pretrain_videomae_base_patch16_224", help="a name that the clone registers")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = et.patch_videomae(timm.create_model(args.model).to(device))
    size = model.encoder.patch_embed.img_size[0]
    clips = [(load_clip(path, size=size)[0].transpose(0, 1), torch.ones(1)) for path in args.videos]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4, betas=(0.9, 0.95))
    for _ in range(args.epochs):
        train_one_epoch(model, DataLoader(clips, batch_size=2, shuffle=True), optimizer, device)
