"""Two gloo processes, each with half of the batch: DDP and FSDP2 must give the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from host_case import HostCase, weighted
from host_contract import CASES, kinds
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import VideoMAEForVideoClassification

import everest_tokens as et

WORLD, BATCH, LIMIT = 2, 4, 240  # processes, clips, seconds for all scenarios together
WRAPPINGS = ["ddp", "fsdp, projection too"]
OTHERS, LIBRARIES = ["fsdp", "fsdp, embedding too"], ("VideoMAEForPreTraining", "videomae-pretraining", "vit")

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def part_of(selection: et.TokenSelection, rows: slice) -> et.TokenSelection:
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor[rows], selection)


def rows_of(rank: int) -> slice:
    return slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)


def wrap(case: HostCase, model: Any, how: str) -> Any:
    """DDP, or fully_shard of each block (and of the embedding or its projection), then of the root."""
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    # transformers' embeddings are the unit that its _no_split_modules names
    embedding = case.projection.removesuffix(".patch_embeddings.projection").removesuffix(".proj")
    more = {"fsdp, embedding too": [embedding], "fsdp, projection too": [case.projection]}.get(how, [])
    for module in [*model.get_submodule(case.blocks), *map(model.get_submodule, more)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: Any) -> dict[str, Tensor]:
    """Whole ones, of a sharded model too."""
    found = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    return found


def train(case: HostCase, how: str, rank: int, late: bool = False) -> dict[str, Any]:
    """Two steps on this rank's half, selecting before each: the second shows what the first left behind.

    A sharded model may refuse to select, but must go on working.
    """
    model = (case.build(0).double() if late else case.patched()).train()
    wrapped = wrap(case, model, how)
    if late:
        try:
            case.patch(wrapped)
        except TypeError as error:
            return {"refused": str(error)}
    clips, selection = case.clips(BATCH)[rows_of(rank)], part_of(case.selection(BATCH), rows_of(rank))
    kept, steps = [], []
    for _ in range(2):
        try:
            kept.append(et.select_tokens(wrapped, clips).kept)
        except TypeError as error:
            if how == "ddp" or "FSDP" not in str(error):
                raise
        model.zero_grad()
        weighted(case.run(wrapped, clips, selection)).backward()
        steps.append(gradients(model))
    with torch.no_grad():
        own = case.run(wrapped, clips)  # selecting in forward
    return {"gradients": steps, "kept": kept, "own": own, "flops": et.count_flops(wrapped).total}


def patch_sharded(case: HostCase, how: str, rank: int) -> dict[str, Any]:
    """Patching a model that is sharded, whole or only one block of it."""
    from torch.distributed.fsdp import fully_shard

    whole, partly, messages = case.build(0), case.build(0), []
    wrap(case, whole, "fsdp")
    fully_shard(partly.get_submodule(case.blocks)[0], mesh=init_device_mesh("cpu", (WORLD,)))
    for model in (whole, partly):
        try:
            case.patch(model)
        except TypeError as error:
            messages.append(str(error))
        else:
            messages.append("no TypeError")
    return {"messages": messages, "patched": hasattr(whole, "everest") or hasattr(partly, "everest")}


def replace_kernel(case: HostCase, how: str, rank: int) -> dict[str, Any]:
    """What gives a timm model another kernel, through DDP: refused, or the kernel's gradient after it."""
    found: dict[str, Any] = {}
    for change in ("unpatched", "other tubelets"):
        model = case.patched().train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # without, torch itself complains
        clips = torch.full_like(case.clips(), rank + 1.0)
        try:
            if change == "unpatched":
                et.unpatch_videomae(wrapped)
                clips = clips[:, :, 0]
            else:
                et.patch_videomae(wrapped, num_frames=6, tubelet_size=3)
        except TypeError as error:
            found[change] = str(error)
        else:
            weighted(wrapped(clips)).backward()
            found[change] = gradients(model)[f"{case.projection}.weight"]
    return found


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "late": lambda case, how, rank: train(case, how, rank, late=True),
    "refuse": patch_sharded,
    "replace": replace_kernel,
}


