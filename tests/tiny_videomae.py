"""A tiny transformers VideoMAE, and clips for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig

TINY: dict[str, Any] = {
    "image_size": (48, 64),  # not square, so that swapped rows and columns show
    "patch_size": 16,
    "num_frames": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
    "num_labels": 5,
}  # grid (4, 3, 4): 48 tokens


def build_model(cls: Callable[[VideoMAEConfig], Any], seed: int = 0, **overrides: Any) -> Any:
    """A tiny transformers model in eval mode whose every parameter is random: zero biases would hide mistakes."""
    config = VideoMAEConfig(**copy.deepcopy(TINY | overrides))
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(0.2 * noise + around)
    return model


def build_clips(model: Any, batch: int = 2, frames: int | None = None, seed: int = 1) -> Tensor:
    """(batch, frames, channels, height, width) of the model's dtype, normally distributed."""
    config = model.config
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    shape = (batch, frames or config.num_frames, config.num_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)
