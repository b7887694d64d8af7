"""Small timm image models, and timm's own modules run by hand on the chosen tokens of a clip.

The reference for what a patched image model computes: nothing here uses the library's embedding, positions or blocks.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import everest_tokens as et

# Not square, so that swapped rows and columns show: 2 × 3 places.
SMALL: dict[str, Any] = {"img_size": (32, 48), "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "flexivit_small": {},
    "vit_base_patch32_clip_224": {"img_size": (64, 96)},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": (28, 42)},
    "eva02_tiny_patch14_224": {"img_size": (28, 42)},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
}
VIT, CLIP, SIGLIP, EVA = (
    "vit_tiny_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
)
DINOV2, DINOV3, MIXED = (
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
)


def lacking(name: str, needs: str | None = None) -> pytest.MarkDecorator:
    """Skips a test where the installed timm doesn't know the model or lacks one of its layers."""
    missing = not timm.is_model(name) or (needs is not None and not hasattr(timm.layers, needs))
    return pytest.mark.skipif(missing, reason=f"timm {timm.__version__} lacks {name}")


def family(name: str, *rest: Any, id: str | None = None, needs: str | None = None) -> Any:
    return pytest.param(name, *rest, id=id or name, marks=lacking(name, needs))


every_family = pytest.mark.parametrize("name", [family(name) for name in MODELS])


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny image model in eval mode whose every parameter is random: zero biases would hide mistakes."""
    model = timm.create_model(name, pretrained=False, **{**SMALL, **MODELS.get(name, {}), **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        parameter.data.copy_(0.2 * noise + around)
    return model.to(dtype)


def inflated(plain: Any, tubelet: int = 2) -> Tensor:
    """The image's kernel, the same in every frame of a tubelet: (D, C, frames, height, width)."""
    return (plain.patch_embed.proj.weight.detach() / tubelet)[:, :, None].repeat(1, 1, tubelet, 1, 1)


