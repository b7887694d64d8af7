"""measuring.py: bytes kept for backward counted by hand, and runs that are really paired."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from measuring import (
    allocated_bytes,
    bytes_saved_for_backward,
    inference_step,
    median_ratio,
    paired_seconds,
    peak_bytes,
    training_step,
    videomae_mask,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def test_a_linear_layer_keeps_its_input():
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    assert bytes_saved_for_backward(lambda: layer(x), exclude=layer.parameters()) == 5 * 8 * 4
    assert bytes_saved_for_backward(lambda: layer(x), exclude=(*layer.parameters(), x)) == 0


def test_a_storage_counts_once_and_whole():
    x = torch.randn(6, 8, requires_grad=True)
    # Two products of one tensor with itself, and one of a view of it: a single storage of 6·8 floats.
    assert bytes_saved_for_backward(lambda: (x * x, x.T * x.T, x[:2] * x[:2])) == 6 * 8 * 4


def test_tensors_freed_during_forward_are_not_confused():
    x = torch.randn(64, requires_grad=True)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(5):
            y = y.sin()  # keeps its input
        return y

    assert bytes_saved_for_backward(chain) == 5 * 64 * 4


def test_nothing_that_was_counted_outlives_the_count(monkeypatch):
    """Softmax and exp keep their own output: a hook that returned that very tensor would close a cycle."""
    seen: list[StorageWeakRef] = []
    saved_tensors_hooks = torch.autograd.graph.saved_tensors_hooks

    def watching(pack, unpack):
        def watched(tensor: Tensor) -> Tensor:
            seen.append(StorageWeakRef(tensor.untyped_storage()))
            return pack(tensor)

        return saved_tensors_hooks(watched, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watching)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8)), torch.randn(5, 8)
    expected = 5 * 8 * 4 * 2  # softmax's output, which the second layer takes, and exp's
    assert bytes_saved_for_backward(lambda: model(x).exp(), exclude=(*model.parameters(), x)) == expected
    lasting = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), x)}
    passing = [storage for storage in seen if storage.cdata not in lasting]
    assert len(passing) >= 3
    assert all(storage.expired() for storage in passing)


def test_runs_take_turns():
    order: list[str] = []
    ticks: list[None] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = paired_seconds(steps, 3, warmup=2, progress=lambda: ticks.append(None))
    assert order == ["a", "b"] * 5
    assert len(ticks) == 10
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time >= 0 for times in seconds.values() for time in times)


def test_the_ratio_is_taken_pair_by_pair():
    # The machine is ten times slower in the second pair: the ratio of the medians would be 1.5 / 2 = 0.75.
    assert median_ratio([1.0, 10.0, 1.5], [2.0, 20.0, 2.0]) == 0.5
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_videomaes_mask_hides_the_same_176_of_196_places_at_every_step():
    mask = videomae_mask(3, (8, 14, 14)).view(3, 8, 196)
    assert (mask.sum(dim=2) == 176).all()
    assert (mask == mask[:, :1]).all()
    assert not torch.equal(mask[0], mask[1])


class Scale(nn.Module):
    """loss = (weight · x)², whose gradient is 2 · weight · x²."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.dtype = (pixel_values @ pixel_values).dtype
        return SimpleNamespace(loss=(self.weight * pixel_values).square().sum())


@pytest.mark.parametrize("optimized", [True, False])
def test_a_training_step_updates_only_with_an_optimizer_and_leaves_no_gradient(optimized):
    model, seen = Scale(), []
    model.weight.register_hook(lambda gradient: seen.append(gradient.item()))
    step = training_step(model, {"pixel_values": torch.tensor([3.0])}, optimized=optimized)
    step()
    assert seen == [36.0]
    assert model.weight.grad is None
    assert (model.weight.item() < 2.0) == optimized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_runs_its_forward_in_the_autocast_dtype(dtype):
    model = Scale()
    training_step(model, {"pixel_values": torch.ones(2, 2)}, dtype=dtype)()
    assert model.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_keeps_nothing_and_runs_in_the_autocast_dtype(dtype):
    model, outputs = Scale(), []
    model.register_forward_hook(lambda module, args, kwargs, out: outputs.append(out.loss), with_kwargs=True)
    inference_step(model, {"pixel_values": torch.ones(2, 2)}, dtype=dtype)()
    assert model.dtype == dtype
    assert outputs[0].is_inference()
    assert model.weight.grad is None


def test_the_peak_is_of_one_step_from_a_clean_start(monkeypatch):
    order: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: order.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: order.append("read") or 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert peak_bytes(lambda: order.append("step"), torch.device("cuda")) == (5, 7)
    assert order == ["synchronize", "empty_cache", "reset_peak_memory_stats", "step", "synchronize", "read"]


def test_what_is_allocated_is_read_without_cublas_workspaces(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: order.append("clear"), raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: order.append("read") or 5)
    assert allocated_bytes(torch.device("cuda")) == 5
    assert order == ["synchronize", "clear", "read"]
