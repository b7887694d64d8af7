"""Pixels of tubelets against plain slicing, their embedding and its gradients against a Conv3d."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from everest_tokens.selectors import ReRoSelector
from everest_tokens.tubelets import (
    TubeletSize,
    embed_chosen,
    embed_tubelets,
    gather_tokens,
    gather_tubelets,
    only_tiles,
    unfold_tubelets,
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


def test_grid():
    assert TubeletSize(2, 16, 16).grid(24, 224, 224) == (12, 14, 14)
    assert TubeletSize(1, 16, 16).grid(64, 224, 224) == (64, 14, 14)
    assert TubeletSize(2, 16, 8).grid(4, 48, 64) == (2, 3, 8)
    assert TubeletSize(2, 14, 14).grid(8, 230, 225) == (4, 16, 16)  # a convolution leaves the rest over


def test_frames_that_make_no_grid():
    with pytest.raises(ValueError, match=r"15 frames.*tubelet_size 2"):
        TubeletSize(2, 16, 16).grid(15, 224, 224)
    with pytest.raises(ValueError, match=r"at least two time steps \(4 frames\), got 2"):
        TubeletSize(2, 16, 16).grid(2, 224, 224)


def test_gather_tokens():
    tokens, index = torch.randn(3, 7, 4), torch.tensor([[6, 0], [1, 1], [5, 2]])
    expected = torch.stack([tokens[b, row] for b, row in enumerate(index)])
    assert torch.equal(gather_tokens(tokens, index), expected)


# Pixels


@pytest.mark.parametrize("kind", ["float32", "uint8", "a view of (B, C, T, H, W)"])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_tubelets_against_slices(shape, size, kind):
    pixels = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    pixels = pixels if kind == "uint8" else pixels.float()
    if kind.startswith("a view"):
        pixels = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    total = math.prod(size.grid(shape[0], shape[2], shape[3]))
    every = torch.arange(total).expand(2, -1)
    chosen = torch.tensor([[3, 0, 5, 3], [1, total - 1, 2, 2]])  # in any order, with repeats
    for index in (every, chosen):
        got = gather_tubelets(pixels, index, size)
        assert got.shape == (*index.shape, shape[1], size.frames, size.height, size.width)
        assert got.dtype == pixels.dtype
        assert torch.equal(got, slice_tubelets(pixels, index, size))
    assert torch.equal(unfold_tubelets(pixels, size), slice_tubelets(pixels, every, size).flatten(2))


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_tubelets_pass_gradients_to_their_pixels_alone(shape, size):
    pixels = torch.randn(2, *shape, requires_grad=True)
    index = torch.tensor([[3, 0, 3], [1, 2, 5]])
    weight = torch.randn(2, 3, shape[1], size.frames, size.height, size.width)
    (got,) = torch.autograd.grad((gather_tubelets(pixels, index, size) * weight).sum(), pixels)
    (expected,) = torch.autograd.grad((slice_tubelets(pixels, index, size) * weight).sum(), pixels)
    torch.testing.assert_close(got, expected)
    assert (got == 0).any()


def test_unfolded_tubelets_have_the_type_of_autocast():
    shape, size = SHAPES[0]
    pixels = torch.randn(2, *shape)
    plain = unfold_tubelets(pixels, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(unfold_tubelets(pixels, size), plain.bfloat16())
        assert unfold_tubelets(pixels.double(), size).dtype == torch.float64  # autocast leaves it alone
        assert unfold_tubelets(pixels.to("meta"), size).dtype == torch.float32  # which knows no autocast


# Embedding


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_the_product_is_the_convolution(shape, size, bias, dtype, rounding, memory):
    projection = make_projection(shape[1], size, bias=bias, dtype=dtype).to(memory_format=memory)
    pixels = torch.randn(2, *shape, dtype=dtype)
    got = embed_tubelets(unfold_tubelets(pixels, size), projection)
    exact = projection.double()
    expected = embed_clip(pixels.double(), exact.weight, exact.bias).detach()
    assert got.dtype == dtype
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=rounding * float(expected.abs().max()))


def test_the_product_does_the_work_of_the_convolution():
    """At a ViT-B's size, by torch's own counter: a product with something else would cost something else."""
    size = TubeletSize(2, 16, 16)
    projection = make_projection(3, size, 768).to("meta")
    pixels = torch.empty(1, 16, 3, 224, 224, device="meta")
    counts = []
    for embed in (
        lambda: embed_tubelets(unfold_tubelets(pixels, size), projection),
        lambda: projection(pixels.transpose(1, 2)),
    ):
        with FlopCounterMode(display=False) as counter:
            embed()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 1568 * 1536 * 768] * 2


def test_the_product_leaves_nothing_in_the_cache_of_autocast():
    """A cast made without grad that autocast kept would cut the gradient of the projection's next own call."""
    shape, size = SHAPES[0]
    projection, pixels = make_projection(3, size), torch.randn(2, *shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embed_tubelets(unfold_tubelets(pixels, size), projection)
        projection(pixels.transpose(1, 2)).float().sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


def test_kept_tokens_differ_from_the_convolutions_by_rounding_alone():
    """In float64 the same tokens; in float32 only tokens whose importances are closer than rounding change places."""
    size, grid = TubeletSize(2, 4, 4), (8, 8, 8)
    projection, selector = make_projection(3, size, 32), ReRoSelector(0.3)
    pixels = torch.randn(4, 16, 3, 32, 32)
    single = [
        embed_tubelets(unfold_tubelets(pixels, size), projection),
        embed_clip(pixels, projection.weight, projection.bias).detach(),
    ]
    exact = projection.double()
    double = [
        embed_tubelets(unfold_tubelets(pixels.double(), size), exact),
        embed_clip(pixels.double(), exact.weight, exact.bias).detach(),
    ]
    expected = selector(double[0], grid)
    assert torch.equal(expected, selector(double[1], grid))

    steps = double[1].unflatten(1, (grid[0], -1))  # importance by hand: Eq. 2 in float64
    change = (steps[:, 1:] - steps[:, :-1]).norm(dim=-1)
    importance = torch.cat([change[:, :1], change], dim=1).flatten(1)
    least = importance.gather(1, expected).amin(dim=1)
    for tokens in single:
        for clip, kept in enumerate(selector(tokens, grid)):
            others = sorted(set(kept.tolist()) ^ set(expected[clip].tolist()))
            assert (importance[clip, others] - least[clip]).abs().le(1e-5 * least[clip]).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=IDS)
