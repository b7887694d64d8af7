"""Which tokens are kept: brute force over whole clips for Eq. 2, exact counts and laws for the random baselines."""

from __future__ import annotations

import copy
import json
import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from everest_tokens import RandomSelector, ReRoSelector, RunningCellSelector, TubeSelector

DISTANCES = ["l2", "l1", "cosine", "cka"]
RANDOM = [RandomSelector, TubeSelector, RunningCellSelector]
SELECTORS = [ReRoSelector, *RANDOM]
VIT = (8, 14, 14)  # 16 frames of 224²: 1568 tokens

grids = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))
integer_clips = st.tuples(grids, st.integers(1, 2), st.integers(0, 10**6))


def integer_tokens(grid: tuple[int, int, int], size: int, seed: int, batch: int = 2) -> Tensor:
    """Small whole numbers: every distance is exact, and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (batch, math.prod(grid), size), generator=generator).float()


def change_by_hand(clip: list[list[int]], grid: tuple[int, int, int]) -> list[int]:
    """Squared l2 (whole numbers, so exact) of every token of one clip from the one before, Eq. 2 in loops."""
    t, h, w = grid
    change = []
    for i in range(t):
        for j in range(h * w):
            later, earlier = max(i, 1) * h * w + j, (max(i, 1) - 1) * h * w + j
            change.append(sum((p - q) ** 2 for p, q in zip(clip[later], clip[earlier], strict=True)))
    return change


def still_tokens(grid: tuple[int, int, int], size: int = 4) -> Tensor:
    """(1, N, size): a random background that never changes."""
    t, h, w = grid
    return torch.randn(1, 1, h * w, size).expand(1, t, h * w, size).flatten(1, 2).clone()


# How many


@pytest.mark.parametrize("cls", [ReRoSelector, RandomSelector])
def test_count_is_the_floor_of_what_the_decimal_says(cls):
    for ratio, count in ((0.1, 1000), (0.3, 1568), (0.6, 1568), (0.29, 100), (0.58, 100), (0.07, 100), (0.7, 10)):
        assert cls(ratio).num_kept((1, 1, count)) == math.floor(Fraction(str(ratio)) * count)
    for ratio, count, expected in ((1 / 3, 3, 1), (2 / 3, 1569, 1046), (0.666666, 3, 1), (1.0, 1568, 1568), (1, 9, 9)):
        assert cls(ratio).num_kept((1, 1, count)) == expected
    with pytest.raises(ValueError, match=r"0\.0051.*\(1, 1, 196\).*196 tokens"):
        cls(0.0051).num_kept((1, 1, 196))


@given(text=st.from_regex(r"0\.[0-9]{0,5}[1-9]", fullmatch=True), count=st.integers(1, 40_000))
def test_count_of_any_decimal(text, count):
    expected = math.floor(Fraction(text) * count)
    if expected:
        assert RandomSelector(float(text)).num_kept((1, 1, count)) == expected
    else:
        with pytest.raises(ValueError, match="no token"):
            RandomSelector(float(text)).num_kept((1, 1, count))


@pytest.mark.parametrize("cls", SELECTORS)
@pytest.mark.parametrize("grid", [VIT, (4, 6, 10), (2, 2, 8)])
def test_indices_are_int64_ascending_and_without_repeats(cls, grid, check_indices):
    total = math.prod(grid)
    tokens = torch.randn(3, total, 5)
    for ratio in (0.25, 0.5, 0.75):
        count = ratio * total  # whole on these grids, for tubes too
        check_indices(cls(ratio)(tokens, grid), 3, int(count), total)


# The most changed


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("distance", ["l2", "l1"])
@given(clip=integer_clips, ratio=st.integers(1, 20))
def test_ranking_against_brute_force(distance, descending, clip, ratio):
    grid, size, seed = clip
    size = 1 if distance == "l1" else size  # of one feature l1 and l2 are the same number
    tokens = integer_tokens(grid, size, seed)
    total = math.prod(grid)
    kept = max(1, total * ratio // 20)
    selector = ReRoSelector((kept + 0.5) / total if kept < total else 1, distance, descending)
    got = selector(tokens, grid)
    for row, values in zip(got.tolist(), tokens.int().tolist(), strict=True):
        change = change_by_hand(values, grid)
        sign = -1 if descending else 1
        ranked = sorted(range(total), key=lambda n: (sign * change[n], n))
        assert row == sorted(ranked[:kept])


def test_importance_by_hand():
    # Two places over three steps: (0,0) -> (3,4) -> (3,4) and (1,1) -> (1,1) -> (1,3).
    tokens = torch.tensor([[[0.0, 0], [1, 1], [3, 4], [1, 1], [3, 4], [1, 3]]])
    expected = {"l2": [5.0, 0, 5, 0, 0, 2], "l1": [7.0, 0, 7, 0, 0, 2]}
    cosine = -4 / math.sqrt(20)  # (1, 1) and (1, 3)
    expected["cosine"] = [1.0, -1, 1, -1, -1, cosine]  # from the zero vector: most changed
    expected["cka"] = [0.0, -1, 0, -1, -1, 0]  # (0, 0) and (1, 1) are constant: no correlation
    for name, numbers in expected.items():
        got = ReRoSelector(distance=name).importance(tokens, (3, 1, 2))
        assert got[0].tolist() == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "cka"])
@pytest.mark.parametrize("descending", [True, False])
def test_ranking_by_angle_and_correlation(distance, descending):
    grid = (4, 3, 5)
    tokens = torch.randn(2, 60, 16)
    got = ReRoSelector(0.4, distance, descending)(tokens, grid)
    for row, clip in zip(got.tolist(), tokens.double().numpy().reshape(2, 4, 15, 16), strict=True):
        change = np.empty((4, 15))
        for i in range(1, 4):
            for j in range(15):
                a, b = clip[i, j], clip[i - 1, j]
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                change[i, j] = -cosine if distance == "cosine" else -(np.corrcoef(a, b)[0, 1] ** 2)
        change[0] = change[1]
        order = np.argsort(-change.ravel() if descending else change.ravel(), kind="stable")
        assert row == sorted(order[:24].tolist())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("grid", [VIT, (5, 3, 7)])
def test_a_static_clip_keeps_the_first_tokens(distance, descending, grid):
    total = math.prod(grid)
    kept = ReRoSelector(0.3, distance, descending)(still_tokens(grid), grid)
    assert kept.tolist() == [list(range(int(0.3 * total)))]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("grid", [VIT, (6, 3, 7)])
def test_a_patch_that_moves_is_kept_where_it_was_and_where_it_is(distance, grid):
    t, h, w = grid
    tokens = still_tokens(grid)
    place = [(i % h) * w + (2 * i) % w for i in range(t)]  # never twice the same in a row
    patch = 3 * torch.randn(4)
    for i, j in enumerate(place):
        tokens[0, i * h * w + j] = patch
    moved = [{place[max(i, 1)], place[max(i, 1) - 1]} for i in range(t)]
    expected = [i * h * w + j for i in range(t) for j in sorted(moved[i])]
    assert len(expected) == 2 * t
    assert ReRoSelector(2 / (h * w), distance)(tokens, grid).tolist() == [expected]


# Precision


def test_ties_of_signed_zeros_go_to_the_lower_index():
    def signed(a: Tensor, b: Tensor) -> Tensor:
        zeros = torch.zeros(a.shape[:-1])
        zeros[..., ::2] = -0.0
        return zeros

    for descending in (True, False):
        assert ReRoSelector(0.5, signed, descending)(torch.randn(1, 12, 2), (3, 1, 4)).tolist() == [list(range(6))]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_changes_nothing(distance, dtype):
    tokens, grid = (100 * torch.randn(2, 96, 16)).to(dtype), (4, 4, 6)
    selector = ReRoSelector(0.3, distance)
    plain = selector.importance(tokens, grid)
    assert torch.equal(plain, selector.importance(tokens.float(), grid))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = selector.importance(tokens, grid)
        assert torch.is_autocast_enabled("cpu")
    assert plain.dtype == under.dtype == torch.float32
    assert torch.equal(plain, under)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_custom_distance_sees_float32_under_autocast_too(dtype):
    mixing = torch.randn(16, 16)
    seen = []

    def mahalanobis(a: Tensor, b: Tensor) -> Tensor:
        mixed = (a - b) @ mixing
        seen.append((a.dtype, b.dtype, mixed.dtype, torch.is_grad_enabled()))
        return mixed.square().sum(-1)

    tokens, grid = torch.randn(2, 96, 16).to(dtype).requires_grad_(), (4, 4, 6)
    selector = ReRoSelector(0.3, mahalanobis)
    plain = selector.importance(tokens, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = selector.importance(tokens, grid)
    assert seen == [(torch.float32, torch.float32, torch.float32, False)] * 2
    assert torch.equal(plain, under)


@pytest.mark.parametrize("distance", DISTANCES)
def test_float64_beyond_float32_is_the_most_changed_not_nan(distance):
    tokens, grid = torch.zeros(1, 12, 3, dtype=torch.float64), (3, 2, 2)
    tokens += torch.tensor([1.0, 2.0, 4.0])
    tokens[0, 9:] = torch.tensor([1e300, -1e300, 1e200], dtype=torch.float64)  # places 1, 2, 3 of the last step
    importance = ReRoSelector(distance=distance).importance(tokens, grid)
    assert not importance.isnan().any()
    assert ReRoSelector(0.25, distance)(tokens, grid).tolist() == [[9, 10, 11]]


@pytest.mark.parametrize("distance", [*DISTANCES, lambda a, b: (a - b).square().sum(-1)])
def test_no_grad_reaches_the_tokens(distance):
    tokens = torch.randn(1, 8, 3, requires_grad=True)
    doubled = tokens * 2
    selector = ReRoSelector(0.5, distance)
    importance = selector.importance(doubled, (2, 2, 2))
    assert not importance.requires_grad
    assert importance.grad_fn is None
    assert not selector(doubled, (2, 2, 2)).requires_grad
    assert torch.is_grad_enabled()
    assert doubled.grad_fn is not None  # what comes after still trains them


# Custom distances


def test_a_custom_distance_gets_the_later_token_first():
    tokens = torch.tensor([[[0.0], [10.0], [1.0], [8.0], [5.0], [2.0]]])  # grows: 1, 4; shrinks: -2, -6
    importance = ReRoSelector(distance=lambda a, b: (a - b).sum(-1)).importance(tokens, (3, 1, 2))
    assert importance.tolist() == [[1.0, -2.0, 1.0, -2.0, 4.0, -6.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_what_a_custom_distance_returns_becomes_float32(dtype):
    selector = ReRoSelector(distance=lambda a, b: (a - b).abs().sum(-1).to(dtype))
    assert selector.importance(torch.randn(1, 8, 3), (2, 2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda a, b: (a - b).norm(dim=-1, keepdim=True), r"\(2, 2, 4, 1\)"),
        (lambda a, b: a - b, r"\(2, 2, 4, 5\)"),
        (lambda a, b: (a - b).norm(), r"\(\)"),
        (lambda a, b: (a - b).norm(dim=-1).flatten(1), r"\(2, 8\)"),
    ],
)
def test_a_custom_distance_of_the_wrong_shape_is_told_both_shapes(wrong, got):
    with pytest.raises(ValueError, match=r"\(2, 2, 4\).*" + got):
        ReRoSelector(distance=wrong)(torch.randn(2, 12, 5), (3, 2, 2))


def test_a_module_is_a_callable_distance_too():
    tokens, grid = torch.randn(2, 24, 6), (3, 2, 4)
    expected, module = ReRoSelector(distance="l1").importance(tokens, grid), nn.PairwiseDistance(p=1, eps=0)
    later = ReRoSelector(0.25, "l2")
    later.distance = module
    for selector in (ReRoSelector(0.25, module), later):
        torch.testing.assert_close(selector.importance(tokens, grid), expected, rtol=1e-6, atol=0)
        assert selector.settings["distance"] == "custom"
    for distance in (lambda a, b: a[..., 0], "cosine", nn.PairwiseDistance(), "l2"):
        later.distance = distance
        assert later.distance is distance


@pytest.mark.parametrize("value", ["L2", "euclid", "", None, 2])
def test_an_unknown_distance_is_named_with_what_there_is(value):
    with pytest.raises(ValueError, match=f"l2, l1, cosine, cka.*got {value!r}"):
        ReRoSelector(distance=value)


def test_distance_and_direction_are_live():
    tokens, grid = torch.randn(1, 24, 6), (3, 2, 4)
    selector = ReRoSelector(0.25)
    selector.distance = "cosine"
    selector.descending = False
    assert torch.equal(selector(tokens, grid), ReRoSelector(0.25, "cosine", False)(tokens, grid))
    assert (selector.settings["distance"], selector.settings["descending"]) == ("cosine", False)
    selector.distance = lambda a, b: a[..., 0]
    assert selector.settings["distance"] == "custom"
    selector.distance = "l2"
    assert torch.equal(selector(tokens, grid), ReRoSelector(0.25, "l2", False)(tokens, grid))


# Batches and sizes


@pytest.mark.parametrize("distance", DISTANCES)
def test_clips_of_a_batch_do_not_know_each_other(distance):
    grid = (4, 3, 5)
    tokens = torch.randn(6, 60, 12) * torch.tensor([1, 1e-6, 1e6, 3, 0.1, 100]).view(6, 1, 1)
    selector = ReRoSelector(0.3, distance)
    kept, importance = selector(tokens, grid), selector.importance(tokens, grid)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(selector(tokens[order], grid), kept[order])
    assert torch.equal(selector.importance(tokens[order], grid), importance[order])
    for one in range(6):
        assert torch.equal(selector(tokens[one : one + 1], grid), kept[one : one + 1])


@pytest.mark.parametrize(("steps", "expected"), [(12, 705), (24, 1411), (32, 1881), (64, 3763), (16, 940)])
def test_longer_clips(steps, expected):
    grid, total = (steps, 14, 14), steps * 196
    tokens = torch.randn(1, total, 2)
    tokens[0, : total - expected] = 0.5  # still until the last `expected` tokens: some frames keep none, others all
    assert ReRoSelector(0.3)(tokens, grid).tolist() == [list(range(total - expected, total))]


@pytest.mark.parametrize("cls", SELECTORS)
@pytest.mark.parametrize("shape", [(2, 15, 4), (2, 17, 4), (16, 4), (2, 4, 2, 2, 4)])
def test_tokens_that_do_not_fit_the_grid_are_told_their_shape(cls, shape):
    with pytest.raises(ValueError, match=r"16.*\(4, 2, 2\)") as error:
        cls(0.5)(torch.randn(shape), (4, 2, 2))
    assert str(shape) in str(error.value)


def test_one_time_step_has_nothing_to_compare():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        ReRoSelector(0.5)(torch.randn(1, 4, 3), (1, 2, 2))


# Settings


@pytest.mark.parametrize("cls", SELECTORS)
@pytest.mark.parametrize(
    "value", [0, 0.0, -0.25, 1.0001, 2, math.nan, math.inf, -math.inf, True, False, "0.5", None, [0.5], 0.5 + 0j]
)
def test_a_keep_ratio_that_is_none_is_refused_when_made_and_when_set(cls, value):
    message = r"keep_ratio.*got "
    if cls is not ReRoSelector or value is not None:  # it takes `keep_tokens` instead
        with pytest.raises(ValueError, match=message) as error:
            cls(value)
        assert str(error.value).endswith(repr(value))
    selector = cls(0.5)
    with pytest.raises(ValueError, match=message):
        selector.keep_ratio = value
    assert selector.keep_ratio == selector.settings["keep_ratio"] == 0.5


@pytest.mark.parametrize("cls", SELECTORS)
def test_a_new_keep_ratio_takes_effect_at_the_next_call(cls):
    tokens, grid = torch.randn(1, 64, 3), (4, 4, 4)
    selector = cls(0.25)
    assert selector(tokens, grid).shape == (1, 16)
    selector.keep_ratio = 0.75
    assert selector(tokens, grid).shape == (1, 48)
    assert selector.num_kept(grid) == 48
    assert json.loads(json.dumps(selector.settings))["keep_ratio"] == 0.75
    assert "0.75" in repr(selector)


@pytest.mark.parametrize("cls", [ReRoSelector, RandomSelector, TubeSelector])
def test_everything_can_be_kept(cls):
    assert torch.equal(cls(1)(torch.randn(2, 24, 3), (2, 3, 4)), torch.arange(24).expand(2, -1))


def test_rero_defaults_to_the_papers_pre_training():
    selector = ReRoSelector()
    assert (selector.keep_ratio, selector.distance, selector.descending) == (0.3, "l2", True)


@pytest.mark.parametrize("cls", SELECTORS)
def test_a_selector_has_no_state_and_copies_are_independent(cls):
    selector = cls(0.5)
    assert isinstance(selector, nn.Module)
    assert not [*selector.parameters(), *selector.buffers(), *selector.state_dict()]
    other = copy.deepcopy(selector)
    other.keep_ratio = 0.25
    assert selector.keep_ratio == selector.settings["keep_ratio"] == 0.5
    assert other.settings == {**selector.settings, "keep_ratio": 0.25}


# Random baselines


@pytest.mark.parametrize("cls", RANDOM)
def test_a_generator_makes_a_draw_reproducible(cls, generator, global_rng_untouched):
    tokens, grid = torch.randn(16, 64, 3), (4, 4, 4)
    selector = cls(0.5)
    with global_rng_untouched():
        first = selector(tokens, grid, generator=generator(7))
        assert torch.equal(selector(tokens, grid, generator=generator(7)), first)
        assert not torch.equal(selector(tokens, grid, generator=generator(8)), first)
    torch.manual_seed(3)
    second = selector(tokens, grid)
    assert not torch.equal(selector(tokens, grid), second)  # torch's own generator moves on
    torch.manual_seed(3)
    assert torch.equal(selector(tokens, grid), second)


def test_rero_draws_nothing(global_rng_untouched):
    tokens = torch.randn(2, 64, 3)
    with global_rng_untouched():
        ReRoSelector()(tokens, (4, 4, 4))


def test_random_sets_are_uniform_and_independent_across_clips(check_frequencies):
    sets = list(combinations(range(4), 2))
    tokens = torch.tensor([9.0, 0, 0, 1]).view(1, 4, 1).expand(7200, 4, 1)  # which it doesn't look at
    kept = RandomSelector(0.5)(tokens, (2, 1, 2))
    check_frequencies(kept, dict.fromkeys(sets, 1 / 6))
    check_frequencies(kept.view(-1, 4), {a + b: 1 / 36 for a in sets for b in sets})  # neighbours in the batch


@pytest.mark.parametrize(
    ("ratio", "grid", "places"),
    [
        (0.1, VIT, 20),  # VideoMAE hides floor(0.9 * 196) = 176 of 196 places
        (0.25, VIT, 49),
        (0.9, VIT, 177),
        (0.3, (3, 6, 10), 18),
        (0.7, (5, 2, 5), 7),  # floor of 0.3 * 10, where 1 - 0.7 is a little more than 0.3
        (0.9, (2, 10, 10), 90),  # floor of 0.1 * 100, where 1 - 0.9 is a little less than 0.1
        (0.01, (4, 3, 5), 1),
        (1.0, (4, 3, 5), 15),
    ],
)
def test_a_tube_keeps_the_same_places_in_every_step(ratio, grid, places, check_indices):
    t, h, w = grid
    kept = TubeSelector(ratio)(torch.zeros(4, math.prod(grid), 1), grid)
    check_indices(kept, 4, t * places, math.prod(grid))
    steps = kept.view(4, t, places)
    assert torch.equal(steps, steps[:, :1] + torch.arange(t).view(1, t, 1) * h * w)
    assert TubeSelector(ratio).num_kept(grid) == t * places


@given(percent=st.integers(1, 100), h=st.integers(1, 24), w=st.integers(1, 24), t=st.integers(1, 6))
def test_a_tubes_count_for_any_percentage(percent, h, w, t):
    hidden = math.floor((1 - Fraction(percent, 100)) * h * w)
    assert TubeSelector(percent / 100).num_kept((t, h, w)) == t * (h * w - hidden)


def test_tubes_are_uniform_and_independent_across_clips(check_frequencies):
    sets = list(combinations(range(4), 2))
    kept = TubeSelector(0.5)(torch.zeros(7200, 8, 1), (2, 2, 2))[:, :2]
    check_frequencies(kept, dict.fromkeys(sets, 1 / 6))
    check_frequencies(kept.reshape(-1, 4), {a + b: 1 / 36 for a in sets for b in sets})


def kept_of_cells(kept: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, K) → (B, cells, t, 4) bool: whether place p (row-major) of a 2×2 cell is kept at each step."""
    t, h, w = grid
    flags = torch.zeros(kept.shape[0], math.prod(grid), dtype=torch.bool).scatter(1, kept, True)
    flags = flags.view(-1, t, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return flags.reshape(kept.shape[0], -1, t, 4)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", [VIT, (4, 2, 6), (12, 6, 2), (8, 2, 2)])
def test_cells_run_by_one_a_step(ratio, grid, check_indices):
    t = grid[0]
    kept = RunningCellSelector(ratio)(torch.zeros(16, math.prod(grid), 1), grid)
    check_indices(kept, 16, int(ratio * math.prod(grid)), math.prod(grid))
    cells = kept_of_cells(kept, grid)
    assert (cells.sum(-1) == 4 * ratio).all()  # as many of every cell at every step
    assert (cells.sum(2) == ratio * t).all()  # every place as often, over a multiple of four steps
    assert torch.equal(cells[:, :, 1:], cells[:, :, :-1].roll(-1, dims=3))
    first = cells[:, :, 0].int()
    assert ((first - first.roll(1, dims=2)).abs().sum(-1) == 2).all()  # the kept places of a cell follow on each other


def test_cells_phases_are_uniform_and_independent_across_clips(check_frequencies):
    kept = RunningCellSelector(0.25)(torch.zeros(4000, 4, 1), (1, 2, 2))
    check_frequencies(kept, {(p,): 1 / 4 for p in range(4)})
    check_frequencies(kept.view(-1, 2), {(p, q): 1 / 16 for p in range(4) for q in range(4)})


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.24999, 1.0, 1])
def test_cells_take_whole_places_only(ratio):
    with pytest.raises(ValueError, match=rf"keep_ratio.*0\.25, 0\.5 or 0\.75.*got {ratio}"):
        RunningCellSelector(ratio)


