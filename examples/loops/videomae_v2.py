"""Pre-train a model of VideoMAE V2's repository over the tokens that change: three lines of its loop are others.

PYTHONPATH=VideoMAEv2 python examples/loops/videomae_v2.py VIDEO… [--model pretrain_videomae_base_patch16_224]

In engine_for_pretraining.py the labels' line moves below the model's, because the model now chooses the targets, and
the weighting by cal_loss_mask goes, because the encoder sees none of them. The masks that the loader makes are still
passed, and ignored (here they are empty).
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
    for images, bool_masked_pos, decode_masked_pos in loader:
        images = images.to(device)
        images_patch = normalised_patches(images)
        B, _, C = images_patch.shape
        with torch.autocast(device.type, torch.bfloat16):
            outputs, (_, target_mask) = model(images, bool_masked_pos, decode_masked_pos)  # was: outputs = model(…)
            labels = images_patch[~target_mask].reshape(B, -1, C)  # was: images_patch[~decode_masked_pos].reshape(…)
            loss = ((outputs - labels) ** 2).mean()  # was: the mean over cal_loss_mask alone
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
    clips = [(load_clip(path, size=size)[0].transpose(0, 1), torch.ones(1), torch.ones(1)) for path in args.videos]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4, betas=(0.9, 0.95))
    for _ in range(args.epochs):
        train_one_epoch(model, DataLoader(clips, batch_size=2, shuffle=True), optimizer, device)