def test_value_and_gradients_of_an_embedding(shape, size, bias):
    projection = make_projection(shape[1], size, bias=bias, dtype=torch.float64)
    pixels = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    index = some_positions(shape, size)
    trained = [x for x in (projection.weight, projection.bias, pixels) if x is not None]
    with torch.no_grad():
        embedded = embed_clip(pixels, projection.weight, projection.bias)

    got = embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection)
    expected = embed_all_then_gather(pixels, index, projection)
    assert torch.equal(got, gather_tokens(embedded, index))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, trained, upstream), torch.autograd.grad(expected, trained, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(bias):
    size = TubeletSize(1, 2, 1)
    pixels = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 1, 2, 1, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, dtype=torch.float64, requires_grad=True) if bias else None
    index = torch.tensor([[0, 3], [1, 2]])

    def embed(pixels: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        embedded = embed_clip(pixels, weight, offset).detach()
        projection: Any = SimpleNamespace(weight=weight, bias=offset)
        return embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection)

    inputs = (pixels, weight, offset) if offset is not None else (pixels, weight)
    assert torch.autograd.gradcheck(embed, inputs)
    assert torch.autograd.gradgradcheck(embed, inputs)


@pytest.mark.parametrize("trained", ["weight", "bias", "pixels"])
def test_only_what_is_trained_gets_a_gradient(trained):
    shape, size = SHAPES[0]
    projection = make_projection(3, size).requires_grad_(False)
    pixels, index = torch.randn(2, *shape), some_positions(shape, size)
    tensors = {**dict(projection.named_parameters()), "pixels": pixels}
    tensors[trained].requires_grad_()
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    got = embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection)
    (expected,) = torch.autograd.grad(embed_all_then_gather(pixels, index, projection).square().sum(), tensors[trained])
    got.square().sum().backward()
    torch.testing.assert_close(tensors[trained].grad, expected)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]