@pytest.mark.parametrize("grid", [(2, 3, 4), (2, 4, 3), (2, 3, 3)])
def test_cells_need_an_even_height_and_width(grid):
    with pytest.raises(ValueError, match=str(grid).replace("(", r"\(").replace(")", r"\)")):
        RunningCellSelector(0.5)(torch.zeros(1, math.prod(grid), 1), grid)


# A kept time step, and a fixed number of tokens


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(("anchor", "step_of"), [("first", lambda t: 0), ("middle", lambda t: t // 2)])
@given(clip=integer_clips, share=st.integers(0, 20))
def test_anchor_against_brute_force(anchor, step_of, descending, clip, share):
    """Its time step is whole, and the rest of K is the top of Eq. 2's ranking of all other tokens."""
    grid, size, seed = clip
    area, total = grid[1] * grid[2], math.prod(grid)
    kept = area + 1 + (total - area - 1) * share // 20
    tokens = integer_tokens(grid, size, seed)
    got = ReRoSelector(keep_tokens=kept, anchor=anchor, descending=descending)(tokens, grid)
    for row, values in zip(got.tolist(), tokens.int().tolist(), strict=True):
        change = change_by_hand(values, grid)
        whole = [n for n in range(total) if n // area == step_of(grid[0])]
        others = sorted(set(range(total)) - set(whole), key=lambda n: ((-1 if descending else 1) * change[n], n))
        assert row == sorted(whole + others[: kept - area])


def test_anchor_is_whole_beside_infinite_change():
    """A distance of one's own may say infinity, which ranks below the anchor, wherever it stands."""
    selector = ReRoSelector(keep_tokens=5, anchor="middle", distance=lambda a, b: torch.full(a.shape[:-1], math.inf))
    assert selector(torch.randn(1, 16, 3), (4, 2, 2)).tolist() == [[0, 8, 9, 10, 11]]


@given(grid=grids, anchor=st.sampled_from(["first", "middle"]))
def test_the_ratio_that_an_anchor_asks_for_is_enough_and_the_least(grid, anchor):
    area, total = grid[1] * grid[2], math.prod(grid)
    with pytest.raises(ValueError, match=rf"anchor='{anchor}' keeps the {area} tokens .*expected") as error:
        ReRoSelector(area / total, anchor=anchor).num_kept(grid)
    ratio = float(str(error.value).split("keep_ratio of at least ")[1].split(",")[0])
    assert ReRoSelector(ratio, anchor=anchor).num_kept(grid) == area + 1
    assert ReRoSelector(ratio - 1e-4).num_kept(grid) <= area
    assert ReRoSelector(keep_tokens=area + 1, anchor=anchor).num_kept(grid) == area + 1
    with pytest.raises(ValueError, match=f"and {area} tokens, keep_tokens, leaves"):
        ReRoSelector(keep_tokens=area, anchor=anchor).num_kept(grid)


def test_keep_tokens_is_the_number_that_is_kept_on_every_grid(check_indices):
    selector = ReRoSelector(keep_tokens=30)
    for grid in ((4, 3, 4), (16, 3, 4)):
        check_indices(selector(torch.randn(2, math.prod(grid), 3), grid), 2, 30, math.prod(grid))
    with pytest.raises(ValueError, match=r"keep_tokens 30 is more than the 24 tokens of grid \(2, 3, 4\)"):
        selector.num_kept((2, 3, 4))


def test_ratio_and_number_clear_each_other():
    selector = ReRoSelector(keep_tokens=30)
    assert (selector.keep_ratio, selector.keep_tokens) == (None, 30)
    selector.keep_ratio = 0.5
    assert (selector.keep_ratio, selector.keep_tokens, selector.num_kept((4, 3, 4))) == (0.5, None, 24)
    selector.keep_tokens = np.int64(7)
    assert (selector.keep_ratio, selector.keep_tokens, selector.num_kept((4, 3, 4))) == (None, 7, 7)
    assert (selector.settings["keep_ratio"], selector.settings["keep_tokens"]) == (None, 7)
    with pytest.raises(ValueError, match=r"both: 0\.5 and 30"):
        ReRoSelector(0.5, keep_tokens=30)
    for wrong in (0, -1, 2.5, True, "30", None):
        with pytest.raises(ValueError, match="keep_tokens must be a whole number"):
            selector.keep_tokens = wrong
    assert selector.keep_tokens == 7
    with pytest.raises(ValueError, match="anchor must be None, 'first' or 'middle', got 'last'"):
        selector.anchor = "last"
