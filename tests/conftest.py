"""Tiny models and clips that every test file shares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from scipy.stats import chisquare
from torch import Tensor
from transformers import VideoMAEConfig

settings.register_profile("everest", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("everest")

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: threads cost more than they give


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def make_clips() -> Callable[..., Tensor]:
    return build_clips


ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="session")
def same_to_rounding() -> Callable[[Any, Any], None]:
    """Assert that two tensors, or sequences of them, differ by no more than rounding, relative to the largest value.

    What a patched model computes in another order than an unpatched one (its embedding is a product, no convolution)
    is the same in float64 to 1e-12, which is what proves it; narrower types may only add their own rounding.
    """

    def check(actual: Any, expected: Any) -> None:
        if isinstance(expected, Tensor):
            assert actual.dtype == expected.dtype
            assert actual.shape == expected.shape
            bound = ROUNDING[expected.dtype] * float(expected.detach().abs().max())
            difference = float((actual.detach().double() - expected.detach().double()).abs().max())
            assert difference <= bound, f"differs by {difference:.3g}, allowed {bound:.3g}"
            return
        for one, other in zip(actual, expected, strict=True):
            check(one, other)

    return check


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def check_indices() -> Callable[[Tensor, int, int, int], None]:
    """Assert int64 (batch, count), each row ascending without repeats within 0…total−1."""

    def check(indices: Tensor, batch: int, count: int, total: int) -> None:
        assert indices.dtype == torch.int64
        assert tuple(indices.shape) == (batch, count)
        assert indices.diff(dim=1).gt(0).all()
        assert indices.min() >= 0
        assert indices.max() < total

    return check


@pytest.fixture(scope="session")
def check_frequencies() -> Callable[[Tensor, dict[tuple[int, ...], float]], None]:
    """Assert that the rows of (draws, k) come as often as their exact probabilities say (χ², p > 0.001)."""

    def check(rows: Tensor, probability: dict[tuple[int, ...], float]) -> None:
        assert sum(probability.values()) == pytest.approx(1)
        found, counts = torch.unique(rows, dim=0, return_counts=True)
        observed = {tuple(row): count for row, count in zip(found.tolist(), counts.tolist(), strict=True)}
        possible = {row: len(rows) * p for row, p in probability.items() if p > 0}
        assert set(observed) <= set(possible)
        assert min(possible.values()) >= 5  # what the χ² approximation asks for
        if len(possible) > 1:
            result = chisquare([observed.get(row, 0) for row in possible], list(possible.values()))
            assert result.pvalue > 1e-3, f"observed {observed}, expected {possible}"

    return check


@pytest.fixture(scope="session")
def generator() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def global_rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """A context that fails where torch's default generator doesn't stand at its end as at its beginning."""

    @contextmanager
    def untouched() -> Iterator[None]:
        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before)

    return untouched