def sincos(steps: int, width: int, rms: float) -> Tensor:
    """(steps, width) float64, by plain loops over the formula; sines and cosines have root mean square √½."""
    table = torch.zeros(steps, width, dtype=torch.float64)
    for p in range(steps):
        for i in range(width // 2):
            angle = p * 10000 ** (-i / (width / 2))
            table[p, i], table[p, width // 2 + i] = math.sin(angle), math.cos(angle)
    return table * rms * math.sqrt(2)


def image_rms(plain: Any) -> float:
    """Root mean square of the position embedding of the image's places."""
    if plain.pos_embed is None:
        return 0.02
    places = math.prod(plain.patch_embed.grid_size)
    return plain.pos_embed.detach()[:, -places:].double().square().mean().sqrt().item()


def temporal_of(plain: Any, steps: int, kind: str) -> Tensor:
    table = sincos(steps, plain.embed_dim, image_rms(plain))
    return (table if kind == "sincos" else torch.zeros_like(table)).to(next(plain.parameters()).dtype)


def tubelet_tokens(plain: Any, clips: Tensor, kernel: Tensor) -> Tensor:
    """(B, N, D): 2D convolutions of the frames, one for each frame of a tubelet; no Conv3d."""
    tubelet = kernel.shape[2]
    total: Any = 0
    for offset in range(tubelet):
        frames = clips[:, :, offset::tubelet].transpose(1, 2).flatten(0, 1)  # (B·t, C, H, W)
        total = total + F.conv2d(frames, kernel[:, :, offset], stride=plain.patch_embed.proj.stride)
    if plain.patch_embed.proj.bias is not None:
        total = total + plain.patch_embed.proj.bias[:, None, None]
    tokens = total.flatten(2).transpose(1, 2)  # (B·t, h·w, D)
    return plain.patch_embed.norm(tokens).unflatten(0, (clips.shape[0], -1)).flatten(1, 2)


def by_hand(
    plain: Any,
    clips: Tensor,
    selection: et.TokenSelection,
    *,
    tubelet: int = 2,
    temporal: str = "sincos",
    kernel: Tensor | None = None,
) -> SimpleNamespace:
    """timm's own blocks, norms, pooling and head on [prefix…, kept tokens with positions], one clip at a time.

    One clip at a time, so that rotary embeddings are what timm's blocks take for one image: (K, ·).
    """
    kernel = inflated(plain, tubelet) if kernel is None else kernel
    t, h, w = selection.grid
    tokens = tubelet_tokens(plain, clips, kernel)
    flat = torch.zeros(1, h, w, plain.embed_dim, dtype=tokens.dtype)
    positions = plain._pos_embed(flat if plain.dynamic_img_size else flat.flatten(1, 2))  # timm's, of empty tokens
    positions, rope = positions if isinstance(positions, tuple) else (positions, None)
    prefix = plain.num_prefix_tokens
    table = temporal_of(plain, t, temporal)
    entering, blocks, features = [], [], []
    for clip, (own, visible) in enumerate(zip(tokens, selection.visible, strict=True)):
        places, steps = visible % (h * w), visible // (h * w)
        source = visible if selection.steps is None else selection.steps[clip][steps] * (h * w) + places
        x = own[source] + positions[0, prefix:][places] + table[steps]
        x = torch.cat([positions[0, :prefix], x])[None]
        x = getattr(plain, "norm_pre", nn.Identity())(x)
        entering.append(x)
        outputs = []
        for index, block in enumerate(plain.blocks):
            own_rope = rope[index] if rope is not None and rope.ndim == 4 else rope  # mixed: another one in each block
            x = block(x) if rope is None else block(x, rope=own_rope[..., places, :])
            outputs.append(x)
        blocks.append(outputs)
        features.append(plain.norm(x))
    last = torch.cat(features)
    return SimpleNamespace(
        tokens=tokens,
        entering=torch.cat(entering),
        blocks=[torch.cat(outputs) for outputs in zip(*blocks, strict=True)],
        features=last,
        output=plain.forward_head(last),
    )


# Models are float64, so that what differs is wrong and not rounded; the temporal table may be float32's.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TIME = {"num_frames": 6, "tubelet_size": 2}  # 3 time steps, so 18 tokens


def patched_copy(plain: Any, selector: Any = None, **kwargs: Any) -> Any:
    return et.patch_videomae(copy.deepcopy(plain), selector, **{**TIME, **kwargs})


def build_clips(
    plain: Any, batch: int = 2, frames: int = 6, size: tuple[int, int] | None = None, seed: int = 1
) -> Tensor:
    """(batch, channels, frames, height, width) of the model's dtype."""
    shape = (batch, 3, frames, *(size or plain.patch_embed.img_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(plain.parameters()).dtype)


def static_clips(plain: Any, frames: int = 6) -> tuple[Tensor, Tensor]:
    """Images (2, C, H, W) and clips (2, C, T, H, W) that show nothing else."""
    images = build_clips(plain, frames=1)[:, :, 0]
    return images, images[:, :, None].expand(-1, -1, frames, -1, -1).contiguous()


def grid_of(plain: Any, clips: Tensor, tubelet: int = 2) -> tuple[int, int, int]:
    _, _, frames, height, width = clips.shape
    return frames // tubelet, height // plain.patch_embed.patch_size[0], width // plain.patch_embed.patch_size[1]


def random_selection(grid: tuple[int, int, int], kept: int = 7, batch: int = 2, seed: int = 3) -> et.TokenSelection:
    """Random tokens of every clip; made without the library's own selecting."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(math.prod(grid), generator=generator) for _ in range(batch)])
    return et.TokenSelection(order[:, :kept].sort(dim=1).values, None, grid)


def entering_block_0(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """What enters the first block in the one call of `model(x)`."""
    entered: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].detach().clone()))
    model(x, **kwargs)
    hook.remove()
    (only,) = entered
    return only
