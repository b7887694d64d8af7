"""S(·,·) against hand-worked numbers, float64 references and every kind of finite input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everest_tokens.distances import DISTANCES, cka, cosine, l1, l2

LEAST = {"l2": 0.0, "l1": 0.0, "cosine": -1.0, "cka": -1.0}
MOST = {"l2": math.inf, "l1": math.inf, "cosine": 1.0, "cka": 0.0}
NAMES = sorted(LEAST)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

TINY, HUGE = 2.0**-149, torch.finfo(torch.float32).max  # float32's smallest subnormal, its largest number
SPECIAL = [0.0, -0.0, 1.0, TINY, -TINY, 1.17e-38, 6e-8, 65504.0, 3.38e38, HUGE, -HUGE, 1e300, -1.7e308, 5e-324]
elements = (
    st.sampled_from(SPECIAL)
    | st.floats(width=16, allow_nan=False, allow_infinity=False)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.floats(width=64, allow_nan=False, allow_infinity=False)
)
pairs = st.integers(1, 9).flatmap(
    lambda size: st.tuples(*[st.lists(elements, min_size=size, max_size=size)] * 2),
)


def finite(values: list[float], dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, those beyond its range as its largest number."""
    limit = torch.finfo(dtype).max
    return torch.tensor(values, dtype=torch.float64).clamp(-limit, limit).to(dtype)


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA by its definition (Cortes et al., 2012; Kornblith et al., 2019): D samples of one feature each."""
    size = len(x)
    centring = np.eye(size) - np.ones((size, size)) / size
    kernel, other = (centring @ np.outer(v, v) @ centring for v in (x, y))

    def hsic(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.trace(p @ q)) / (size - 1) ** 2

    return hsic(kernel, other) / math.sqrt(hsic(kernel, kernel) * hsic(other, other))


def test_the_four_distances_are_found_by_the_names_of_the_contract():
    assert {"l2": l2, "l1": l1, "cosine": cosine, "cka": cka} == DISTANCES


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("l2", [3, 4, 0], [0, 0, 0], 5.0),
        ("l2", [1, 2, 3], [1, 0, 5], math.sqrt(8)),
        ("l2", [-1, -1], [1, 1], math.sqrt(8)),
        ("l1", [1, -2, 3], [0, 2, 5], 7.0),
        ("l1", [-1, 1], [1, -1], 4.0),
        ("cosine", [1, 0], [1, 1], -1 / math.sqrt(2)),
        ("cosine", [3, 4], [4, 3], -0.96),
        ("cosine", [3, 4], [-4, -3], 0.96),
        ("cosine", [1, 0], [0, 7], 0.0),
        ("cosine", [2, 2], [-5, -5], 1.0),
        ("cosine", [1, 2], [10, 20], -1.0),
        ("cka", [1, 2, 3], [1, 3, 2], -0.25),  # correlation 1/2
        ("cka", [1, 2, 3], [6, 4, 2], -1.0),  # correlation -1: CKA doesn't tell the sign
        ("cka", [1, 2, 3], [5, 7, 9], -1.0),
        ("cka", [1, 2, 3], [1, 0, 1], 0.0),  # uncorrelated
        ("cka", [1, 2, 3, 4], [1, 3, 2, 5], -(5.5**2) / (5 * 8.75)),
    ],
)
def test_hand_worked(name, a, b, expected):
    x, y = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    for first, second in ((x, y), (y, x)):
        value = DISTANCES[name](first, second)
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected, abs=2e-7, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_random_vectors_against_float64_references(name):
    a, b = torch.randn(2, 3, 5, 32).unbind(0)
    got = DISTANCES[name](a, b)
    references = {
        "l2": lambda x, y: math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y, strict=True))),
        "l1": lambda x, y: sum(abs(p - q) for p, q in zip(x, y, strict=True)),
        "cosine": lambda x, y: -float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)),
        "cka": lambda x, y: -hsic_cka(x, y),
    }
    assert got.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = references[name](a[i, j].double().numpy(), b[i, j].double().numpy())
            assert got[i, j].item() == pytest.approx(expected, abs=1e-6, rel=1e-5)


def test_cka_is_the_squared_pearson_correlation_of_an_embedding_with_an_offset():
    a = torch.randn(64, 768) + 30
    b = 0.4 * a + torch.randn(64, 768) - 50
    expected = [-(np.corrcoef(x, y)[0, 1] ** 2) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    torch.testing.assert_close(cka(a, b).double(), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "cka"])
@pytest.mark.parametrize(("down", "up"), [(2.0**-147, 2.0**125), (2.0**-70, 2.0**-70), (2.0**120, 2.0**120)])
def test_scale_free_distances_stay_right_where_squares_leave_float32(name, down, up):
    a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, 3.0, 0.0])
    # Centred they are (2, 5, -7) / 3 and (5, 2, -7) / 3: correlated by (10 + 10 + 49) / (4 + 25 + 49).
    expected = {"cosine": -24 / 25, "cka": -((69 / 78) ** 2)}[name]
    assert DISTANCES[name](a * down, b * up).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(values=st.lists(elements, min_size=1, max_size=9), dtype=st.sampled_from(DTYPES))
def test_equal_vectors_give_exactly_the_least(name, values, dtype):
    x = finite(values, dtype)
    assert DISTANCES[name](x, x.clone()).item() == LEAST[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20, 1e37])
def test_equal_embeddings_give_exactly_the_least_and_no_others_less(name, scale):
    x = torch.randn(500, 48) * scale
    assert DISTANCES[name](x, x.clone()).tolist() == [LEAST[name]] * 500
    for factor in (3.0, 0.7, -3.0):  # rounding would leave the range
        value = DISTANCES[name](x, factor * x)
        assert value.min() >= LEAST[name]
        assert value.max() <= MOST[name]


@pytest.mark.parametrize("name", NAMES)
@given(pair=pairs, dtype=st.sampled_from(DTYPES))
def test_finite_input_never_gives_nan_nor_leaves_the_range(name, pair, dtype):
    a, b = (finite(values, dtype) for values in pair)
    value = DISTANCES[name](a, b)
    assert value.dtype == torch.float32
    assert LEAST[name] <= value.item() <= MOST[name]  # False for NaN


@pytest.mark.parametrize("name", NAMES)
def test_a_signed_zero_is_a_zero(name):
    plus, minus = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([-0.0, 0.0, 2.0])
    assert DISTANCES[name](plus, minus).item() == LEAST[name]
    assert DISTANCES[name](torch.zeros(3), -torch.zeros(3)).item() == LEAST[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_result_of_zero_has_no_sign(name):
    # Radix sorts, as on CUDA, rank -0.0 below 0.0, which would break ties by something else than the index.
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [3.0, 3.0]])
    values = torch.cat([DISTANCES[name](a[i].expand_as(a), a) for i in range(len(a))])
    assert (values == 0).any()
    assert not values[values == 0].signbit().any()


@pytest.mark.parametrize("zero", [[0.0, 0.0], [-0.0, 0.0]])
@pytest.mark.parametrize("other", [[1.0, 0.0], [-2.0, 5.0], [TINY, 0.0], [HUGE, HUGE]])
def test_cosine_with_a_zero_vector_is_most_changed(zero, other):
    a, b = torch.tensor(zero), torch.tensor(other)
    assert cosine(a, b).item() == cosine(b, a).item() == 1.0


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 1e30, TINY])
@pytest.mark.parametrize("size", [2, 3, 7, 768])
def test_cka_of_a_constant_vector_is_most_changed(constant, size):
    flat = torch.full((size,), constant)  # the mean of seven 0.1 isn't 0.1 in float32
    for other in (torch.arange(size).float(), torch.randn(size), torch.full((size,), constant + 1)):
        if not torch.equal(flat, other):
            assert cka(flat, other).item() == cka(other, flat).item() == 0.0


def test_cka_of_one_feature_knows_only_equal_and_different():
    assert cka(torch.tensor([[2.0], [2.0]]), torch.tensor([[2.0], [3.0]])).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_undefined_and_equal_rows_do_not_touch_their_neighbours(name):
    a = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    b = torch.tensor([[1.0, 2.0, 3.0], [4.0, 3.0, 0.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    assert DISTANCES[name](a, b).tolist() == [DISTANCES[name](x, y).item() for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_is_computed_in_float32(name, dtype):
    a, b = torch.randn(2, 40, 24, dtype=torch.float64).to(dtype).unbind(0)
    assert torch.equal(DISTANCES[name](a, b), DISTANCES[name](a.float(), b.float()))


@pytest.mark.parametrize("name", NAMES)
def test_larger_means_more_changed(name):
    a = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(4, 4)
    b = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3.5, 4], [1, 2, 5, 3], [4, 1, -3, 0]])  # further and further away
    value = DISTANCES[name](a, b)
    if name == "cka":  # correlations 1, .98, .68, -.72: the square of the last is the larger again
        value = value[:3]
    assert value.diff().gt(0).all()
