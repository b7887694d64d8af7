"""The VideoMAE family's own classes and timm ViTs where they are trained: the same tools as around transformers."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from family_models import FineTuningModel, PreTrainingModel, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from test_distributed import LIMIT, WORLD, free_port, gradients, part_of
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Trainer,
    TrainingArguments,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    default_data_collator,
)

import everest_tokens as et

BATCH = 4
TIMM: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64


def image_model(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny timm model over 2 × 3 places whose every parameter is random."""
    patch = 14 if "patch14" in name else 16
    model = timm.create_model(name, pretrained=False, **{"img_size": (2 * patch, 3 * patch), **TIMM, **options})
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        spread = 0.03 if parameter.ndim == 4 else 0.2
        parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator) + around)
    return model.eval()


def vit(seed: int = 0, **options: Any) -> Any:
    return image_model("vit_tiny_patch16_224", seed, **options)


HOSTS: dict[str, Callable[..., Any]] = {  # unpatched and in eval mode; 32 to 48 tokens
    "fine-tuning": lambda seed=0, **options: randomize(FineTuningModel(**options), seed),
    "mvd": lambda seed=0, **options: randomize(FineTuningModel("mvd", use_cls_token=True, **options), seed),
    "pre-training": lambda seed=0, **options: randomize(PreTrainingModel(**options), seed),
    "vit": vit,
    "eva": lambda seed=0, **options: image_model("eva02_tiny_patch14_224", seed, **options),
}
FAMILY = ["fine-tuning", "mvd", "pre-training"]


def patch(model: Any, keep_ratio: float = 0.5) -> Any:
    """Pre-training sees a quarter of the tokens; timm's clips have 8 frames as the family's."""
    is_timm = any(type(module).__module__.startswith("timm.models") for module in model.modules())  # in wrappers too
    time_axis = {"num_frames": 8} if is_timm else {}
    return et.patch_videomae(model, et.ReRoSelector(keep_ratio), mask_ratio=0.75, **time_axis)


def clips_for(model: Any, batch: int = 2, seed: int = 1) -> Tensor:
    """(B, 3, 8, H, W) of the model's dtype."""
    patches = getattr(model, "encoder", model).patch_embed
    clips = torch.randn(batch, 3, 8, *patches.img_size, generator=torch.Generator().manual_seed(seed))
    return clips.to(patches.proj.weight.dtype)


