"""Budgets for each clip: which tokens they keep by brute force and by hand, and what reads a selection of theirs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import everest_tokens as et
from everest_tokens.policy import SelectionPolicy, selector_from
from everest_tokens.selection import check_selection
from everest_tokens.visualization import kept_map

GRID = (3, 2, 2)
COVERS = (0.3, 0.375, 0.4, 0.75, 0.9, 0.95)


def tokens_of(change: list[list[float]]) -> Tensor:
    """(B, 12, 2) whose importance at the second and the third step is `change`, (B, 8), by moving along one axis."""
    steps = torch.tensor(change).view(-1, 2, 4)
    along = torch.cat([torch.zeros_like(steps[:, :1]), steps], dim=1).cumsum(dim=1)
    return torch.stack([along, torch.ones_like(along)], dim=-1).flatten(1, 2)


def rows(kept: Tensor, total: int) -> list[list[int]]:
    """Kept indices of each clip; fails where they don't ascend or what fills up a row isn't `total`."""
    assert kept.dtype == torch.int64
    found = []
    for row in kept.tolist():
        own = [index for index in row if index != total]
        assert row == own + [total] * (len(row) - len(own))
        assert own == sorted(set(own))
        found.append(own)
    return found


class TestEnergyBudget:
    def test_by_hand(self):
        """The first step has the second's importance: 3, 0, 0, 1 | 3, 0, 0, 1 | 0, 2, 0, 0; squares sum up to 24."""
        tokens = tokens_of([[3, 0, 0, 1, 0, 2, 0, 0]])
        kept = {
            cover: rows(et.EnergyBudget(cover)(tokens, GRID), 12)[0] for cover in (0.3, 0.375, 0.4, 0.75, 0.9, 0.95)
        }
        assert kept == {
            0.3: [0],
            0.375: [0],  # 9 of 24 to the bit: that is cover
            0.4: [0, 4],
            0.75: [0, 4],
            0.9: [0, 4, 9],  # 22 of 24
            0.95: [0, 3, 4, 9],  # 23 of 24, by the lower of two equal ones
        }
        assert rows(et.EnergyBudget(1.0)(tokens, GRID), 12) == [[0, 3, 4, 7, 9]]

    def test_limits(self):
        tokens = tokens_of([[3, 0, 0, 1, 0, 2, 0, 0], [1] * 8, [0] * 8])
        assert rows(et.EnergyBudget(0.9, 4, 5)(tokens, GRID), 12) == [[0, 3, 4, 9], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
        assert et.EnergyBudget(0.9, 4, 5)(tokens, GRID).shape == (3, 5)
        assert rows(et.EnergyBudget(0.5)(tokens, GRID), 12) == [[0, 4], [0, 1, 2, 3, 4, 5], [0]]
        assert rows(et.EnergyBudget(0.9, 12)(tokens, GRID), 12) == [list(range(12))] * 3

    @given(
        st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=8, max_size=8), min_size=1, max_size=3),
        st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    )
    def test_no_fewer_tokens_would_do(self, change, cover):
        """Every subset of every size is tried; among those of the least size the kept one ranks first."""
        kept = rows(et.EnergyBudget(cover)(tokens_of(change), GRID), 12)
        for clip, own in zip(change, kept, strict=True):
            energy = [value**2 for value in clip[:4] + clip]
            need = cover * sum(energy)
            assert sum(energy[i] for i in own) >= need * (1 - 1e-12)
            for subset in itertools.combinations(range(12), len(own) - 1):
                assert not subset or sum(energy[i] for i in subset) < need * (1 + 1e-12) or need == 0
            dropped = [i for i in range(12) if i not in own]
            assert all((energy[i], -i) >= (energy[j], -j) for i in own for j in dropped)

    @pytest.mark.parametrize("distance", ["l2", "l1", "cosine", "cka"])
    def test_what_stays_has_no_energy(self, distance):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(2, 1, 4, 8, generator=generator).expand(2, 3, 4, 8).clone()
        tokens[0, 2, 1] = torch.randn(8, generator=generator)
        kept = rows(et.EnergyBudget(0.99, 2, distance=distance)(tokens.flatten(1, 2), GRID), 12)
        assert kept == [[0, 9], [0, 1]]  # the one that changed and the first; a static clip's first two

    def test_energy_is_eq_2_of_the_settings(self):
        generator = torch.Generator().manual_seed(0)
        tokens, before = (torch.randn(2, 12, 5, generator=generator) for _ in range(2))
        for distance in ("l1", lambda a, b: (a - b).abs().amax(-1)):
            budget, rero = et.EnergyBudget(0.8, distance=distance), et.ReRoSelector(1.0, distance=distance)
            for previous in (None, before):
                energy = rero.importance(tokens, GRID, previous).double().square()
                wanted = []
                for clip in energy.tolist():
                    order = sorted(range(12), key=lambda i, clip=clip: (-clip[i], i))
                    count = next(k for k in range(1, 13) if sum(clip[i] for i in order[:k]) >= 0.8 * sum(clip))
                    wanted.append(sorted(order[:count]))
                assert rows(budget(tokens, GRID, previous), 12) == wanted

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"cover": 0.0}, r"cover must be a number in \(0, 1\], got 0.0"),
            ({"cover": 1.1}, "cover must be"),
            ({"min_tokens": 0}, "min_tokens must be a whole number of at least 1, got 0"),
            ({"min_tokens": 2.5}, "min_tokens must be"),
            ({"min_tokens": 9, "max_tokens": 8}, "max_tokens must be None or at least min_tokens 9, got 8"),
            ({"max_tokens": True}, "max_tokens must be"),
            ({"distance": "l3"}, "distance must be"),
            ({"camera": "shake"}, "camera must be"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            et.EnergyBudget(**settings)

    def test_cover_is_the_decimal_that_was_meant(self):
        """Of 100 equal tokens 0.07 is 7, although 0.07 · 100 as floats is a little more; so are four others."""
        grid, tokens = (25, 2, 2), torch.arange(25.0).repeat_interleave(4).view(1, 100, 1)
        assert [share for share in range(1, 101) if share / 100 * 100 > share] == [7, 14, 28, 55, 56]
        for share in (7, 14, 28, 50, 55, 56, 100):
            assert rows(et.EnergyBudget(share / 100)(tokens, grid), 100) == [list(range(share))]

    def test_it_has_no_keep_ratio(self):
        budget = et.EnergyBudget()
        assert budget.keep_ratio is None
        with pytest.raises(ValueError, match=r"no share of 0\.3"):
            budget.keep_ratio = 0.3

    def test_limits_that_do_not_fit_the_clip(self):
        for budget in (et.EnergyBudget(max_tokens=13), et.EnergyBudget(min_tokens=13)):
            with pytest.raises(ValueError, match=r"max_tokens ≤ 12, the tokens of grid \(3, 2, 2\)"):
                budget(torch.zeros(1, 12, 2), GRID)
        budget = et.EnergyBudget(min_tokens=3, max_tokens=6)
        budget.min_tokens = 7
        with pytest.raises(ValueError, match="got 7 and 6"):
            budget(torch.zeros(1, 12, 2), GRID)


def by_loops(frames: Tensor, grid: tuple[int, int, int], threshold: float) -> list[list[int]]:
    """RLT's rule, a token at a time."""
    t, h, w = grid
    f, p, q = frames.shape[1] // t, frames.shape[3] // h, frames.shape[4] // w
    found = []
    for clip in frames.double():
        kept = []
        for i, y, x in itertools.product(range(t), range(h), range(w)):
            patch = clip[:, :, y * p : (y + 1) * p, x * q : (x + 1) * q]
            if i == 0 or (patch[i * f + f - 1] - patch[(i - 1) * f]).abs().mean() > threshold:
                kept.append(i * h * w + y * w + x)
        found.append(kept)
    return found


class TestRunLengthSelector:
    @pytest.mark.parametrize("tubelet", [1, 2, 3])
    @pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 9.0])
    def test_against_loops(self, tubelet, threshold):
        grid = (3, 2, 4)
        generator = torch.Generator().manual_seed(tubelet)
        frames = torch.randn(2, 1, 3, 8, 20, generator=generator).expand(2, 3 * tubelet, 3, 8, 20).clone()
        frames += torch.rand(2, 3 * tubelet, 1, 8, 20, generator=generator) * torch.linspace(0, 1, 20)
        frames[..., :5] = frames[:, :1, ..., :5]
        kept = rows(et.RunLengthSelector(threshold)(torch.zeros(2, 24, 1), grid, frames), 24)
        assert kept == by_loops(frames, grid, threshold)
        assert {0.0: 2 < len(kept[0]) < 24, 9.0: len(kept[0]) == 8}.get(threshold, 8 <= len(kept[0]) < 24)

    def test_which_frames_are_compared(self):
        """Two frames a tubelet, one place: the last of a tubelet with the first of the one before, nothing else."""
        for moved, kept in {0: [0, 1], 1: [0], 2: [0, 2], 3: [0, 1], 4: [0], 5: [0, 2]}.items():
            frames = torch.zeros(1, 6, 1, 2, 2)
            frames[:, moved] = 0.2
            assert rows(et.RunLengthSelector(0.1)(torch.zeros(1, 3, 1), (3, 1, 1), frames), 3) == [kept]

    def test_as_much_as_the_threshold_is_no_change(self):
        frames = torch.tensor([0.0, 0.5, 0.75]).view(1, 3, 1, 1, 1)
        selector = et.RunLengthSelector(0.25)
        assert rows(selector(torch.zeros(1, 3, 1), (3, 1, 1), frames), 3) == [[0, 1]]

    def test_bad_input(self):
        for threshold in (-0.1, float("inf")):  # JSON, and so a saved folder, knows no infinity
            with pytest.raises(ValueError, match="threshold must be a finite number of at least 0, got"):
                et.RunLengthSelector(threshold)
        with pytest.raises(ValueError, match=r"expected frames \(B, T, C, H, W\) of grid \(3, 2, 2\), got"):
            et.RunLengthSelector()(torch.zeros(1, 12, 1), GRID, torch.zeros(1, 4, 3, 4, 4))


