"""InfoFrameSampler (§4.2) against the exact law of drawing one step after another without replacement."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everest_tokens import InfoFrameSampler


def exact_probabilities(counts: list[int], num_steps: int) -> dict[tuple[int, ...], float]:
    """Ascending set → probability, summed over every order in which it can be drawn."""
    total: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    for order in permutations(range(len(counts)), num_steps):
        probability, left = Fraction(1), dict(enumerate(counts))
        for step in order:
            remaining = sum(left.values())
            probability *= Fraction(left[step], remaining) if remaining else Fraction(1, len(left))
            del left[step]
        total[tuple(sorted(order))] += probability
    return {steps: float(probability) for steps, probability in total.items()}


def draw(counts: list[int], num_steps: int, draws: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return InfoFrameSampler()(torch.tensor(counts, dtype=dtype).expand(draws, -1), num_steps)


def test_the_reference_by_hand():
    # {0, 1} of 1:2:3 comes as 0 then 1 (1/6 · 2/5) or as 1 then 0 (2/6 · 1/4).
    assert exact_probabilities([1, 2, 3], 2)[0, 1] == pytest.approx(1 / 15 + 1 / 12)
    assert exact_probabilities([4, 0, 0], 2) == {(0, 1): 0.5, (0, 2): 0.5, (1, 2): 0}


@pytest.mark.parametrize(
    ("counts", "num_steps"),
    [
        ([1, 2, 3], 1),
        ([1, 2, 3], 2),
        ([10, 1, 1, 4], 2),
        ([196, 30, 30, 5, 60], 3),
        ([3, 1, 4, 1, 5, 9], 4),
        ([3, 0, 1, 6], 2),  # the empty step is never drawn
        ([4, 0, 2, 0, 0], 3),  # two certain, the third uniform over the empty
        ([0, 0, 7, 0, 0], 3),
        ([0, 0, 0, 0], 2),  # a static candidate clip beyond the first steps
        ([5, 5, 5, 5, 5], 3),
        ([2, 2, 6, 6], 3),
        ([5, 3, 2], 3),  # nothing to choose
        ([0, 1, 0, 12_544, 0], 2),  # a rare step still comes before an empty one
    ],
)
def test_draws_come_as_often_as_the_law_says(counts, num_steps, check_frequencies):
    for dtype in (torch.int64, torch.float32):
        check_frequencies(draw(counts, num_steps, 20_000, dtype), exact_probabilities(counts, num_steps))


def test_each_clip_follows_its_own_counts_independently(check_frequencies):
    counts = torch.tensor([[1, 2, 3], [7, 2, 1]]).repeat(20_000, 1)
    drawn = InfoFrameSampler()(counts, 1).view(-1, 2)
    joint = {(p, q): [1, 2, 3][p] / 6 * [7, 2, 1][q] / 10 for p in range(3) for q in range(3)}
    check_frequencies(drawn, joint)


@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 196, 12_544]), min_size=1, max_size=24),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_empty_steps_come_only_after_all_others(counts, seed, data):
    num_steps = data.draw(st.integers(1, len(counts)))
    repeated = torch.tensor(counts).expand(50, -1)
    drawn = InfoFrameSampler()(repeated, num_steps, torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.int64
    assert drawn.shape == (50, num_steps)
    assert drawn.diff(dim=1).gt(0).all()  # temporal order, no step twice
    assert drawn.min() >= 0
    assert drawn.max() < len(counts)
    filled = sum(count > 0 for count in counts)
    assert ((repeated.gather(1, drawn) > 0).sum(1) == min(filled, num_steps)).all()


def test_a_generator_makes_the_draw_reproducible(generator, global_rng_untouched):
    sampler, counts = InfoFrameSampler(), torch.randint(1, 50, (8, 12))
    with global_rng_untouched():
        first = sampler(counts, 8, generator(5))
        assert torch.equal(sampler(counts, 8, generator=generator(5)), first)
        assert not torch.equal(sampler(counts, 8, generator(6)), first)
    torch.manual_seed(2)
    second = sampler(counts, 8)
    assert not torch.equal(sampler(counts, 8), second)
    torch.manual_seed(2)
    assert torch.equal(sampler(counts, 8), second)


def test_drawing_leaves_the_counts_alone(global_rng_untouched):
    counts = torch.randint(0, 9, (4, 12))
    before = counts.clone()
    InfoFrameSampler()(counts, 8)
    with global_rng_untouched():
        InfoFrameSampler().most_probable(counts, 8)
    assert torch.equal(counts, before)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=30), data=st.data())
def test_most_probable_against_brute_force(counts, data):
    num_steps = data.draw(st.integers(1, len(counts)))
    expected = sorted(sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:num_steps])
    got = InfoFrameSampler().most_probable(torch.tensor([counts, counts[::-1]]), num_steps)
    assert got.dtype == torch.int64
    assert got[0].tolist() == expected  # ties to the earlier
    if len(counts) <= 6:
        law = exact_probabilities(counts, num_steps)
        assert law[tuple(expected)] == pytest.approx(max(law.values()))


def test_number_of_candidates():
    for alpha, num_steps, expected in (
        (1.3, 8, 10),
        (1.5, 8, 12),
        (1.8, 8, 14),
        (2.0, 8, 16),
        (2, 8, 16),
        (1.1, 10, 11),
    ):
        assert InfoFrameSampler(alpha).num_candidates(num_steps) == expected


@given(text=st.from_regex(r"[1-3]\.[0-9]{1,4}", fullmatch=True), num_steps=st.integers(1, 64))
def test_number_of_candidates_of_any_decimal(text, num_steps):
    expected = math.floor(Fraction(text) * num_steps)
    if Fraction(text) == 1:
        with pytest.raises(ValueError, match="alpha"):
            InfoFrameSampler(float(text))
    elif expected > num_steps:
        assert InfoFrameSampler(float(text)).num_candidates(num_steps) == expected
    else:
        with pytest.raises(ValueError, match=f"{num_steps} candidates for {num_steps} time steps"):
            InfoFrameSampler(float(text)).num_candidates(num_steps)


def test_too_small_an_alpha_is_told_one_that_works():
    with pytest.raises(ValueError, match=r"alpha 1\.1.*8 candidates for 8.*at least 1\.125"):
        InfoFrameSampler(1.1).num_candidates(8)
    assert InfoFrameSampler(1.125).num_candidates(8) == 9


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 0, -2.0, math.nan, math.inf, True, "1.5", None, [1.5]])
def test_an_alpha_that_is_none_is_refused_when_made_and_when_set(value):
    with pytest.raises(ValueError, match="alpha") as error:
        InfoFrameSampler(value)
    assert str(error.value).endswith(f"got {value!r}")
    sampler = InfoFrameSampler(1.5)
    with pytest.raises(ValueError, match="alpha"):
        sampler.alpha = value
    assert sampler.alpha == sampler.settings["alpha"] == 1.5


@pytest.mark.parametrize("method", ["__call__", "most_probable"])
@pytest.mark.parametrize(("shape", "num_steps"), [((2, 7), 8), ((12,), 8), ((2, 12, 1), 8), ((2, 12), 0)])
def test_counts_that_do_not_fit_are_told_their_shape(method, shape, num_steps):
    with pytest.raises(ValueError, match=rf"at least {num_steps}") as error:
        getattr(InfoFrameSampler(), method)(torch.ones(shape), num_steps)
    assert str(shape) in str(error.value)


def test_alpha_is_live_and_settings_are_json():
    sampler = InfoFrameSampler()
    assert sampler.alpha == 1.5
    sampler.alpha = 2
    assert sampler.num_candidates(8) == 16
    assert json.loads(json.dumps(sampler.settings)) == {"name": "InfoFrameSampler", "alpha": 2.0}
    assert repr(sampler) == "InfoFrameSampler(alpha=2.0)"
