"""mmaction2's VideoMAE in small, written from its structure alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MMActionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MMActionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), MMActionAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MMActionPatchEmbed(nn.Module):
    """As mmcv's: no record of the clip's size, and two results."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))
        self.adap_padding, self.norm = None, None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


class MMActionViT(nn.Module):
    """What a patch has to know of mmaction2's `VisionTransformer` (`vit_mae`), by its structure; 8 frames of 48×64."""

    def __init__(self, learnable: bool = False, mean: bool = True, feature_map: bool = False) -> None:
        super().__init__()
        self.embed_dims, self.patch_size, self.grid_size, self.return_feat_map = 32, 16, (3, 4), feature_map
        self.patch_embed = MMActionPatchEmbed(32)
        table = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(7))
        if learnable:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(MMActionBlock(32) for _ in range(2))
        self.norm = nn.Identity() if mean else nn.LayerNorm(32)
        self.fc_norm = nn.LayerNorm(32) if mean else None

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        x = self.patch_embed(x)[0]
        assert (height // 16, width // 16) == self.grid_size
        return self.after_embedding(x + self.pos_embed, batch)

    def after_embedding(self, x: Tensor, batch: int) -> Tensor:
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.return_feat_map:
            return x.reshape(batch, -1, *self.grid_size, self.embed_dims).permute(0, 4, 1, 2, 3)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(1))