def test_nothing_trained_or_no_grad_builds_no_graph():
    shape, size = SHAPES[0]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach()
    expected = gather_tokens(embedded, index)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:  # no pixel is looked at, so that none need be there
            got = embed_chosen(embedded, torch.empty(0), index, projection)
        assert not got.requires_grad
        assert torch.equal(got, expected)
    frozen = embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection.requires_grad_(False))
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, autocast):
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
        got = embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection)
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


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def test_backward_keeps_the_chosen_pixels_in_the_type_of_autocast():
    shape, size = SHAPES[0]
    projection, pixels, index = make_projection(3, size), torch.randn(2, *shape), some_positions(shape, size)
    embedded = embed_clip(pixels, projection.weight, projection.bias).detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), saved_for_backward() as kept:
        out = embed_chosen(embedded, unfold_tubelets(pixels, size), index, projection)
    assert out.requires_grad
    others = [x for x in kept if x.data_ptr() != projection.weight.data_ptr()]
    assert sum(x.nbytes for x in others) == index.numel() * 3 * 2 * 3 * 2 * 2  # of two bytes each


def test_backward_keeps_no_copy_of_the_clip():
    """Not even where the pixels want a gradient: indices, the chosen tubelets and the kernel are all that it needs."""
    size = TubeletSize(2, 4, 4)
    projection, pixels = make_projection(3, size), torch.randn(2, 8, 3, 32, 32, requires_grad=True)
    with saved_for_backward() as kept:
        tubelets = unfold_tubelets(pixels, size)
        out = embed_chosen(embed_tubelets(tubelets, projection), tubelets, torch.tensor([[1], [1]]), projection)
    assert out.requires_grad
    assert max(x.untyped_storage().nbytes() for x in kept) <= projection.weight.nbytes


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


def plain(**kind: Any) -> nn.Conv3d:
    return nn.Conv3d(**{"in_channels": 2, "out_channels": 2, "kernel_size": (2, 3, 4), "stride": (2, 3, 4), **kind})


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (plain(), True),
        (plain(bias=False, dtype=torch.bfloat16).requires_grad_(False), True),
        (plain(padding="valid"), True),
        (plain(stride=(2, 3, 2)), False),  # overlapping
        (plain(stride=(2, 3, 5)), False),
        (plain(kernel_size=(2, 4, 4), stride=(2, 4, 4)), False),  # tubelets of another size
        (plain(padding=(0, 0, 1)), False),
        (plain(kernel_size=1, stride=1, padding="same"), False),
        (plain(dilation=(1, 2, 1)), False),
        (plain(groups=2), False),
        (LoggedConv3d(2, 2, (2, 3, 4), (2, 3, 4)), False),
        (nn.Sequential(plain()), False),
        (nn.Conv2d(2, 2, (3, 4), (3, 4)), False),
        (with_hook(plain(), "register_forward_hook"), False),
        (with_hook(plain(), "register_forward_pre_hook"), False),
        (with_hook(plain(), "register_full_backward_hook"), False),
        (with_hook(plain(), "register_full_backward_pre_hook"), False),
        (with_own_forward(plain()), False),
        (with_parametrisation(plain()), False),
        (prune.identity(plain(), "weight"), False),
    ],
)
def test_only_a_plain_conv3d_over_whole_tubelets_only_tiles(module, known):
    assert only_tiles(module, TubeletSize(2, 3, 4)) is known