def pixel_patches(videos: Tensor, size: int = 16) -> Tensor:
    """What the repositories' loops call videos_patch: normalised per patch and channel, (B, N, 2·size²·3)."""
    squeezed = rearrange(videos, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", p0=2, p1=size, p2=size)
    mean, deviation = squeezed.mean(dim=-2, keepdim=True), squeezed.var(dim=-2, unbiased=True, keepdim=True).sqrt()
    return rearrange((squeezed - mean) / (deviation + 1e-6), "b n p c -> b n (p c)")


def loss_of(output: Any, clips: Tensor) -> Tensor:
    """Of a classifier over classes 0, 1, 2, …; of a pre-training model against its targets' pixels."""
    if not isinstance(output, tuple):
        return F.cross_entropy(output, torch.arange(len(output)))
    prediction, (_, target_mask) = output
    patches = pixel_patches(clips)
    return F.mse_loss(prediction, patches[~target_mask].reshape(len(clips), -1, patches.shape[2]))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


# --- two gloo processes -------------------------------------------------------------------------------------------

WRAPPINGS = ["ddp", "fsdp", "fsdp, embedding too"]
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def blocks_of(model: Any) -> list[nn.Module]:
    if hasattr(model, "encoder"):
        return [*model.encoder.blocks, *model.decoder.blocks]
    return [*model.blocks]


def wrap(model: Any, how: str) -> Any:
    """DDP, or fully_shard of each block, then of the root."""
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    if how == "fsdp, embedding too":
        fully_shard(getattr(model, "encoder", model).patch_embed, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_wrapped(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Two steps on this rank's half: a second one shows what the first left behind."""
    model = task["model"].train()
    wrapped = wrap(model, task["how"])
    if task.get("late"):
        try:
            patch(wrapped)
        except TypeError as error:
            return {"refused": str(error)}
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    clips, selection = task["clips"][rows], part_of(task["selection"], rows)
    losses, steps = [], []
    for _ in range(2):
        model.zero_grad()
        loss = loss_of(wrapped(clips, token_selection=selection), clips)
        loss.backward()
        losses.append(loss.item())
        steps.append(gradients(model))
    with torch.no_grad():
        own = loss_of(wrapped(clips), clips).item()  # selecting in forward
    return {"losses": losses, "gradients": steps, "own": own, "flops": et.count_flops(wrapped).total}


def patch_sharded(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Patching a model that is sharded, whole or only one block of it."""
    from torch.distributed.fsdp import fully_shard

    messages = []
    whole, partly = task["model"], copy.deepcopy(task["model"])
    wrap(whole, "fsdp")
    fully_shard(blocks_of(partly)[0], mesh=init_device_mesh("cpu", (WORLD,)))
    for model in (whole, partly):
        try:
            patch(model)
        except TypeError as error:
            messages.append(str(error))
        else:
            messages.append("no TypeError")
    return {"messages": messages, "patched": hasattr(whole, "everest") or hasattr(partly, "everest")}


def replace_kernel(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """What else gives a timm model another kernel, through DDP: refused, or the kernel's gradient after it."""
    found: dict[str, Any] = {}
    for change in ("unpatched", "other tubelets"):
        model = copy.deepcopy(task["model"]).train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # without, torch itself complains
        clips = torch.full_like(task["clips"][:2], rank + 1.0)
        try:
            if change == "unpatched":
                et.unpatch_videomae(wrapped)
                clips = clips[:, :, 0]
            else:
                et.patch_videomae(wrapped, num_frames=8, tubelet_size=4)
        except TypeError as error:
            found[change] = str(error)
        else:
            loss_of(wrapped(clips), clips).backward()
            found[change] = gradients(model)["patch_embed.proj.weight"]
    return found


RUNS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "train": train_wrapped,
    "refuse": patch_sharded,
    "replace": replace_kernel,
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


def halves_in_one_process(model: Any, clips: Tensor, selection: et.TokenSelection) -> dict[str, Any]:
    """What the two processes must find, with no wrapper and the whole batch."""
    model = copy.deepcopy(model).train()
    loss = 0.0
    half = BATCH // WORLD
    for start in range(0, BATCH, half):  # each rank's classes begin at 0
        rows = slice(start, start + half)
        loss = loss + loss_of(model(clips[rows], token_selection=part_of(selection, rows)), clips[rows]) / WORLD
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients(model), "flops": et.count_flops(model).total}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[Any, Any]:
    """All scenarios in one pair of processes."""
    folder = tmp_path_factory.mktemp("other-hosts")
    tasks: dict[Any, dict[str, Any]] = {}
    results: dict[Any, Any] = {"expected": {}}
    for host, build in HOSTS.items():
        plain = build().double()
        clips = clips_for(plain, BATCH)
        tasks["refuse", host] = {"run": "refuse", "model": plain}
        model = patch(copy.deepcopy(plain))
        task = {"run": "train", "clips": clips, "selection": et.select_tokens(model, clips)}
        results["expected"][host] = halves_in_one_process(model, clips, task["selection"])
        for how in WRAPPINGS:
            tasks[host, how] = {**task, "model": model, "how": how}
        tasks["late", host] = {**task, "model": plain, "how": "ddp", "late": True}
        if host not in FAMILY:
            tasks["replace", host] = {"run": "replace", "model": model, "clips": clips}
    for index, task in enumerate(tasks.values()):
        torch.save(task, folder / f"task-{index:02}.pt")

    context = torch.multiprocessing.spawn(worker, (free_port(), str(folder)), nprocs=WORLD, join=False)
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            break
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


def assert_trained_as_one_process(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for step in range(2):
        assert sum(result["losses"][step] for result in results) / WORLD == pytest.approx(expected["loss"], rel=1e-12)
    for result in results:
        assert len(result["gradients"]) == 2
        for found in result["gradients"]:
            assert_same_gradients(found, expected["gradients"], **EXACT)


@needs_gloo
class TestTwoProcesses:
    @pytest.mark.parametrize("how", WRAPPINGS)
    @pytest.mark.parametrize("host", HOSTS)
    def test_loss_and_gradients_are_those_of_one_process(self, runs, host, how):
        results, expected = results_of(runs, (host, how)), runs["expected"][host]
        assert_trained_as_one_process(results, expected)
        if host != "pre-training":  # nothing random: the forward selects what select_tokens did
            own = sum(result["own"] for result in results) / WORLD
            assert own == pytest.approx(expected["loss"], rel=1e-12)
        assert [result["flops"] for result in results] == [expected["flops"]] * WORLD

    @pytest.mark.parametrize("host", HOSTS)
    def test_patching_through_ddp_works_or_is_refused(self, runs, host):
        """timm's kernel is replaced by another parameter, which DDP would not reduce."""
        results = results_of(runs, ("late", host))
        if host not in FAMILY and all("refused" in result for result in results):
            assert all("DistributedDataParallel" in result["refused"] for result in results)
            return
        assert_trained_as_one_process(results, runs["expected"][host])

    @pytest.mark.parametrize("change", ["unpatched", "other tubelets"])
    @pytest.mark.parametrize("host", ["vit", "eva"])
    def test_no_kernel_trains_outside_ddp(self, runs, host, change):
        first, second = (result[change] for result in results_of(runs, ("replace", host)))
        if isinstance(first, str):
            assert "DistributedDataParallel" in first
            assert first == second
        else:
            torch.testing.assert_close(first, second, **EXACT)  # reduced: the processes had different clips

    @pytest.mark.parametrize("host", HOSTS)
    def test_a_sharded_model_is_refused(self, runs, host):
        for result in results_of(runs, ("refuse", host)):
            assert len(result["messages"]) == 2
            for message in result["messages"]:
                assert "FSDP" in message
                assert "patch_videomae before" in message
            assert not result["patched"]


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_graph():
    """No recompilation, at all, for as long as a test runs."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


SHALLOW = {
    "fine-tuning": {"depth": 1, "img_size": 32},
    "pre-training": {"depth": 1, "decoder_depth": 1, "img_size": 32},
    "vit": {"depth": 1},
    "eva": {"depth": 1},
}


@pytest.mark.usefixtures("one_graph")
class TestCompile:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    @pytest.mark.parametrize("host", ["fine-tuning", "pre-training", "vit"])
    def test_three_steps_of_inductor_are_the_eager_ones(self, host):
        fewer = {"depth": 0} if host == "pre-training" else {}  # the decoder's block alone: compiling takes its time
        model = patch(HOSTS[host](**(SHALLOW[host] | fewer))).train()
        twin, before = copy.deepcopy(model), copy.deepcopy(model)
        compiled = torch.compile(twin, fullgraph=True, backend="inductor")
        optimisers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (model, twin)]
        losses = []
        for step in range(3):
            clips = clips_for(model, seed=step)
            selection = et.select_tokens(model, clips)
            for each, optimiser in zip((model, compiled), optimisers, strict=True):
                loss = loss_of(each(clips, token_selection=selection), clips)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
        assert losses[1::2] == pytest.approx(losses[::2], rel=1e-4)
        for (name, trained), start in zip(model.named_parameters(), before.parameters(), strict=True):
            moved = (trained - start).norm()
            assert moved > 0, name
            assert (twin.get_parameter(name) - trained).norm() < 1e-2 * moved, name

    @pytest.mark.parametrize("host", SHALLOW)
    def test_selecting_in_the_graph(self, host):
        model = patch(HOSTS[host](**SHALLOW[host])).train()
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        for step in range(3):
            clips = clips_for(model, seed=step)
            output = compiled(clips)
            loss_of(output, clips).backward()
            if host == "pre-training":
                visible_mask, target_mask = output[1]
                kept = (~visible_mask | ~target_mask).nonzero()[:, 1].reshape(2, -1)
                assert torch.equal(kept, et.select_tokens(model, clips).kept)
            else:
                torch.testing.assert_close(output, model(clips), rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:.*use_reentrant:FutureWarning")
    @pytest.mark.parametrize("host", SHALLOW)
    def test_with_gradient_checkpointing(self, host):
        model = patch(HOSTS[host](**SHALLOW[host])).train()
        clips = clips_for(model)
        selection = et.select_tokens(model, clips)
        loss_of(model(clips, token_selection=selection), clips).backward()

        if host in FAMILY:
            twin = HOSTS[host](**SHALLOW[host], checkpointed=True)
        else:
            twin = HOSTS[host](**SHALLOW[host])
            twin.set_grad_checkpointing(True)
        twin = patch(twin).train()
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        for _ in range(3):
            twin.zero_grad()
            loss_of(compiled(clips, token_selection=selection), clips).backward()
        assert_same_gradients(gradients(twin), gradients(model), rtol=1e-3, atol=1e-4)
        checkpoints = [node for node in graphs[0].graph.nodes if "activation_checkpoint" in str(node.target)]
        assert len(checkpoints) == len(blocks_of(twin))  # the graph knows of every block's


# --- LoRA ---------------------------------------------------------------------------------------------------------

DINOV3 = "vit_small_patch16_dinov3"
LORA_HOSTS = [
    "vit",
    pytest.param("dinov3", marks=pytest.mark.skipif(not timm.is_model(DINOV3), reason="this timm lacks DINOv3")),
]
RANK, ALPHA = 2, 6


def timm_host(host: str) -> Any:
    return (vit() if host == "vit" else image_model(DINOV3)).double()


def lora(model: Any, targets: list[str], **options: Any) -> PeftModel:
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # B starts at zero, and A then has no gradient
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def factors(wrapped: PeftModel, module: str) -> tuple[Tensor, Tensor]:
    """The adapter's A (rank, in…) and B (out, rank) of the module of this name."""
    layer = wrapped.get_base_model().get_submodule(module)
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    return a, b.flatten(1)


@torch.no_grad()
def merged_by_hand(patched: Any, wrapped: PeftModel, modules: list[str]) -> Any:
    """A patched model without adapters whose weights have them: W + α/r·B·A."""
    merged = copy.deepcopy(patched)
    for module in modules:
        a, b = factors(wrapped, module)
        weight = merged.get_submodule(module).weight
        weight += ALPHA / RANK * (b @ a.flatten(1)).reshape(weight.shape)
    return merged


def reseed(*_: Any) -> None:
    torch.manual_seed(11)


def assert_is_merged(wrapped: PeftModel, merged: Any, modules: list[str], clips: Tensor, selection: Any) -> None:
    """Outputs and adapters' gradients, by the chain rule of W + α/r·B·A, of a given and of the own selection."""
    expected, actual = (loss_of(model(clips, token_selection=selection), clips) for model in (merged, wrapped))
    torch.testing.assert_close(actual, expected, **EXACT)
    merged.zero_grad()
    wrapped.zero_grad()
    expected.backward()
    actual.backward()
    for module in modules:
        a, b = factors(wrapped, module)
        gradient = ALPHA / RANK * merged.get_submodule(module).weight.grad.flatten(1)
        layer = wrapped.get_base_model().get_submodule(module)
        found_a, found_b = (getattr(layer, name)["default"].weight.grad for name in ("lora_A", "lora_B"))
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found_a.flatten(1), b.detach().T @ gradient, **EXACT)
        torch.testing.assert_close(found_b.flatten(1), gradient @ a.detach().flatten(1).T, **EXACT)
    own = [each(clips) for each in (wrapped, merged)]
    torch.testing.assert_close(own[0], own[1], **EXACT)
    assert torch.equal(et.select_tokens(wrapped, clips).kept, et.select_tokens(merged, clips).kept)


class TestLora:
    @pytest.mark.parametrize("order", ["patch first", "wrap first"])
    @pytest.mark.parametrize("host", LORA_HOSTS)
    def test_on_qkv(self, host, order):
        plain = timm_host(host)
        patched = patch(copy.deepcopy(plain))
        if order == "patch first":
            model = lora(copy.deepcopy(patched), ["qkv"])
        else:
            model = lora(copy.deepcopy(plain), ["qkv"])
            assert patch(model) is model
        assert trained(model)
        assert all("lora_" in name for name in trained(model))  # the new kernel is frozen as the old one was
        modules = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
        clips = clips_for(plain)
        merged = merged_by_hand(patched, model, modules)
        assert not torch.allclose(merged(clips), patched(clips), rtol=1e-2)
        assert_is_merged(model, merged, modules, clips, et.select_tokens(patched, clips))

        # without the patch it is the adapted image model, its kernel still frozen
        assert et.unpatch_videomae(model) is model
        images = clips[:, :, 0]
        expected = lora(copy.deepcopy(plain), ["qkv"])(images)
        assert torch.equal(model(images), expected)
        assert all("lora_" in name for name in trained(model))

    @pytest.mark.parametrize("host", LORA_HOSTS)
    def test_on_the_patched_projection(self, host):
        plain = timm_host(host)
        patched = patch(copy.deepcopy(plain))
        model = lora(copy.deepcopy(patched), ["patch_embed.proj", "qkv"])
        modules = ["patch_embed.proj", "blocks.0.attn.qkv"]
        clips = clips_for(plain)
        merged = merged_by_hand(patched, model, [*modules, "blocks.1.attn.qkv"])
        assert_is_merged(model, merged, modules, clips, et.select_tokens(patched, clips))
        importance = [et.select_tokens(each, clips).importance for each in (model, merged, patched)]
        torch.testing.assert_close(importance[0], importance[1])  # float32; the selection sees the adapter
        assert not torch.allclose(importance[0], importance[2], rtol=1e-2)

        with pytest.raises(TypeError, match="unload the adapter first"):
            et.unpatch_videomae(model)
        torch.testing.assert_close(model(clips), merged(clips), **EXACT)  # as it was before the refusal
        unloaded = et.unpatch_videomae(model.merge_and_unload())
        kernel = merged.patch_embed.proj.weight.sum(dim=2)
        assert type(unloaded.patch_embed.proj) is nn.Conv2d
        torch.testing.assert_close(unloaded.patch_embed.proj.weight.detach(), kernel.detach(), **EXACT)

    def test_an_adapted_image_projection_is_refused(self):
        model = lora(vit().double(), ["patch_embed.proj"])
        images = clips_for(model.get_base_model())[:, :, 0]
        before = model(images)
        with pytest.raises(TypeError, match=r"patch_embed\.proj"):
            patch(model)
        assert torch.equal(model(images), before)

    @pytest.mark.parametrize("order", ["patch first", "wrap first"])
    @pytest.mark.parametrize("host", ["fine-tuning", "pre-training"])
    def test_on_the_family(self, host, order):
        plain = HOSTS[host]().double()
        prefix = "encoder." if host == "pre-training" else ""
        modules = [f"{prefix}patch_embed.proj", f"{prefix}blocks.0.mlp.fc1"]
        patched = patch(copy.deepcopy(plain))
        if order == "patch first":
            model = lora(copy.deepcopy(patched), modules)
        else:
            model = patch(lora(copy.deepcopy(plain), modules))
        clips = clips_for(plain)
        merged = merged_by_hand(patched, model, modules)
        for each in (model, merged):  # pre-training's own selection is random: let both draw alike
            each.register_forward_pre_hook(reseed)
        assert_is_merged(model, merged, modules, clips, et.select_tokens(patched, clips))

    def test_trains_saves_and_loads(self, tmp_path):
        model = lora(patch(vit().double()), ["qkv", "patch_embed.proj"], modules_to_save=["head"]).train()
        clips = clips_for(model.get_base_model())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = loss_of(model(clips), clips)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in trained(model)), name
        model.eval().save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(patch(vit().double()), tmp_path).double().eval()
        torch.testing.assert_close(again(clips), model(clips), **EXACT)

    @pytest.mark.parametrize(
        ("targets", "options"),
        [(["qkv"], {}), (["qkv"], {"modules_to_save": ["head"]}), (["patch_embed.proj"], {})],
        ids=["qkv", "a trained head", "projection"],
    )
    def test_flops_are_what_torch_counts(self, targets, options):
        """Not more than what runs (PEFT keeps the frozen head beside the trained one), and not less."""
        model = patch(vit().double())
        clips = clips_for(model, batch=1)

        def added(count: Callable[[Any], int]) -> int:
            return count(lora(copy.deepcopy(model), targets, **options)) - count(model)

        def run(each: Any) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                each(clips)
            return counter.get_total_flops()

        assert run(model) > 0
        assert added(run) > 0
        assert 2 * added(lambda each: et.count_flops(each).total) == added(run)


# --- averaged weights and state dicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
class TestWeights:
    def test_model_ema(self, host):
        model = patch(HOSTS[host]().double()).train()
        clips = clips_for(model)
        ema = ModelEmaV3(model, decay=0.9)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        average = {name: value.clone() for name, value in model.state_dict().items()}
        for _ in range(2):
            optimiser.zero_grad()
            loss_of(model(clips), clips).backward()
            optimiser.step()
            ema.update(model)
            for name, value in model.state_dict().items():
                average[name] = 0.9 * average[name] + 0.1 * value
        expected = patch(HOSTS[host](seed=1).double())
        expected.load_state_dict(average)
        assert type(ema.module) is type(model)
        assert et.select_tokens(ema.module, clips).kept.tolist() == et.select_tokens(expected, clips).kept.tolist()
        selection = et.select_tokens(expected, clips)
        outputs = [
            loss_of(each(clips, token_selection=selection), clips) for each in (ema, expected, copy.deepcopy(model))
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-7)
        assert not torch.allclose(outputs[0], outputs[2], rtol=1e-4)
        ema.module.everest.selector.keep_ratio = 0.75
        assert model.everest.selector.keep_ratio == 0.5

    def test_state_dict_through_a_file(self, host, tmp_path):
        plain = HOSTS[host]()
        model = patch(copy.deepcopy(plain)).train()
        clips = clips_for(model)
        selection = et.select_tokens(model, clips)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        loss_of(model(clips, token_selection=selection), clips).backward()
        optimiser.step()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        state = torch.load(tmp_path / "weights.pth", weights_only=True)
        assert state.keys() == plain.state_dict().keys()

        again = patch(HOSTS[host](seed=1))
        again.load_state_dict(state)
        assert torch.equal(
            loss_of(again(clips, token_selection=selection), clips),
            loss_of(model.eval()(clips, token_selection=selection), clips),
        )
        if host in FAMILY:  # ... and into the repository's own class
            again = HOSTS[host](seed=1)
            again.load_state_dict(state)
            assert torch.equal(
                loss_of(patch(again)(clips, token_selection=selection), clips),
                loss_of(model(clips, token_selection=selection), clips),
            )
        else:  # ... and out of it an image model
            kernel = state["patch_embed.proj.weight"].sum(dim=2)
            assert not torch.allclose(kernel, plain.patch_embed.proj.weight, rtol=1e-3)  # trained
            plain.load_state_dict({**state, "patch_embed.proj.weight": kernel})
            images = clips[:, :, 0]
            torch.testing.assert_close(et.unpatch_videomae(again)(images), plain(images))


# --- the repositories' own loops ----------------------------------------------------------------------------------


def smooth_clips() -> Tensor:
    """(2, 3, 8, 48, 64): half waves across, down and both ways, which a tiny model learns in few steps."""
    y, x = torch.meshgrid(torch.arange(48) / 48, torch.arange(64) / 64, indexing="ij")
    clips = [torch.stack([torch.sin(math.pi * wave + phase) for wave in (x, y, x + y)]) for phase in (0.0, 1.0)]
    return torch.stack(clips).unsqueeze(2).repeat(1, 1, 8, 1, 1)


def pretrain_one_epoch(model: Any, data_loader: Any, optimizer: Any, autocast: bool) -> list[float]:
    """The pre-training loop with the two lines that EVEREST's has and VideoMAE's gets."""
    model.train()
    losses = []
    for videos, bool_masked_pos in data_loader:
        bool_masked_pos = bool_masked_pos.flatten(1).to(torch.bool)
        with torch.no_grad():
            videos_patch = pixel_patches(videos)
            B, _, C = videos_patch.shape
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs, (_, target_mask) = model(videos, bool_masked_pos)
            labels = videos_patch[~target_mask].reshape(B, -1, C)
            loss = nn.MSELoss()(input=outputs, target=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestPreTrainingLoop:
    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
    @pytest.mark.parametrize("family", ["videomae", "videomaev2", "everest"])
    def test_learns_a_clip(self, family, autocast):
        options = {"mcm": True} if family == "everest" else {}
        model = PreTrainingModel(family, embed_dim=64, decoder_dim=64, **options)  # torch's own initialisation
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        videos, mask = smooth_clips(), torch.ones(2, 48)
        mask[:, ::10] = 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
        losses = pretrain_one_epoch(model, [(videos, mask)] * 30, optimizer, autocast)
        assert len(losses) == 30
        assert losses[-1] < losses[0] / 2

        # Each prediction is of the token that was asked for, whatever the mask says: other tokens' pixels fit worse.
        selection = et.select_tokens(model.eval(), videos)
        with torch.no_grad():
            prediction, _ = model(videos, mask.bool(), token_selection=selection)
        patches = pixel_patches(videos)
        own, others = [], []
        for clip, tokens in enumerate(selection.target.tolist()):
            for place, token in enumerate(tokens):
                error = (patches[clip] - prediction[clip, place]).square().mean(dim=1)
                own.append(error[token].item())
                others.append(error.mean().item())
        assert sum(own) < 0.75 * sum(others)  # wrong tokens would make them alike


# --- transformers' Trainer from a file of the family --------------------------------------------------------------

SQUARE: dict[str, Any] = {"img_size": 24, "patch_size": 8}  # 4 × 3 × 3 tokens
SIZES: dict[str, Any] = {"num_heads": 2, "num_frames": 8, "image_size": 24}
RATE = 0.01


def write_checkpoint(path: Path, reference: nn.Module) -> Path:
    torch.save({"model": reference.state_dict(), "epoch": 3, "args": Namespace(lr=1e-3)}, path)
    return path


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def examples(clips: Tensor, **columns: Tensor) -> list[dict[str, Tensor]]:
    """A dataset as transformers takes it, (T, C, H, W)."""
    rows = {"pixel_values": clips.transpose(1, 2), **columns}
    return [{name: values[index] for name, values in rows.items()} for index in range(len(clips))]


class TestTrainerFromAFile:
    @pytest.mark.filterwarnings("ignore:use_mean_pooling=False")
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("videomae", {}),
            ("videomae", {"use_learnable_pos_emb": True}),
            ("mme", {"use_mean_pooling": False}),
            ("mvd", {"use_cls_token": True}),
        ],
        ids=str,
    )
    def test_classifier(self, family, options, tmp_path):
        reference = randomize(FineTuningModel(family, **SQUARE, **options))
        if family == "mme":
            reference.random_masking = lambda x, mask_ratio: x  # its order is random, and the first token is pooled
        if reference.pos_embed.requires_grad:  # a table of its own, or a wrong one would not show
            reference.pos_embed.data.normal_(generator=torch.Generator().manual_seed(5))
        path = write_checkpoint(tmp_path / "checkpoint.pth", reference)
        model = et.load_videomae(path, family=family, **SIZES)
        assert type(model) is VideoMAEForVideoClassification
        et.patch_videomae(model, et.ReRoSelector(1.0))
        clips, labels = clips_for(reference, BATCH), torch.tensor([1, 4, 0, 2])
        trainer = Trainer(
            model,
            arguments(tmp_path / "run"),
            train_dataset=examples(clips, labels=labels),
            data_collator=default_data_collator,
        )
        trainer.train()
        assert trainer.state.global_step == 2

        # the very steps of the repository's class: it is elementwise, so transformers' split qkv doesn't matter
        untrained = copy.deepcopy(reference)
        optimiser = torch.optim.SGD(reference.parameters(), lr=RATE)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(reference(clips), labels).backward()
            optimiser.step()
        pixels = clips.transpose(1, 2)
        with torch.no_grad():
            expected = reference(clips)
            assert not torch.allclose(expected, untrained(clips), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(model.eval()(pixels).logits, expected, rtol=1e-3, atol=1e-3)

            # Trainer's checkpoint and save_model, each with the selection that it had
            again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
            if family == "mvd" or options.get("use_learnable_pos_emb"):
                assert not torch.allclose(again(pixels).logits, model(pixels).logits, rtol=1e-2, atol=1e-2)
            et.patch_videomae(again)
            torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=1e-6, atol=1e-6)
            model.everest.selector.keep_ratio = 0.5
            trainer.save_model(str(tmp_path / "saved"))
            saved = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved"))
            assert et.select_tokens(saved, pixels).kept.shape == (BATCH, 18)
            torch.testing.assert_close(saved(pixels).logits, model(pixels).logits, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(saved(pixels).logits, again(pixels).logits, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("family", ["videomae", "everest"])
    def test_pretraining(self, family, tmp_path):
        reference = randomize(PreTrainingModel(family, **SQUARE, decoder_num_heads=3))
        path = write_checkpoint(tmp_path / "checkpoint.pth", reference)
        model = et.load_videomae(path, family=family, for_pretraining=True, **{**SIZES, "num_heads": (2, 3)})
        assert type(model) is VideoMAEForPreTraining
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        clips = clips_for(reference, BATCH)
        pixels = clips.transpose(1, 2)
        selection = et.select_tokens(model, pixels)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = Trainer(
            model, arguments(tmp_path / "run"), train_dataset=examples(clips), data_collator=default_data_collator
        )
        trainer.train()
        assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())

        again = VideoMAEForPreTraining.from_pretrained(tmp_path / "run" / "checkpoint-2")
        et.patch_videomae(again)
        assert again.everest.settings == model.everest.settings
        assert again.decoder.norm.eps == 1e-6
        with torch.no_grad():
            expected = model.eval()(pixels, token_selection=selection)
            actual = again(pixels, token_selection=selection)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-6)
