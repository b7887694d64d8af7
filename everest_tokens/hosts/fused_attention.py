"""The VideoMAE family's attention, which its own code writes out by hand, through torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.hosts.patched_class import Patched


class FusedAttention(Patched):
    """The family's attention through `scaled_dot_product_attention`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        batch, count, _ = tokens.shape
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        products = nn.functional.linear(tokens, self.qkv.weight, bias)
        query, key, value = products.view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, count, -1)))


def check_attention(number: int, attention: Any) -> None:
    """Raise ValueError where a block's attention is not the family's usual one."""
    names = {name for name, _ in attention.named_parameters()}
    usual = {"qkv.weight", "proj.weight", "proj.bias"}
    parts = all(hasattr(attention, name) for name in ("num_heads", "attn_drop", "proj_drop", "q_bias", "v_bias"))
    scaled = isinstance(getattr(attention, "scale", None), float)
    if not parts or not scaled or names not in (usual, usual | {"q_bias", "v_bias"}):
        raise ValueError(
            f"fused_attention: the attention of block {number} ({type(attention).__qualname__}) is not a fused qkv with"
            f" a fixed scale, its parameters are {', '.join(sorted(names))}"
        )