@pytest.mark.parametrize(
    "selector",
    [et.EnergyBudget(0.8, 3, 9, "l1", "compensate"), et.EnergyBudget(), et.RunLengthSelector(0.2)],
)
def test_settings_are_recorded(selector):
    policy = SelectionPolicy("encoder", selector, 0.9, None, None)
    again = selector_from(policy.settings["selector"], "selector")
    assert type(again) is type(selector)
    assert again.settings == selector.settings
    assert not list(again.state_dict())


class TestSelection:
    @pytest.fixture
    def selection(self) -> et.TokenSelection:
        policy = SelectionPolicy("encoder", et.EnergyBudget(0.9, 2), 0.9, None, None)
        tokens = tokens_of([[3, 0, 0, 1, 0, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1], [0] * 8])
        return policy.select(tokens, GRID, with_importance=True)

    def test_fields(self, selection):
        assert selection.lengths.tolist() == [3, 5, 2]
        assert selection.visible.tolist() == [[0, 4, 9, 12, 12], [0, 1, 4, 5, 11], [0, 1, 12, 12, 12]]
        assert selection.kept is selection.visible
        assert selection.frame_counts.tolist() == [[1, 1, 1], [2, 2, 1], [2, 0, 0]]
        assert selection.importance[0].tolist() == [3, 0, 0, 1, 3, 0, 0, 1, 0, 2, 0, 0]
        assert [kept_map(selection, clip).flatten().nonzero().flatten().tolist() for clip in range(3)] == [
            *([0, 4, 9], [0, 1, 4, 5, 11], [0, 1]),
        ]

    def test_what_fills_up_a_row_is_an_index_of_nothing(self, selection):
        with pytest.raises((IndexError, RuntimeError)):
            torch.zeros(math.prod(GRID))[selection.visible]
        with pytest.raises((IndexError, RuntimeError)):
            torch.zeros(3, math.prod(GRID)).gather(1, selection.visible)

    def test_a_pytree(self, selection):
        leaves, structure = pytree.tree_flatten(selection)
        again = pytree.tree_unflatten(leaves, structure)
        for field in dataclasses.fields(selection):
            actual, expected = getattr(again, field.name), getattr(selection, field.name)
            assert actual is expected or actual == expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"lengths": torch.tensor([3, 5])},
                r"must be int64 \(3,\), without targets, got torch.int64 \(2,\)",
            ),
            ({"lengths": torch.tensor([3.0, 5, 2])}, "got torch.float32"),
            ({"target": torch.zeros(3, 1, dtype=torch.int64)}, "and targets"),
            ({"lengths": torch.tensor([3, 5, 0])}, r"lengths must be in 1…5, .* got 0"),
            ({"lengths": torch.tensor([3, 6, 2])}, "got 6"),
            ({"lengths": torch.tensor([2, 5, 2])}, "12 fill up rows of visible: got 2"),
            ({"lengths": torch.tensor([4, 5, 2])}, "must be positions in 0…11"),
            ({"visible": torch.tensor([[0, 4, 4, 12, 12]] * 3), "lengths": torch.tensor([3] * 3)}, "ascending"),
            ({"visible": torch.tensor([[0, 4, 9, -1, -1]] * 3), "lengths": torch.tensor([3] * 3)}, "fill up"),
            ({"lengths": None}, "must be positions in 0…11"),
        ],
    )
    def test_one_that_does_not_fit(self, selection, change, message):
        check_selection(selection, GRID, 3, "encoder", None)
        with pytest.raises(ValueError, match=message):
            check_selection(dataclasses.replace(selection, **change), GRID, 3, "encoder", None)


