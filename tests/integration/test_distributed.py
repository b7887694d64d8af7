"""Two gloo processes, each with half of the batch: DDP and FSDP2 must give the gradients of one process."""

from __future__ import annotations

import copy
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et

WORLD, BATCH, LIMIT = 2, 4, 150  # processes, clips, seconds for all scenarios together

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def part_of(selection: et.TokenSelection, rows: slice) -> et.TokenSelection:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[rows], selection)


def loss_of(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output.last_hidden_state.square().mean()


UNITS = {
    "fsdp": ("VideoMAEEmbeddings", "VideoMAELayer"),  # what transformers' _no_split_modules names
    "fsdp, blocks alone": ("VideoMAELayer",),
    "fsdp, projection alone": ("Conv3d", "VideoMAELayer"),
}


def shard(model: Any, how: str = "fsdp") -> Any:
    """fully_shard each module of the named classes, then the root."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if type(module).__name__ in UNITS[how]:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(model: Any, how: str) -> Any:
    if how == "ddp":
        return DistributedDataParallel(model)
    return shard(model, how)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    return found


def steps(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Two training steps on this rank's half; the second shows what the first left behind."""
    model = task["model"].train()
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    wrapped = wrap(model, task["how"])
    if task.get("patch wrapped"):
        et.patch_videomae(wrapped, et.ReRoSelector(0.5))
    inputs = {key: value[rows] for key, value in task["inputs"].items() if key != "token_selection"}
    inputs["token_selection"] = part_of(task["inputs"]["token_selection"], rows)
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = loss_of(wrapped(**inputs))
        loss.backward()
        results.append(gradients(model))
    del inputs["token_selection"]
    own = loss_of(wrapped(**inputs)).item()  # selecting in forward runs as well
    return {"gradients": results, "own loss": own}


def refusal(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Patching a sharded model, root or a part of it."""
    from torch.distributed.fsdp import fully_shard

    messages = []
    whole, partly = task["model"], copy.deepcopy(task["model"])
    shard(whole)
    fully_shard(partly.videomae.encoder.layer[0], mesh=init_device_mesh("cpu", (WORLD,)))
    for model in (whole, partly):
        try:
            et.patch_videomae(model)
        except TypeError as error:
            messages.append(str(error))
        else:
            messages.append("no TypeError")
    return {"messages": messages, "patched": hasattr(whole, "everest")}


def select_then_train(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """select_tokens and count_flops on a wrapped model, before its first forward or only between its steps."""
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    wrapped = wrap(task["model"].train(), task["how"])
    clips = task["inputs"]["pixel_values"][rows]
    labels = task["inputs"]["labels"][rows]
    kept, results = [], []

    def select() -> None:
        try:
            kept.append(et.select_tokens(wrapped, clips).kept)
        except TypeError as error:  # a refusal in words will do, as long as it leaves the model working
            if task["how"] == "ddp" or "FSDP" not in str(error):
                raise

    if task["first"]:
        select()
    for _ in range(2):
        task["model"].zero_grad()
        loss_of(wrapped(pixel_values=clips, labels=labels)).backward()
        results.append(gradients(task["model"]))
        select()
    return {"gradients": results, "kept": kept}


def count(task: dict[str, Any], rank: int) -> dict[str, Any]:
    return {"total": et.count_flops(wrap(task["model"], task["how"])).total}


RUNS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "steps": steps,
    "refusal": refusal,
    "select": select_then_train,
    "count": count,
}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for file in sorted(Path(folder).glob("task-*.pt")):
        task = torch.load(file, weights_only=False)
        try:
            result = RUNS[task["run"]](task, rank)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, Path(folder) / f"result-{rank}-{file.name}")
        dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


CLASSES = [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel]
WRAPPINGS = ["ddp", *UNITS]


@pytest.fixture(scope="module")
def runs(make_model, make_clips, tmp_path_factory) -> dict[Any, Any]:
    """All scenarios in one pair of processes: importing transformers twice takes longer than running them."""
    folder = tmp_path_factory.mktemp("distributed")
    tasks: dict[Any, dict[str, Any]] = {}
    references: dict[Any, Any] = {}
    for cls in CLASSES:
        model = et.patch_videomae(make_model(cls).double(), et.ReRoSelector(0.5), mask_ratio=0.75)
        inputs = {"pixel_values": make_clips(model, batch=BATCH)}
        inputs["token_selection"] = et.select_tokens(model, inputs["pixel_values"])
        if cls is VideoMAEForVideoClassification:
            inputs["labels"] = torch.tensor([1, 4, 0, 2])
        for how in WRAPPINGS:
            tasks[cls, how] = {"run": "steps", "model": model, "how": how, "inputs": inputs}
        if cls is VideoMAEForVideoClassification:
            plain = make_model(cls).double()
            late = {"run": "steps", "model": plain, "how": "ddp", "inputs": inputs, "patch wrapped": True}
            tasks[cls, "patched in ddp"] = late
            tasks["refusal"] = {"run": "refusal", "model": plain}
            for how in WRAPPINGS[:3]:
                tasks["count", how] = {"run": "count", "model": model, "how": how}
                for first in (True, False):
                    task = {"run": "select", "model": model, "how": how, "inputs": inputs, "first": first}
                    tasks["select", how, first] = task
    for index, task in enumerate(tasks.values()):
        torch.save(task, folder / f"task-{index:02}.pt")
    for cls in CLASSES:
        task = tasks[cls, "ddp"]
        loss_of(task["model"].train()(**task["inputs"])).backward()
        references[cls] = gradients(task["model"])

    context = torch.multiprocessing.spawn(worker, (free_port(), str(folder)), nprocs=WORLD, join=False)
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            break
    results: dict[Any, Any] = {
        "references": references,
        "inputs": tasks["select", "ddp", True]["inputs"],
        "total": et.count_flops(tasks["count", "ddp"]["model"]).total,
    }
    for index, key in enumerate(tasks):
        files = [folder / f"result-{rank}-task-{index:02}.pt" for rank in range(WORLD)]
        results[key] = [
            torch.load(file) if file.exists() else {"error": f"no result within {LIMIT} s"} for file in files
        ]
    return results


def results_of(runs: dict[Any, Any], key: Any) -> list[dict[str, Any]]:
    for result in runs[key]:
        if "error" in result:
            pytest.fail(result["error"])
    return runs[key]


def assert_gradients(result: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    for step in result["gradients"]:
        assert step.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(step[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("how", WRAPPINGS)
@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_are_those_of_one_process(runs, cls, how):
    for result in results_of(runs, (cls, how)):
        assert_gradients(result, runs["references"][cls])
        assert result["own loss"] > 0


def test_patching_through_ddp(runs):
    for result in results_of(runs, (VideoMAEForVideoClassification, "patched in ddp")):
        assert_gradients(result, runs["references"][VideoMAEForVideoClassification])


def test_a_sharded_model_is_refused(runs):
    for result in results_of(runs, "refusal"):
        for message in result["messages"]:
            assert "FSDP" in message
            assert "patch_videomae before" in message
        assert not result["patched"]


@pytest.mark.parametrize("first", [True, False], ids=["before the first forward", "between steps"])
@pytest.mark.parametrize("how", WRAPPINGS[:3])
def test_selecting(runs, how, first):
    for rank, result in enumerate(results_of(runs, ("select", how, first))):
        expected = runs["inputs"]["token_selection"].kept[rank * 2 : rank * 2 + 2]
        assert len(result["kept"]) == 2 + first or how != "ddp"
        assert all(torch.equal(kept, expected) for kept in result["kept"])
        assert_gradients(result, runs["references"][VideoMAEForVideoClassification])


@pytest.mark.parametrize("how", WRAPPINGS[:3])
def test_counting(runs, how):
    for result in results_of(runs, ("count", how)):
        assert result["total"] == runs["total"]


def test_a_model_that_accelerate_prepared_is_refused(make_model):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(
        make_model(VideoMAEForVideoClassification)
    )
    assert isinstance(prepared, nn.Module)
    with pytest.raises(TypeError, match="patch_videomae before"):
        et.patch_videomae(prepared)
