"""The VideoMAE family's own pre-training loop with patched models of its own classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from family_models import PreTrainingModel
from torch import Tensor, nn

import everest_tokens as et


def pixel_patches(videos: Tensor, size: int = 16) -> Tensor:
    """What the repositories' loops call videos_patch: normalised per patch and channel, (B, N, 2·size²·3)."""
    squeezed = rearrange(videos, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", p0=2, p1=size, p2=size)
    mean, deviation = squeezed.mean(dim=-2, keepdim=True), squeezed.var(dim=-2, unbiased=True, keepdim=True).sqrt()
    return rearrange((squeezed - mean) / (deviation + 1e-6), "b n p c -> b n (p c)")


def smooth_clips() -> Tensor:
    """(2, 3, 8, 48, 64): half waves across, down and both ways, which a tiny model learns in few steps."""
    y, x = torch.meshgrid(torch.arange(48) / 48, torch.arange(64) / 64, indexing="ij")
    clips = [torch.stack([torch.sin(math.pi * wave + phase) for wave in (x, y, x + y)]) for phase in (0.0, 1.0)]
    return torch.stack(clips).unsqueeze(2).repeat(1, 1, 8, 1, 1)


def pretrain_one_epoch(model: Any, data_loader: Any, optimizer: Any, autocast: bool) -> list[float]:
    """The pre-training loop with the two lines that EVEREST's has and VideoMAE's gets."""
    model.train()
    losses = []
    for videos, bool_masked_pos in data_loader:
        bool_masked_pos = bool_masked_pos.flatten(1).to(torch.bool)
        with torch.no_grad():
            videos_patch = pixel_patches(videos)
            B, _, C = videos_patch.shape
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs, (_, target_mask) = model(videos, bool_masked_pos)
            labels = videos_patch[~target_mask].reshape(B, -1, C)
            loss = nn.MSELoss()(input=outputs, target=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestPreTrainingLoop:
    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
    @pytest.mark.parametrize("family", ["videomae", "videomaev2", "everest"])
    def test_learns_a_clip(self, family, autocast):
        options = {"mcm": True} if family == "everest" else {}
        model = PreTrainingModel(family, embed_dim=64, decoder_dim=64, **options)  # torch's own initialisation
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        videos, mask = smooth_clips(), torch.ones(2, 48)
        mask[:, ::10] = 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
        losses = pretrain_one_epoch(model, [(videos, mask)] * 30, optimizer, autocast)
        assert len(losses) == 30
        assert losses[-1] < losses[0] / 2

        # Each prediction is of the token that was asked for, whatever the mask says: other tokens' pixels fit worse.
        selection = et.select_tokens(model.eval(), videos)
        with torch.no_grad():
            prediction, _ = model(videos, mask.bool(), token_selection=selection)
        patches = pixel_patches(videos)
        own, others = [], []
        for clip, tokens in enumerate(selection.target.tolist()):
            for place, token in enumerate(tokens):
                error = (patches[clip] - prediction[clip, place]).square().mean(dim=1)
                own.append(error[token].item())
                others.append(error.mean().item())
        assert sum(own) < 0.75 * sum(others)  # wrong tokens would make them alike
