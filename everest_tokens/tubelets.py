"""Tubelets: the grid of a clip, the pixels of chosen tubelets, and their embedding without touching the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

Grid = tuple[int, int, int]  # (t, h, w): time steps, rows and columns of tokens; positions run t-major


@dataclass(frozen=True)
class TubeletSize:
    """Frames × rows × columns of one tubelet, the kernel and the stride of the tubelet embedding."""

    frames: int
    height: int
    width: int

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """(t, h, w) of a clip. Raises ValueError where the frames don't divide into tubelets or make fewer than two."""
        if frames % self.frames:
            raise ValueError(f"{frames} frames are not divisible by tubelet_size {self.frames}")
        if frames // self.frames < 2:
            raise ValueError(f"expected at least two time steps ({2 * self.frames} frames), got {frames} frames")
        return frames // self.frames, height // self.height, width // self.width


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D), index (B, M) → (B, M, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _blocks(pixels: Tensor, size: TubeletSize) -> Tensor:
    """(B, T, C, H, W) → a view (B, t, h, w, C, frames, height, width) without what a convolution leaves over."""
    rows, columns = pixels.shape[-2] // size.height, pixels.shape[-1] // size.width
    return rearrange(
        pixels[..., : rows * size.height, : columns * size.width],
        "b (t f) c (h p) (w q) -> b t h w c f p q",
        f=size.frames,
        p=size.height,
        q=size.width,
    )


def unfold_tubelets(pixels: Tensor, size: TubeletSize) -> Tensor:
    """The pixels of every tubelet, differentiable: what a product with the flattened kernel embeds.

    Args:
        pixels: (B, T, C, H, W). Under autocast they are cast first, so that half as many bytes are moved.

    Returns:
        (B, N, C·frames·height·width), t-major, a Conv3d kernel's order within each.
    """
    return _blocks(_as_autocast(pixels), size).flatten(4).flatten(1, 3)


def _as_autocast(pixels: Tensor) -> Tensor:
    """What autocast would make of a product's operand; it leaves float64 alone and doesn't know the meta device."""
    if pixels.dtype == torch.float64 or pixels.is_meta:
        return pixels
    device = pixels.device.type
    return pixels.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else pixels


def gather_tubelets(pixels: Tensor, index: Tensor, size: TubeletSize) -> Tensor:
    """The pixels of chosen tubelets, differentiable, reading no others.

    Args:
        pixels: (B, T, C, H, W).
        index: (B, M) int64, positions in the t-major grid of the clip.

    Returns:
        (B, M, C, frames, height, width): a Conv3d kernel's order.
    """
    blocks = _blocks(pixels, size)
    rows, columns = blocks.shape[2:4]
    clip = torch.arange(blocks.shape[0], device=index.device).unsqueeze(1)
    place = index % (rows * columns)
    return blocks[clip, index // (rows * columns), place // columns, place % columns]


class _KnownProjection(torch.autograd.Function):
    """patches · Wᵀ + b whose value is already known: forward gathers it, backward is the linear layer's own.

    The clip was embedded once, without grad, to score its tokens. Embedding the visible ones again would cost a second
    product, embedding the clip with grad a weight gradient over every token; this costs neither.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(embedded: Tensor, index: Tensor, patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return gather_tokens(embedded, index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, _, patches, weight, bias = inputs
        ctx.save_for_backward(patches if ctx.needs_input_grad[3] else None, weight)
        ctx.patches_dtype = patches.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        patches, weight = ctx.saved_tensors
        grad_patches = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_patches = (grad @ weight.flatten(1).to(grad.dtype)).to(ctx.patches_dtype)
        if ctx.needs_input_grad[3]:
            flat = grad.flatten(0, 1).T @ patches.flatten(0, 1).to(grad.dtype)
            grad_weight = flat.view_as(weight).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            grad_bias = grad.sum(dim=(0, 1)).to(ctx.bias_dtype)
        return None, None, grad_patches, grad_weight, grad_bias


def only_tiles(module: nn.Module, size: TubeletSize) -> bool:
    """Whether a module is exactly an nn.Conv3d that embeds each tubelet by itself, and whose call does nothing else.

    An nn.Conv2d does for tubelets of one frame. Then kernel and stride are the tubelet, and nothing is padded, dilated
    or grouped. An adapter (LoRA), a parametrisation or an FSDP unit is of another type or wraps it; hooks and an
    instance-level forward may change what goes in or comes out.
    """
    kernel: tuple[int, ...] = (size.frames, size.height, size.width)
    if type(module) is nn.Conv2d and size.frames == 1:
        kernel = kernel[1:]
    elif type(module) is not nn.Conv3d:
        return False
    return (
        is_unhooked(module)
        and module.kernel_size == module.stride == kernel
        and module.padding in ((0,) * len(kernel), "valid")
        and module.dilation == (1,) * len(kernel)
        and module.groups == 1
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward alone, no hook of its own nor one on every module."""
    heard = [getattr(module, name) or getattr(every_module, f"_global{name}") for name in _HOOKS]
    return "forward" not in module.__dict__ and not any(heard)


def embed_tubelets(tubelets: Tensor, projection: nn.Conv3d | nn.Conv2d) -> Tensor:
    """Embed unfolded tubelets as one product, without grad: to score them, and to take the chosen ones from.

    cuDNN has no good kernel for a convolution whose stride is its kernel: on a GPU the product is 9 times as fast.

    Args:
        tubelets: (B, N, C·frames·height·width), of `unfold_tubelets`.
        projection: the convolution that `only_tiles`.

    Returns:
        (B, N, D).
    """
    # Detached, not under no_grad: autocast keeps the casts of parameters, and one made without grad would be taken by a
    # product with grad.
    bias = None if projection.bias is None else projection.bias.detach()
    return nn.functional.linear(tubelets.detach(), projection.weight.detach().flatten(1), bias)


def embed_chosen(embedded: Tensor, tubelets: Tensor, index: Tensor, projection: nn.Conv3d | nn.Conv2d) -> Tensor:
    """The embeddings of the chosen tubelets, with the gradient that embedding them alone would give.

    Args:
        embedded: (B, N, D), of `embed_tubelets`.
        tubelets: (B, N, C·frames·height·width), what it embedded.
        index: (B, M) int64, positions in the clip's grid.
        projection: the convolution that `only_tiles`.

    Returns:
        (B, M, D). Its backward sees the chosen tubelets' pixels and no others.
    """
    trained = (projection.weight, projection.bias, tubelets)
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained)
    if not wants_grad or torch.onnx.is_in_onnx_export():  # the older exporter would bake the batch into an indexing
        return gather_tokens(embedded, index)
    # Indexed, because `gather` would keep all tubelets until backward where the pixels want a gradient; in autocast's
    # dtype, so that what is saved is as small as autocast makes it.
    patches = tubelets[torch.arange(index.shape[0], device=index.device).unsqueeze(1), index]
    # A trace can't be saved with a function of Python's in it, and one with a rule for forward mode can't be compiled.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if torch.jit.is_tracing() or forward_mode:
        return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)
    return _KnownProjection.apply(embedded, index, patches, projection.weight, projection.bias)
