"""Pixels of chosen tubelets against plain slicing, their embedding and its gradients against a Conv3d."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from everest_tokens.tubelets import (
    TubeletSize,
    embed_chosen,
    gather_tokens,
    gather_tubelets,
    is_plain_conv3d,
    is_unhooked,
)

SHAPES = [  # (T, C, H, W), tubelet: never square in anything
    ((4, 3, 6, 8), TubeletSize(2, 3, 2)),
    ((3, 1, 4, 9), TubeletSize(1, 2, 3)),
    ((6, 4, 5, 4), TubeletSize(3, 5, 1)),
    ((4, 3, 7, 11), TubeletSize(2, 3, 4)),  # a row and three columns are left over
]
IDS = ["2x3x2", "1x2x3", "3x5x1", "cropped"]


def slice_tubelets(pixels: Tensor, index: Tensor, size: TubeletSize) -> Tensor:
    """(B, T, C, H, W) → (B, M, C, f, p, q), one slice at a time."""
    rows, columns = pixels.shape[3] // size.height, pixels.shape[4] // size.width
    clips = []
    for clip, positions in zip(pixels, index.tolist(), strict=True):
        blocks = []
        for position in positions:
            i, y, x = position // (rows * columns), position // columns % rows, position % columns
            top, left = y * size.height, x * size.width
            block = clip[i * size.frames : (i + 1) * size.frames, :, top : top + size.height, left : left + size.width]
            blocks.append(block.transpose(0, 1))
        clips.append(torch.stack(blocks))
    return torch.stack(clips)


def some_positions(shape: tuple[int, ...], size: TubeletSize, batch: int = 2, count: int = 5) -> Tensor:
    t, h, w = size.grid(shape[0], shape[2], shape[3])
    return torch.stack([torch.randperm(t * h * w)[:count].sort().values for _ in range(batch)])


def make_projection(channels: int, size: TubeletSize, features: int = 5, bias: bool = True, **kind: Any) -> nn.Conv3d:
    kernel = (size.frames, size.height, size.width)
    return nn.Conv3d(channels, features, kernel, stride=kernel, bias=bias, **kind)


def embed_clip(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, T, C, H, W) → (B, N, D), the host's own way."""
    return F.conv3d(pixels.transpose(1, 2), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def embed_all_then_gather(pixels: Tensor, index: Tensor, projection: nn.Conv3d) -> Tensor:
    return gather_tokens(embed_clip(pixels, projection.weight, projection.bias), index)


# Geometry


@pytest.mark.parametrize(
    ("size", "clip", "expected"),
    [
        (TubeletSize(2, 16, 16), (16, 224, 224), (8, 14, 14)),
        (TubeletSize(2, 16, 16), (24, 224, 224), (12, 14, 14)),
        (TubeletSize(1, 16, 16), (64, 224, 224), (64, 14, 14)),
        (TubeletSize(2, 16, 8), (4, 48, 64), (2, 3, 8)),
        (TubeletSize(2, 14, 14), (8, 230, 225), (4, 16, 16)),  # what a convolution leaves over
    ],
)
def test_grid(size: TubeletSize, clip: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert size.grid(*clip) == expected


def test_frames_that_make_no_grid() -> None:
    with pytest.raises(ValueError, match=r"15 frames.*tubelet_size 2"):
        TubeletSize(2, 16, 16).grid(15, 224, 224)
    with pytest.raises(ValueError, match=r"at least two time steps \(4 frames\), got 2"):
        TubeletSize(2, 16, 16).grid(2, 224, 224)


def test_gather_tokens() -> None:
    tokens, index = torch.randn(3, 7, 4), torch.tensor([[6, 0], [1, 1], [5, 2]])
    expected = torch.stack([tokens[b, row] for b, row in enumerate(index)])
    assert torch.equal(gather_tokens(tokens, index), expected)


# Pixels


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_tubelets_against_slices(shape: tuple[int, ...], size: TubeletSize) -> None:
    pixels = torch.randn(2, *shape)
    t, h, w = size.grid(shape[0], shape[2], shape[3])
    every = torch.arange(t * h * w).expand(2, -1)
    chosen = torch.tensor([[3, 0, 5, 3], [1, t * h * w - 1, 2, 2]])  # in any order, with repeats
    for index in (every, chosen):
        got = gather_tubelets(pixels, index, size)
        assert got.shape == (*index.shape, shape[1], size.frames, size.height, size.width)
        assert torch.equal(got, slice_tubelets(pixels, index, size))


def test_tubelets_of_a_clip_in_another_memory_order() -> None:
    shape, size = SHAPES[0]
    pixels = torch.randn(2, 3, 4, 6, 8).transpose(1, 2)  # a view of (B, C, T, H, W)
    index = some_positions(shape, size)
    assert torch.equal(gather_tubelets(pixels, index, size), slice_tubelets(pixels, index, size))


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_tubelets_pass_gradients_to_their_pixels_alone(shape: tuple[int, ...], size: TubeletSize) -> None:
    pixels = torch.randn(2, *shape, requires_grad=True)
    index = torch.tensor([[3, 0, 3], [1, 2, 5]])
    weight = torch.randn(2, 3, shape[1], size.frames, size.height, size.width)
    (got,) = torch.autograd.grad((gather_tubelets(pixels, index, size) * weight).sum(), pixels)
    (expected,) = torch.autograd.grad((slice_tubelets(pixels, index, size) * weight).sum(), pixels)
    torch.testing.assert_close(got, expected)
    assert (got == 0).any()


def test_tubelets_of_whole_numbers_keep_their_type() -> None:
    shape, size = SHAPES[0]
    pixels = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    index = some_positions(shape, size)
    got = gather_tubelets(pixels, index, size)
    assert got.dtype == torch.uint8
    assert torch.equal(got, slice_tubelets(pixels, index, size))


# Embedding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_value_and_gradients_of_an_embedding(shape: tuple[int, ...], size: TubeletSize, bias: bool) -> None:
    projection = make_projection(shape[1], size, bias=bias, dtype=torch.float64)
    pixels = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    index = some_positions(shape, size)
    trained = [x for x in (projection.weight, projection.bias, pixels) if x is not None]
    with torch.no_grad():
        embedded = embed_clip(pixels, projection.weight, projection.bias)

    got = embed_chosen(embedded, pixels, index, projection, size)
    expected = embed_all_then_gather(pixels, index, projection)
    assert torch.equal(got, gather_tokens(embedded, index))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, trained, upstream), torch.autograd.grad(expected, trained, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_accumulate_in_the_parameters() -> None:
    shape, size = SHAPES[0]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    for _ in range(2):
        embed_chosen(embedded, pixels, index, projection, size).square().sum().backward()
    got = [parameter.grad for parameter in projection.parameters()]
    once = torch.autograd.grad(
        embed_all_then_gather(pixels, index, projection).square().sum(), list(projection.parameters())
    )
    for mine, theirs in zip(got, once, strict=True):
        torch.testing.assert_close(mine, 2 * theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(bias: bool) -> None:
    size = TubeletSize(1, 2, 1)
    pixels = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 1, 2, 1, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, dtype=torch.float64, requires_grad=True) if bias else None
    index = torch.tensor([[0, 3], [1, 2]])

    def embed(pixels: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        embedded = embed_clip(pixels, weight, offset).detach()
        projection: Any = SimpleNamespace(weight=weight, bias=offset)
        return embed_chosen(embedded, pixels, index, projection, size)

    inputs = (pixels, weight, offset) if offset is not None else (pixels, weight)
    assert torch.autograd.gradcheck(embed, inputs)
    assert torch.autograd.gradgradcheck(embed, inputs)


@pytest.mark.parametrize("trained", ["weight", "bias", "pixels"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    shape, size = SHAPES[0]
    projection = make_projection(3, size).requires_grad_(False)
    pixels, index = torch.randn(2, *shape), some_positions(shape, size)
    tensors = {**dict(projection.named_parameters()), "pixels": pixels}
    tensors[trained].requires_grad_()
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    got = embed_chosen(embedded, pixels, index, projection, size)
    (expected,) = torch.autograd.grad(embed_all_then_gather(pixels, index, projection).square().sum(), tensors[trained])
    got.square().sum().backward()
    torch.testing.assert_close(tensors[trained].grad, expected)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]


def test_nothing_trained_or_no_grad_builds_no_graph() -> None:
    shape, size = SHAPES[0]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    expected = gather_tokens(embedded, index)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:  # no pixel is looked at, so that none need be there
            got = embed_chosen(embedded, torch.empty(0), index, projection, size)
        assert not got.requires_grad
        assert torch.equal(got, expected)
    frozen = embed_chosen(embedded, pixels, index, projection.requires_grad_(False), size)
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


def test_pixels_that_were_not_chosen_do_not_matter() -> None:
    shape, size = SHAPES[3]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    probe = pixels.clone().requires_grad_()
    (chosen,) = torch.autograd.grad(slice_tubelets(probe, index, size).sum(), probe)
    poisoned = torch.where(chosen > 0, pixels, torch.nan)
    assert poisoned.isnan().any()
    got = embed_chosen(embedded, poisoned, index, projection, size)
    expected = embed_all_then_gather(pixels, index, projection)
    parameters = list(projection.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    """Both paths round; they may differ by no more than rounding, and types must be those of a Conv3d."""
    shape, size = SHAPES[0]
    stored = torch.float32 if autocast else dtype
    projection = make_projection(3, size, dtype=stored)
    pixels = torch.randn(2, *shape, dtype=stored, requires_grad=True)
    index = some_positions(shape, size)
    trained = [*projection.parameters(), pixels]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        with torch.no_grad():
            embedded = embed_clip(pixels, projection.weight, projection.bias)
        torch.clear_autocast_cache()
        got = embed_chosen(embedded, pixels, index, projection, size)
    assert got.dtype == dtype
    upstream = torch.randn_like(got)
    mine = torch.autograd.grad(got, trained, upstream)
    assert [gradient.dtype for gradient in mine] == [stored] * 3

    exact = make_projection(3, size, dtype=torch.float64)
    exact.load_state_dict(projection.state_dict())
    wide = pixels.detach().double().requires_grad_()
    expected = embed_all_then_gather(wide, index, exact)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
    theirs = torch.autograd.grad(expected, [*exact.parameters(), wide], upstream.double())
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0.02, atol=0.03)


def test_backward_keeps_the_chosen_pixels_in_the_type_of_autocast() -> None:
    shape, size = SHAPES[0]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach().bfloat16()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x.detach(), lambda x: x):  # type: ignore[func-returns-value]
        out = embed_chosen(embedded, pixels, index, projection, size)
    assert out.requires_grad
    others = [x for x in kept if x.data_ptr() != projection.weight.data_ptr()]
    assert sum(x.nbytes for x in others) == index.numel() * 3 * 2 * 3 * 2 * 2  # of two bytes each


# Which projections the known value may stand in for


class LoggedConv3d(nn.Conv3d):
    pass


def with_hook(conv: nn.Conv3d, register: str) -> nn.Conv3d:
    getattr(conv, register)(lambda *_: None)
    return conv


def with_own_forward(conv: nn.Conv3d) -> nn.Conv3d:
    conv.forward = lambda x: 2 * nn.Conv3d.forward(conv, x)  # type: ignore[method-assign,assignment]
    return conv


def with_parametrisation(conv: nn.Conv3d) -> nn.Conv3d:
    return parametrize.register_parametrization(conv, "weight", nn.Tanh())  # type: ignore[return-value]


def plain() -> nn.Conv3d:
    return nn.Conv3d(1, 1, 1)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (plain(), True),
        (nn.Conv3d(1, 1, 1, bias=False, dtype=torch.bfloat16).requires_grad_(False), True),
        (LoggedConv3d(1, 1, 1), False),
        (nn.Sequential(plain()), False),
        (nn.Conv2d(1, 1, 1), False),
        (with_hook(plain(), "register_forward_hook"), False),
        (with_hook(plain(), "register_forward_pre_hook"), False),
        (with_hook(plain(), "register_full_backward_hook"), False),
        (with_hook(plain(), "register_full_backward_pre_hook"), False),
        (with_own_forward(plain()), False),
        (with_parametrisation(plain()), False),
        (prune.identity(plain(), "weight"), False),
    ],
)
def test_a_plain_conv3d(module: nn.Module, known: bool) -> None:
    assert is_plain_conv3d(module) is known


def test_a_removed_hook_leaves_a_plain_conv3d() -> None:
    conv = plain()
    handle = conv.register_forward_hook(lambda *_: None)
    assert not is_unhooked(conv)
    handle.remove()
    assert is_unhooked(conv)
