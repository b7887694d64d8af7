"""A model whose own forward runs over the visible tokens: its `patch_embed` returns them while a request is with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everest_tokens.hosts.patched_class import Patched
from everest_tokens.hosts.visible_tokens import SelectionRequest, checked_selection
from everest_tokens.selection import TokenSelection


class SelectingModel(Patched):
    """What `patch_class` puts before the class of a model with a `patch_embed` and a `forward_features`."""

    patch_embed: Any
    _given: TokenSelection | None

    def forward(self, x: Tensor, *args: Any, token_selection: TokenSelection | None = None, **kwargs: Any) -> Any:
        """The model's own over clips (B, C, T, H, W); `token_selection` runs instead of selecting."""
        self._given = checked_selection(token_selection)
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self._given = None

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own, over the visible tokens."""
        self.patch_embed.request = SelectionRequest(self._given)
        try:
            return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.patch_embed.request = None


def select_by(embedding: Any, clips: Tensor, generator: torch.Generator | None) -> TokenSelection:
    """What a patched `patch_embed` selects, without running the encoder."""
    embedding.request = request = SelectionRequest(generator=generator, with_importance=True)
    try:
        embedding(clips)
    finally:
        embedding.request = None
    assert request.selection is not None
    return request.selection
