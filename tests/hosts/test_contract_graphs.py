"""torch.compile and torch.export of patched models of every host."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from host_case import HostCase, gradients, weighted
from host_contract import kinds
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import everest_tokens as et


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """The aot_eager backend traces all that inductor would compile."""

    @kinds()
    def test_trains_in_one_graph(self, case):
        model = case.shallow().train()
        twin, clips, selection = copy.deepcopy(model), case.clips(dtype=torch.float32), case.selection()
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        expected, actual = case.run(model, clips, selection), case.run(compiled, clips, selection)
        case.close(actual, expected, 1e-4)
        for output in (expected, actual):
            weighted(output).backward()
        case.close_gradients(twin, model, 1e-3)
        other = case.selection(seed=9)
        case.close(case.run(compiled, clips, other), case.run(model, clips, other), 1e-4)
        assert counters["stats"]["unique_graphs"] == 1

    @kinds()
    def test_selects_with_frame_sampler_drop_path_and_autocast_in_one_graph(self, case):
        model = case.patched(dtype=torch.float32, frame_sampler=et.InfoFrameSampler(2.0), drop_path=0.3).train()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        clips = case.clips(frames=2 * case.clip[case.time], dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [case.output(compiled(clips, token_selection=None)).float() for _ in range(2)]
            assert not torch.allclose(*outputs)  # still random in the graph
            expected, actual = case.run(model, clips), case.run(compiled, clips)  # and the numbers drawn are eager's
        case.close(actual.float(), expected.float(), 1e-4)
        weighted(actual.float()).backward()
        assert counters["stats"]["unique_graphs"] == 1
        assert gradients(model)

    @kinds(lambda case: case.name in ("VideoMAEForPreTraining", "vit"))
    def test_each_keep_ratio_has_one_graph(self, case):
        model, clips = case.shallow(), case.clips(dtype=torch.float32)
        compiled, graphs = torch.compile(model, fullgraph=True, backend="eager"), []
        for keep_ratio in (0.5, 0.75, 0.5):
            model.everest.selector.keep_ratio = keep_ratio
            with torch.no_grad():
                case.close(case.run(compiled, clips), case.run(model, clips), 1e-4)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [1, 2, 2]
        assert torch.equal(et.select_tokens(compiled, clips).kept, et.select_tokens(model, clips).kept)
        assert et.count_flops(compiled) == et.count_flops(model)

    @kinds(lambda case: case.name in ("VideoMAEForPreTraining", "videomae-pretraining", "eva"))
    def test_with_gradient_checkpointing(self, case):
        model = case.shallow().train()
        twin, clips, selection = copy.deepcopy(model), case.clips(dtype=torch.float32), case.selection()
        case.checkpointing(twin)
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        for each in (model, compiled):
            weighted(case.run(each, clips, selection)).backward()
        case.close_gradients(twin, model, 1e-3)
        checkpoints = [node for node in graphs[0].graph.nodes if "activation_checkpoint" in str(node.target)]
        assert len(checkpoints) == (2 if case.pretraining else 1)  # the graph knows of every block's

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    @kinds(lambda case: case.name == "VideoMAEForPreTraining")
    def test_inductors_steps_are_the_eager_ones(self, case):
        """As scalar code, and by this process: trying the processor's vector instructions out takes longer than all."""
        model = case.shallow().train()
        twin, before = copy.deepcopy(model), copy.deepcopy(model)
        compiled = torch.compile(twin, fullgraph=True)
        optimisers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, twin)]
        quick = torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1})
        with quick, torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(3):
                clips, selection = case.clips(seed=step, dtype=torch.float32), case.selection(seed=step)
                for each, optimiser in zip((model, compiled), optimisers, strict=True):
                    optimiser.zero_grad()
                    weighted(case.run(each, clips, selection)).backward()
                    optimiser.step()
        for (name, trained), start in zip(model.named_parameters(), before.parameters(), strict=True):
            moved = (trained - start).norm()
            assert (twin.get_parameter(name) - trained).norm() <= 1e-2 * moved + 1e-6, name
        assert gradients(model)


class Exported(nn.Module):
    """torch's guards on what a forward takes in **kwargs don't run (2.15: NameError), so it is named here."""

    def __init__(self, case: HostCase, model: Any) -> None:
        super().__init__()
        self.case, self.model = case, model

    def forward(self, clips: Tensor, token_selection: Any = None) -> Tensor:
        return self.case.output(self.model(clips, token_selection=token_selection))


class TestExport:
    @kinds(lambda case: case.pretraining or case.name in ("VJEPA2ForVideoClassification", "vit"))
    def test_with_a_dynamic_batch_through_a_file(self, case):
        """Of the other encoders `integration/test_onnx.py` exports each in the same way, to run it elsewhere."""
        self.check(case, given=False)

    @kinds(lambda case: case.name in ("VideoMAEForPreTraining", "VivitForVideoClassification", "vit"))
    def test_of_given_selections(self, case):
        self.check(case, given=True)

    def check(self, case: HostCase, given: bool) -> None:
        model = case.shallow()
        inputs: dict[str, Any] = {"clips": case.clips(dtype=torch.float32)}
        if given:
            inputs["token_selection"] = case.selection()
        shapes = torch.export.ShapesCollection()
        for tensor in pytree.tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                shapes[tensor] = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(Exported(case, model), (), inputs, dynamic_shapes=shapes, strict=False)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        exported = torch.export.load(buffer).module()
        for size in (1, 2, 5):
            clips = case.clips(batch=size, seed=size, dtype=torch.float32)
            selection = case.selection(batch=size, seed=size) if given else None
            torch.manual_seed(11)
            actual = exported(clips=clips, token_selection=selection) if given else exported(clips=clips)
            case.close(actual, case.run(model, clips, selection), 1e-4)
        model.everest.selector.keep_ratio = 0.75  # exports bake it in
        if not given:
            assert exported(clips=clips).shape == actual.shape
