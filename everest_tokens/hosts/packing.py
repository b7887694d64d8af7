"""Clips of different numbers of tokens behind each other, through transformers' own blocks: attention within each clip.

Imported where such a model is patched, since it needs transformers' `AttentionInterface`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from everest_tokens.hosts.patched_class import Patched
from everest_tokens.hosts.running import PACKED, Packing, running

try:
    from torch.nn.attention import varlen
except ImportError:  # torch < 2.10
    varlen = None  # type: ignore[assignment]

_thread = threading.local()  # what the block that runs was given


class PackedBlocks(Patched):
    """The list of an encoder's blocks, which hands each of them the running forward's `packing`."""

    def __iter__(self) -> Iterator[Any]:
        blocks, current = super().__iter__(), running(self.everest)  # type: ignore[misc]
        if current is None or current.packing is None:
            return blocks
        return iter([partial(block, packing=current.packing) for block in blocks])


class PackedBlock(Patched):
    """A block that is told by an argument where clips end: recomputed for its gradients it finds no running forward."""

    def forward(self, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
        """The block's own."""
        _thread.packing, _thread.attended = packing, False
        try:
            output = super().forward(*args, **kwargs)
        finally:
            _thread.packing = None
        if packing is not None and not _thread.attended:
            raise TypeError(f"{type(self).__qualname__} doesn't attend through transformers' AttentionInterface")
        return output


class PackedPooler(Patched):
    """A pooling of a clip's tokens, of each clip by itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, D), packed too."""
        current = running(self.everest)
        if current is None or current.packing is None:
            return super().forward(tokens)
        clips = tokens.split(current.packing.lengths, dim=1)
        return torch.cat([super(PackedPooler, self).forward(clip) for clip in clips])


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each clip: query, key, value (1, heads, ΣK, d) → (1, ΣK, heads, d); outside a packed block SDPA.

    By torch's variable-length kernel where there is one, on CUDA in half precision, else clip by clip.
    """
    packing = getattr(_thread, "packing", None)
    if packing is None:
        plain = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _thread.attended = True
    if _has_kernel(query, dropout, scaling):
        q, k, v = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))  # (ΣK, heads, d)
        ends, most = packing.boundaries, max(packing.lengths)
        packed: Any = varlen.varlen_attn(q, k, v, ends, ends, most, most)
        return packed.unsqueeze(0), None
    clips = zip(*(each.split(packing.lengths, dim=2) for each in (query, key, value)), strict=True)
    mixed = [scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling) for q, k, v in clips]
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous(), None


def _has_kernel(query: Tensor, dropout: float, scaling: float | None) -> bool:
    width = query.shape[-1]
    return (
        varlen is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and width % 8 == 0
        and width <= 256
        and dropout == 0
        and scaling in (None, width**-0.5)
    )


AttentionInterface.register(PACKED, attention)
