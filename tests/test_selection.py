"""TokenSelection, how kept tokens split into visible and target, and the flow through the frame sampler."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from everest_tokens import (
    InfoFrameSampler,
    RandomSelector,
    ReRoSelector,
    RunningCellSelector,
    TokenSelection,
    TubeSelector,
)
from everest_tokens.policy import SelectionPolicy, selector_from
from everest_tokens.selectors import Selector, TokenSelector
from everest_tokens.tubelets import Grid

VIT = (8, 14, 14)  # 16 frames of 224²: 1568 tokens


def pretraining(
    selector: Selector | None = None,
    mask_ratio: float = 0.9,
    visible: Selector | None = None,
    frame_sampler: InfoFrameSampler | None = None,
) -> SelectionPolicy:
    return SelectionPolicy("pretraining", selector or ReRoSelector(0.3), mask_ratio, visible, frame_sampler)


def encoder(selector: Selector | None = None, frame_sampler: InfoFrameSampler | None = None) -> SelectionPolicy:
    return SelectionPolicy("encoder", selector or ReRoSelector(0.6), 0.9, None, frame_sampler)


def random_tokens(grid: Grid, batch: int = 3, size: int = 4) -> Tensor:
    return torch.randn(batch, math.prod(grid), size)


def recording(selector: nn.Module) -> list[Tensor]:
    """What the selector will have returned, call by call."""
    record: list[Tensor] = []
    selector.register_forward_hook(lambda module, inputs, output: record.append(output))
    return record


def as_sets(rows: Tensor) -> list[set[int]]:
    return [set(row) for row in rows.tolist()]


# TokenSelection


def make_selection(**fields: Any) -> TokenSelection:
    visible, target = torch.tensor([[0, 7], [4, 5]]), torch.tensor([[1, 2, 11], [0, 3, 10]])
    given: dict[str, Any] = {"visible": visible, "target": target, "grid": (3, 2, 2), **fields}
    return TokenSelection(**given)


def test_a_selection_is_frozen():
    selection = make_selection()
    with pytest.raises(FrozenInstanceError):
        selection.grid = (1, 1, 1)  # type: ignore[misc]


def test_kept_and_frame_counts_by_hand():
    selection = make_selection()
    assert selection.kept.tolist() == [[0, 1, 2, 7, 11], [0, 3, 4, 5, 10]]
    assert selection.frame_counts.tolist() == [[3, 1, 1], [2, 2, 1]]
    assert selection.kept.dtype == selection.frame_counts.dtype == torch.int64
    alone = make_selection(target=None)
    assert alone.kept.tolist() == [[0, 7], [4, 5]]
    assert alone.frame_counts.tolist() == [[1, 1, 0], [0, 2, 0]]


@given(grid=st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 10**6))
def test_frame_counts_against_counting(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    total, area = math.prod(grid), grid[1] * grid[2]
    size = int(torch.randint(1, total + 1, (), generator=generator))
    kept = torch.stack([torch.randperm(total, generator=generator)[:size].sort().values for _ in range(2)])
    expected = [[sum(n // area == i for n in row) for i in range(grid[0])] for row in kept.tolist()]
    assert TokenSelection(kept, None, grid).frame_counts.tolist() == expected


@pytest.mark.parametrize("whole", [True, False])
def test_a_pytree_comes_back_whole(whole):
    fields: dict[str, Any] = {"importance": torch.zeros(2, 12), "steps": torch.tensor([[0, 1, 4], [2, 3, 4]])}
    selection = make_selection(**(fields if whole else {"target": None}))
    leaves, spec = pytree.tree_flatten(selection)
    assert not any(isinstance(leaf, (TokenSelection, tuple, int)) for leaf in leaves)  # the grid is structure
    for again in (spec, pytree.treespec_loads(pytree.treespec_dumps(spec))):  # as torch.export saves it
        back = pytree.tree_unflatten(leaves, again)
        assert type(back) is TokenSelection
        assert back.grid == (3, 2, 2)
        for name in ("visible", "target", "importance", "steps"):
            assert getattr(back, name) is getattr(selection, name)
    assert spec != pytree.tree_structure(make_selection(grid=(3, 4, 1)))
    moved = pytree.tree_map_only(Tensor, lambda tensor: tensor + 1, selection)
    for name in ("visible", "target", "importance", "steps") if whole else ("visible",):
        assert torch.equal(getattr(moved, name), getattr(selection, name) + 1)


# Visible and target


def test_the_papers_pre_training_numbers(check_indices):
    policy, tokens = pretraining(), random_tokens(VIT)
    policy.check(VIT)
    selection = policy.select(tokens, VIT)
    check_indices(selection.visible, 3, 156, 1568)
    check_indices(selection.target, 3, 314, 1568)
    assert torch.equal(selection.kept, ReRoSelector(0.3)(tokens, VIT))  # 470, each in exactly one of the two
    assert selection.grid == VIT
    assert selection.steps is None
    assert selection.frame_counts.sum(1).tolist() == [470] * 3


def test_other_ratios():
    for keep, mask, *numbers in ((0.4, 0.9, 156, 471), (0.3, 0.95, 78, 392), (0.3, 0.75, 392, 78), (1, 0.9, 156, 1412)):
        selection = pretraining(ReRoSelector(keep), mask).select(random_tokens(VIT, 1), VIT)
        assert [selection.visible.shape[1], selection.target.shape[1]] == numbers


@pytest.mark.parametrize("training", [True, False])
def test_visible_are_uniform_over_the_kept_and_independent_across_clips(training, check_frequencies):
    grid = (2, 1, 6)
    tokens = torch.zeros(1, 12, 1)
    tokens[0, [7, 10]] = 1.0  # the kept: places 1 and 4 of both steps
    kept = [1, 4, 7, 10]
    policy = pretraining(ReRoSelector(4 / 12), mask_ratio=10 / 12)
    selection = policy.select(tokens.expand(7200, -1, -1), grid, training=training)
    sets = list(combinations(kept, 2))
    check_frequencies(selection.visible, dict.fromkeys(sets, 1 / 6))
    check_frequencies(selection.visible.view(-1, 4), {a + b: 1 / 36 for a in sets for b in sets})
    assert selection.kept.unique(dim=0).tolist() == [kept]
    assert selection.target.diff(dim=1).gt(0).all()


def test_an_encoder_sees_every_kept_token():
    tokens = random_tokens(VIT)
    selection = encoder().select(tokens, VIT)
    assert selection.target is None
    assert torch.equal(selection.visible, ReRoSelector(0.6)(tokens, VIT))
    assert selection.visible.shape == (3, 940)
    assert selection.kept is selection.visible


def test_videomae_itself(check_indices):
    policy = pretraining(RandomSelector(1.0), visible=TubeSelector(0.1))
    policy.check(VIT)
    selection = policy.select(random_tokens(VIT), VIT)
    check_indices(selection.visible, 3, 160, 1568)
    check_indices(selection.target, 3, 1408, 1568)
    assert torch.equal(selection.kept, torch.arange(1568).expand(3, -1))
    places = selection.visible.view(3, 8, 20) % 196
    assert torch.equal(places, places[:, :1].expand(-1, 8, -1))
    assert len({tuple(row) for row in places[:, 0].tolist()}) == 3  # each clip its own tubes


@pytest.mark.parametrize(
    ("ratio", "grid", "visible", "target"),
    [
        # Of a tube's steps the cells keep `ratio`: 784 - 160/2, 392 - 160/4, 1176 - 3·160/4.
        (0.5, VIT, 160, 704),
        (0.25, VIT, 160, 352),
        (0.75, VIT, 160, 1056),
        (0.5, (4, 4, 6), 4 * 3, 48 - 6),  # 24 - floor(21.6) = 3 places
        (0.25, (12, 2, 4), 12, 24 - 3),
    ],
)
def test_dual_masking_predicts_exactly_the_kept_that_are_not_visible(ratio, grid, visible, target, check_indices):
    cells, tubes = RunningCellSelector(ratio), TubeSelector(0.1)
    policy = pretraining(cells, visible=tubes)
    policy.check(grid)
    kept, seen = recording(cells), recording(tubes)
    selection = policy.select(random_tokens(grid, 16), grid)
    check_indices(selection.visible, 16, visible, math.prod(grid))
    check_indices(selection.target, 16, target, math.prod(grid))
    assert torch.equal(selection.visible, seen[0])
    expected = [k - v for k, v in zip(as_sets(kept[0]), as_sets(seen[0]), strict=True)]
    assert as_sets(selection.target) == expected
    assert selection.kept.shape == (16, visible + target)


@pytest.mark.parametrize(("distance", "descending"), [("l2", True), ("cka", True), ("l1", False)])
def test_the_most_changed_of_the_kept_can_be_the_visible(distance, descending):
    grid = (4, 3, 5)
    tokens = random_tokens(grid)
    wide, narrow = (ReRoSelector(ratio, distance, descending) for ratio in (0.5, 0.2))
    policy = pretraining(wide, visible=narrow)
    policy.check(grid)
    selection = policy.select(tokens, grid)
    assert torch.equal(selection.visible, narrow(tokens, grid))
    assert torch.equal(selection.kept, wide(tokens, grid))
    assert selection.target.shape == (3, 30 - 12)


@pytest.mark.parametrize("visible", [RandomSelector(0.1), ReRoSelector(0.1), RunningCellSelector(0.25)])
def test_any_visible_fits_where_everything_is_kept(visible):
    grid = (4, 4, 6)
    policy = pretraining(RandomSelector(1.0), visible=visible)
    policy.check(grid)
    selection = policy.select(random_tokens(grid), grid)
    assert torch.equal(selection.kept, torch.arange(96).expand(3, -1))


REFUSED = {
    "random and tube": (RandomSelector(0.5), TubeSelector(0.1), VIT),
    "two random": (RandomSelector(0.5), RandomSelector(0.1), VIT),
    "two tubes": (TubeSelector(0.5), TubeSelector(0.1), VIT),
    "rero and tube": (ReRoSelector(0.5), TubeSelector(0.1), VIT),
    "rero and random": (ReRoSelector(0.5), RandomSelector(0.1), VIT),
    "random and rero": (RandomSelector(0.5), ReRoSelector(0.1), VIT),
    "two distances": (ReRoSelector(0.5, "l2"), ReRoSelector(0.1, "l1"), VIT),
    "two directions": (ReRoSelector(0.5), ReRoSelector(0.1, descending=False), VIT),
    "two callables": (ReRoSelector(0.5, lambda a, b: a[..., 0]), ReRoSelector(0.1, lambda a, b: a[..., 0]), VIT),
    "two running cells": (RunningCellSelector(0.5), RunningCellSelector(0.25), VIT),
    "cells in tubes": (TubeSelector(0.5), RunningCellSelector(0.25), VIT),
    "cells over six steps": (RunningCellSelector(0.5), TubeSelector(0.1), (6, 14, 14)),
    "cells over three steps": (RunningCellSelector(0.75), TubeSelector(0.1), (3, 14, 14)),
}


@pytest.mark.parametrize(("selector", "visible", "grid"), REFUSED.values(), ids=REFUSED)
def test_an_overlap_that_differs_from_clip_to_clip_is_refused(selector, visible, grid):
    with pytest.raises(ValueError, match=r"differs from clip to clip") as error:
        pretraining(selector, visible=visible).check(grid)
    for part in (selector, visible, grid):
        assert repr(part) in str(error.value)


def test_such_an_overlap_set_on_the_live_handle_is_refused_at_the_next_selection():
    # Else 80 or so of the tokens that should be targets are silently left out, others in each clip.
    selector = RandomSelector(1.0)
    policy = pretraining(selector, visible=TubeSelector(0.1))
    policy.check(VIT)
    selector.keep_ratio = 0.5
    with pytest.raises(ValueError, match=r"differs from clip to clip"):
        policy.select(random_tokens(VIT), VIT)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (pretraining(mask_ratio=0.5), r"mask_ratio 0\.5 gives 784 visible of 470"),
        (pretraining(mask_ratio=0.7), r"mask_ratio 0\.7 gives 470 visible of 470"),
        (pretraining(mask_ratio=0.9999), r"mask_ratio 0\.9999 gives 0 visible of 470"),
        (pretraining(visible=ReRoSelector(0.3)), r"ReRoSelector\(.*gives 470 visible of 470"),
        (pretraining(RandomSelector(1.0), visible=TubeSelector(1.0)), r"TubeSelector\(.*gives 1568 visible of 1568"),
    ],
)
def test_a_split_without_visible_or_without_target_is_refused(policy, told):
    for attempt in (lambda: policy.check(VIT), lambda: policy.select(random_tokens(VIT, 1), VIT)):
        with pytest.raises(ValueError, match=told):
            attempt()


@pytest.mark.parametrize(
    ("policy", "grid", "told"),
    [
        (encoder(ReRoSelector(0.0001)), VIT, r"keep_ratio 0\.0001.*\(8, 14, 14\)"),
        (encoder(frame_sampler=InfoFrameSampler(1.1)), VIT, r"alpha 1\.1.*8 candidates for 8"),
        (encoder(RunningCellSelector(0.5)), (8, 7, 14), r"\(8, 7, 14\)"),
    ],
)
def test_settings_that_a_grid_cannot_take_are_refused(policy, grid, told):
    with pytest.raises(ValueError, match=told):
        policy.check(grid)


# Custom selectors


def test_a_callable_selects_and_is_put_in_order():
    seen = []

    def own(tokens: Tensor, grid: Grid) -> Tensor:
        seen.append((tuple(tokens.shape), grid))
        return torch.tensor([[5, 0, 3, 7], [1, 6, 2, 4]])

    selection = encoder(own).select(random_tokens((2, 2, 2), 2), (2, 2, 2))
    assert selection.visible.tolist() == [[0, 3, 5, 7], [1, 2, 4, 6]]
    assert seen == [((2, 8, 4), (2, 2, 2))]


def test_a_callable_chooses_the_visible_among_the_kept():
    policy = pretraining(
        lambda tokens, grid: torch.tensor([[7, 1, 3, 0], [2, 4, 5, 6]]),
        visible=lambda tokens, grid: torch.tensor([[3, 1], [6, 2]]),
    )
    policy.check((2, 2, 2))
    selection = policy.select(random_tokens((2, 2, 2), 2), (2, 2, 2))
    assert selection.visible.tolist() == [[1, 3], [2, 6]]
    assert selection.target.tolist() == [[0, 7], [4, 5]]


def test_the_mask_ratio_has_no_say_where_a_callable_chooses_the_visible():
    # 156 of 1568 are kept, as many as mask_ratio 0.9 would make visible; the callable leaves 56 of them as targets.
    rero = ReRoSelector(0.1)
    policy = pretraining(rero, visible=lambda tokens, grid: rero(tokens, grid)[:, :100])
    selection = policy.select(random_tokens(VIT, 1), VIT)
    assert (selection.visible.shape, selection.target.shape) == ((1, 100), (1, 56))


def test_a_callable_that_leaves_no_target_is_refused():
    rero = ReRoSelector(0.3)
    policy = pretraining(rero, visible=lambda tokens, grid: rero(tokens, grid))
    with pytest.raises(ValueError, match="470 visible of 470"):
        policy.select(random_tokens(VIT, 1), VIT)


def test_a_callable_splits_by_the_mask_ratio_too():
    policy = pretraining(lambda tokens, grid: torch.tensor([[9, 2, 5, 7]]), mask_ratio=0.7)
    selection = policy.select(random_tokens((2, 1, 5), 1), (2, 1, 5))
    assert (selection.visible.shape, selection.target.shape) == ((1, 3), (1, 1))
    assert selection.kept.tolist() == [[2, 5, 7, 9]]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (torch.zeros(2, 3), r"torch\.float32 \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int32), r"torch\.int32 \(2, 3\)"),
        (torch.ones(2, 8, dtype=torch.bool), r"torch\.bool \(2, 8\)"),
        (torch.zeros(1, 3, dtype=torch.int64), r"torch\.int64 \(1, 3\)"),
        (torch.zeros(3, dtype=torch.int64), r"torch\.int64 \(3,\)"),
        ([[0, 1], [2, 3]], "list"),
        (None, "NoneType"),
    ],
)
def test_a_callable_that_returns_something_else_is_told_what(returned, told):
    with pytest.raises(ValueError, match=r"int64 indices \(2, K\), got " + told):
        encoder(lambda tokens, grid: returned).select(random_tokens((2, 2, 2), 2), (2, 2, 2))


@pytest.mark.parametrize(
    "selector",
    [
        nn.Linear(4, 1),
        nn.Linear(4, 1).requires_grad_(False),
        nn.BatchNorm1d(4, affine=False),
        ReRoSelector(distance=nn.Bilinear(4, 4, 1)),
    ],
    ids=["parameters", "frozen parameters", "buffers", "parameters of a distance"],
)
def test_a_selector_with_state_is_refused_when_made_and_when_set(selector):
    with pytest.raises(TypeError, match=r"selector must have neither.*(weight|running_mean)"):
        encoder(selector)
    with pytest.raises(TypeError, match=r"visible must have neither.*(weight|running_mean)"):
        pretraining(visible=selector)
    policy = encoder()
    before = policy.selector
    with pytest.raises(TypeError, match="neither parameters nor buffers"):
        policy.selector = selector
    assert policy.selector is before


def test_a_module_without_state_is_a_selector():
    class FirstTokens(nn.Module):
        def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
            return torch.arange(3).expand(tokens.shape[0], -1)

    assert encoder(FirstTokens()).select(random_tokens((2, 2, 2)), (2, 2, 2)).visible.tolist() == [[0, 1, 2]] * 3


# Settings


@pytest.mark.parametrize("value", [1.5, "info", lambda counts, num_steps: counts])
def test_a_frame_sampler_is_an_info_frame_sampler(value):
    with pytest.raises(TypeError, match=rf"InfoFrameSampler.*got {type(value).__name__}"):
        encoder(frame_sampler=value)


def test_an_encoder_has_no_visible_to_choose():
    policy = encoder()
    with pytest.raises(ValueError, match=r"visible=.*TubeSelector.*encoder"):
        policy.visible = TubeSelector(0.1)
    assert policy.visible is None


@pytest.mark.parametrize(
    "selector",
    [ReRoSelector(0.45, "cosine", False), RandomSelector(0.2), TubeSelector(0.1), RunningCellSelector(0.75)],
)
def test_a_selector_is_rebuilt_from_what_json_says(selector):
    recorded = json.loads(json.dumps(encoder(selector).settings["selector"]))
    again = selector_from(recorded, "selector")
    assert isinstance(again, TokenSelector)
    assert type(again).__name__ == type(selector).__name__
    assert again.settings == selector.settings


class OwnSelector(ReRoSelector):
    pass


@pytest.mark.parametrize(
    "selector", [OwnSelector(0.3), ReRoSelector(0.3, lambda a, b: a[..., 0])], ids=["subclass", "distance"]
)
def test_a_custom_selector_must_be_passed_again(selector):
    recorded = json.loads(json.dumps(encoder(selector).settings["selector"]))
    with pytest.raises(ValueError, match=r"custom selector.*pass selector="):
        selector_from(recorded, "selector")


# Random choices


@pytest.mark.parametrize(
    "policy",
    [
        pretraining(),
        pretraining(RandomSelector(1.0), visible=TubeSelector(0.1)),
        pretraining(RunningCellSelector(0.5), visible=TubeSelector(0.1)),
        encoder(RandomSelector(0.5)),
        encoder(ReRoSelector(0.5), InfoFrameSampler(2.0)),
        pretraining(TubeSelector(0.5), frame_sampler=InfoFrameSampler(1.5)),
    ],
)
def test_a_generator_is_behind_every_random_choice(policy, generator, global_rng_untouched):
    grid = (4, 4, 6)
    tokens = random_tokens((policy.num_candidates(4), 4, 6), 8)

    def drawn(seed: int) -> list[Tensor]:
        selection = policy.select(tokens, grid, generator=generator(seed))
        return [leaf for leaf in pytree.tree_leaves(selection) if leaf is not None]

    with global_rng_untouched():
        first, second, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Frames

# Two places over five candidate steps. Place 0 jumps by 6 at step 1, place 1 by 1, 1 and 3 at steps 2, 3, 4.
CANDIDATES = torch.tensor([[0.0, 0], [6, 0], [6, 1], [6, 2], [6, 5]])


@pytest.mark.parametrize("training", [True, False])
def test_each_clip_draws_its_own_steps_and_importance_is_computed_again_between_them(training):
    # Kept of the candidates: 6, 6 (its tie at step 0) and 3, so c = 1 1 0 0 1: steps 0, 1, 4 are certain.
    # Between these, place 1 jumps by 5 at the last; a single token of the six is kept, the first of 6, 0, 6, 0, 0, 5.
    # Backwards, place 1 changes by 3 at step 1 and place 0 by 6 at the last: steps 0, 1 and 4 again. Held for a step
    # longer, the other clip's last jump comes at step 3.
    other = torch.tensor([[0.0, 0], [6, 0], [6, 2], [6, 5], [6, 5]])  # changes 6 | 2 | 3 | 0: c = 1 1 0 1 0
    tokens = torch.stack([CANDIDATES, other, CANDIDATES.flip(0)]).view(3, 10, 1)
    policy = encoder(ReRoSelector(0.3), InfoFrameSampler(1.7))  # 5 candidates for 3 steps, 3 of their 10 tokens kept
    selection = policy.select(tokens, (3, 1, 2), training=training, with_importance=True)
    assert selection.grid == (3, 1, 2)
    assert selection.steps.tolist() == [[0, 1, 4], [0, 1, 3], [0, 1, 4]]
    assert selection.importance.tolist() == [[6, 0, 6, 0, 0, 5], [6, 0, 6, 0, 0, 5], [0, 3, 0, 3, 6, 2]]
    assert selection.visible.tolist() == [[0], [0], [4]]


def test_training_draws_by_the_counts_and_eval_takes_the_most_probable(check_frequencies):
    # Four candidates for two steps. Place 0 changes at step 1 (and so at 0), two places at step 2, four at step 3.
    steps = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 1]])
    policy = encoder(ReRoSelector(0.5), InfoFrameSampler(2.0))  # 8 of 16 kept: c = 1 1 2 4
    tokens = steps.view(1, 16, 1).expand(20_000, -1, -1)
    counts, total = [1, 1, 2, 4], 8
    law = {
        (a, b): counts[a] / total * counts[b] / (total - counts[a])
        + counts[b] / total * counts[a] / (total - counts[b])
        for a, b in combinations(range(4), 2)
    }
    drawn = policy.select(tokens, (2, 2, 2)).steps
    check_frequencies(drawn, law)
    likeliest = policy.select(tokens, (2, 2, 2), training=False).steps
    assert likeliest.unique(dim=0).tolist() == [[2, 3]]


@pytest.mark.parametrize("size", [{"keep_ratio": 0.625}, {"keep_tokens": 5}])
def test_candidate_steps_are_told_apart_without_an_anchor_that_the_drawn_clip_has(size):
    """5 of 8 tokens, so 10 of the 16 candidates: the changes above and two ties at 0, the lowest, c = 3 1 2 4."""
    steps = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 1]])
    policy = encoder(ReRoSelector(anchor="middle", **size), InfoFrameSampler(2.0))
    selection = policy.select(steps.view(1, 16, 1).expand(2, -1, -1), (2, 2, 2), training=False)
    assert selection.steps.tolist() == [[0, 3]] * 2  # with the anchor c would be 1 1 4 4
    assert selection.frame_counts.tolist() == [[1, 4]] * 2


@pytest.mark.parametrize("anchor", ["first", "middle"])
def test_pretraining_draws_visible_tokens_from_the_anchor_too(anchor, check_indices):
    policy, grid = pretraining(ReRoSelector(0.3, anchor=anchor)), VIT
    selection = policy.select(random_tokens(grid), grid)
    check_indices(selection.visible, 3, 156, 1568)
    check_indices(selection.target, 3, 314, 1568)
    step = 0 if anchor == "first" else 4
    assert selection.frame_counts[:, step].tolist() == [196] * 3
    seen = (selection.visible // 196 == step).sum(dim=1)
    assert (seen > 30).all()  # of 156 a share of 196/470 is drawn, 65 on average; 30 is seven deviations below
    assert (seen < 100).all()


@pytest.mark.parametrize(("settings", "name"), [({"anchor": "first"}, "anchor"), ({"distance": "l1"}, "distance")])
def test_two_rankings_that_differ_share_no_fixed_number_of_tokens(settings, name):
    policy = pretraining(ReRoSelector(0.5, **settings), visible=ReRoSelector(0.3))
    with pytest.raises(ValueError, match="differs from clip to clip"):
        policy.check(VIT)
    policy.visible = ReRoSelector(0.3, **settings)
    policy.check(VIT)


@pytest.mark.parametrize("selector", [RandomSelector(0.5), TubeSelector(0.5), RunningCellSelector(0.5)])
@pytest.mark.parametrize("training", [True, False])
def test_frames_are_drawn_around_random_selectors_too(selector, training, check_indices):
    policy, grid = pretraining(selector, frame_sampler=InfoFrameSampler(1.5)), (4, 4, 6)
    assert policy.num_candidates(4) == 6
    selection = policy.select(random_tokens((6, 4, 6)), grid, training=training)
    check_indices(selection.steps, 3, 4, 6)
    check_indices(selection.visible, 3, 9, 96)
    check_indices(selection.target, 3, 39, 96)


@pytest.mark.parametrize("steps", [8, 11, 13])
def test_tokens_of_another_number_of_candidates_are_refused(steps):
    policy = encoder(frame_sampler=InfoFrameSampler(1.5))
    with pytest.raises(ValueError, match=rf"\(B, {12 * 15}, D\).*{steps * 15}"):
        policy.select(random_tokens((steps, 3, 5)), (8, 3, 5))