def test_the_variable_length_kernel_is_called_as_torch_documents_it(monkeypatch):
    """A stand-in for it by the definition of attention, on the CPU: layout, boundaries, scale."""
    from everest_tokens.hosts import packing

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    where = packing.Packing([4, 2, 3], torch.tensor([0, 4, 6, 9], dtype=torch.int32))
    calls = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int) -> Any:
        calls.append((tuple(q.shape), ends_q.dtype, most_q, most_k))
        output = torch.zeros_like(q)
        for start, end in itertools.pairwise(ends_q.tolist()):
            for head in range(q.shape[1]):
                scores = q[start:end, head] @ k[start:end, head].T / math.sqrt(q.shape[2])
                output[start:end, head] = scores.softmax(-1) @ v[start:end, head]
        return output

    monkeypatch.setattr(packing._thread, "packing", where, raising=False)
    clip_by_clip, _ = packing.attention(SimpleNamespace(), query, key, value, None, scaling=8**-0.5)
    monkeypatch.setattr(packing, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(packing, "varlen", SimpleNamespace(varlen_attn=varlen_attn))
    packed, _ = packing.attention(SimpleNamespace(), query, key, value, None, scaling=8**-0.5)
    assert calls == [((9, 2, 8), torch.int32, 4, 4)]
    torch.testing.assert_close(packed, clip_by_clip)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_on_a_gpu(dtype):
    from everest_tokens.hosts import packing

    query, key, value = (torch.randn(1, 12, 900, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    assert packing._has_kernel(query, 0.0, 64**-0.5)
    ends = torch.tensor([0, 300, 310, 900], dtype=torch.int32, device="cuda")
    packing._thread.packing = packing.Packing([300, 10, 590], ends)
    try:
        packed, _ = packing.attention(SimpleNamespace(), query, key, value, None, scaling=64**-0.5)
        gradients = torch.autograd.grad(packed.square().sum(), (query, key, value))
        exact = [each.detach().double().requires_grad_() for each in (query, key, value)]  # float64 has no kernel
        expected, _ = packing.attention(SimpleNamespace(), *exact, None, scaling=64**-0.5)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
    finally:
        packing._thread.packing = None
    torch.testing.assert_close(packed.double(), expected, rtol=0.02, atol=0.02)
    for actual, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual.double(), gradient, rtol=0.05, atol=0.05)
