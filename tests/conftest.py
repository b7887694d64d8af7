"""Tiny models and clips that every test file shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from scipy.stats import chisquare
from tiny_videomae import build_clips, build_model
from torch import Tensor

# First those whose trainings run in forked copies: autograd can't be forked once a test has had its threads started.
# Then what takes longest: begun late, one would keep a process busy while the others have nothing left.
FIRST = """
training own_data guards step_cost keep_ratios keep_ratio_budgets
contract_graphs contract_patching onnx notebook motion_accuracy contract compile_export distributed
documented_snippets checkpoint_files run_checkpoints cli_models packed contract_running movies space paper_figures flops
""".split()  # noqa: SIM905


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


settings.register_profile("everest", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("everest")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: threads cost more than they give


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def make_clips() -> Callable[..., Tensor]:
    return build_clips


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