def tasks() -> list[tuple[str, str, str]]:
    """(what, host, how) of every scenario."""
    listed = []
    for case in CASES:
        if not case.variant and not (case.skip and case.skip.args[0]):
            listed += [("train", case.name, how) for how in WRAPPINGS + OTHERS * (case.name in LIBRARIES)]
            listed += [("late", case.name, "ddp"), ("refuse", case.name, "fsdp")]
            listed += [("replace", case.name, "ddp")] if case.image_model else []
    return listed


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    named = {case.name: case for case in CASES}
    for index, (what, host, how) in enumerate(tasks()):
        try:
            result = RUNS[what](named[host], how, rank)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{rank}-{index}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """All scenarios in one pair of processes, which fork once transformers is imported: that is what takes longest."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder)]
    log = subprocess.run(command, env=environment, timeout=LIMIT, capture_output=True, text=True).stderr
    index = {task: number for number, task in enumerate(tasks())}

    def of(what: str, case: HostCase, how: str) -> list[dict[str, Any]]:
        files = [folder / f"{rank}-{index[what, case.name, how]}.pt" for rank in range(WORLD)]
        found = [torch.load(file) if file.exists() else {"error": f"no result: {log[-2000:]}"} for file in files]
        for result in found:
            if "error" in result:
                pytest.fail(result["error"])
        return found

    return of


def assert_trained_as_one_process(case: HostCase, found: list[dict[str, Any]]) -> None:
    model, loss = case.patched().train(), torch.zeros(())
    for rank in range(WORLD):
        clips, selection = case.clips(BATCH)[rows_of(rank)], part_of(case.selection(BATCH), rows_of(rank))
        loss = loss + weighted(case.run(model, clips, selection)) / WORLD
    loss.backward()
    wanted = gradients(model)
    for result in found:
        assert len(result["gradients"]) == 2
        for step in result["gradients"]:
            case.close_gradients(step, wanted, 1e-9)


@pytest.mark.parametrize("how", WRAPPINGS)
@kinds()
def test_gradients_are_those_of_one_process(results, case, how):
    check_training(results("train", case, how), case, how)


@pytest.mark.parametrize("how", OTHERS)
@kinds(lambda case: case.name in LIBRARIES)
def test_gradients_of_other_units(results, case, how):
    check_training(results("train", case, how), case, how)


def check_training(found: list[dict[str, Any]], case: HostCase, how: str) -> None:
    assert_trained_as_one_process(case, found)
    model = case.patched().train()
    flops = et.count_flops(model).total
    for rank, result in enumerate(found):
        clips = case.clips(BATCH)[rows_of(rank)]
        case.close(result["own"], case.run(model, clips))
        assert result["flops"] == flops
        assert len(result["kept"]) == 2 or how != "ddp"
        assert all(torch.equal(kept, et.select_tokens(model, clips).kept) for kept in result["kept"])


@kinds()
def test_patching_through_ddp_works_or_is_refused(results, case):
    """timm's kernel is replaced by another parameter, which DDP would not reduce."""
    found = results("late", case, "ddp")
    if case.image_model and all("refused" in result for result in found):
        assert all("DistributedDataParallel" in result["refused"] for result in found)
        return
    assert_trained_as_one_process(case, found)


@kinds()
def test_a_sharded_model_is_refused(results, case):
    for result in results("refuse", case, "fsdp"):
        assert len(result["messages"]) == 2
        assert all("FSDP" in message and "patch_videomae before" in message for message in result["messages"])
        assert not result["patched"]


@pytest.mark.parametrize("change", ["unpatched", "other tubelets"])
@kinds(lambda case: case.image_model)
def test_no_kernel_trains_outside_ddp(results, case, change):
    first, second = (result[change] for result in results("replace", case, "ddp"))
    if isinstance(first, str):
        assert "DistributedDataParallel" in first
        assert first == second
    else:
        case.close(first, second, 1e-9)  # reduced: the processes had different clips


def test_a_model_that_accelerate_prepared_is_refused(make_model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, whoever made it
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(
        make_model(VideoMAEForVideoClassification)
    )
    assert isinstance(prepared, nn.Module)
    with pytest.raises(TypeError, match="patch_videomae before"):
        et.patch_videomae(prepared)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
