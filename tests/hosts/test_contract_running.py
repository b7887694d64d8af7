"""Patched models of every host where they are run: other precisions, recomputation, threads and transforms."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_case import HostCase, gradients, weighted
from host_contract import kinds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from versions import autocast_keeps_gradients, before

import everest_tokens as et

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensor."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


class TestPrecision:
    @kinds()
    @HALVES
    def test_autocast(self, case, dtype):
        """As far from float64 as the reference is under autocast, where its own modules run."""
        plain, model, clips = case.plain(dtype=torch.float32), case.patched(dtype=torch.float32), case.clips()
        selection, whole = case.selection(), case.expected(case.plain(), clips, case.selection())
        with torch.autocast("cpu", dtype=dtype):
            own = et.select_tokens(model, clips.float())  # casts weights under no_grad
            expected, actual = (
                case.expected(plain, clips.float(), selection),
                case.run(model, clips.float(), selection),
            )
        assert own.importance.dtype == torch.float32
        assert actual.dtype == expected.dtype
        assert distance(actual, whole) < 1.5 * distance(expected, whole) + 1e-3
        for output in (expected, actual):
            weighted(output.float()).backward()
        wanted, found = gradients(plain), gradients(model)
        assert found.keys() == wanted.keys()
        whole_gradients = double_gradients(case, clips, selection)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            limit = 1.5 * distance(wanted[name], whole_gradients[name]) + 0.01
            assert distance(gradient, whole_gradients[name]) < limit or "k_" in name or "key" in name, name

    @kinds()
    @HALVES
    def test_weights_of_half_precision(self, case, dtype):
        plain, model = case.plain(dtype=dtype), case.patched(dtype=dtype)
        selection, whole = case.selection(), case.expected(case.plain(), case.clips(), case.selection())
        expected, actual = (
            case.expected(plain, case.clips(dtype=dtype), selection),
            case.run(model, case.clips(dtype=dtype), selection),
        )
        assert actual.dtype == expected.dtype == dtype
        assert distance(actual, whole) < 1.5 * distance(expected, whole) + 1e-3
        weighted(actual.float()).backward()
        assert {gradient.dtype for gradient in gradients(model).values()} == {dtype}
        assert et.select_tokens(model, case.clips(dtype=dtype)).importance.dtype == torch.float32

    @kinds()
    @pytest.mark.parametrize("first", ["no_grad", "inference_mode", "selecting"])
    def test_what_runs_first_costs_no_gradient(self, case, first):
        """Autocast caches the weights that it casts: without grad, they would stay without in the next forward."""
        if first != "selecting" and not autocast_keeps_gradients():
            pytest.skip("this torch's autocast keeps casts without grad, of an unpatched model as well")
        model, clips, selection = case.patched(dtype=torch.float32), case.clips(dtype=torch.float32), None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if first == "selecting":  # and a hooked projection, which then runs by itself
                model.get_submodule(case.projection).register_forward_hook(lambda module, args, output: None)
                selection = et.select_tokens(model, clips)
            else:
                with getattr(torch, first)():
                    case.run(model, clips)
            weighted(case.run(model, clips, selection).float()).backward()
        without = {name for name, each in model.named_parameters() if each.requires_grad and each.grad is None}
        assert without <= {"pos_embed"}  # which these models detach

    @kinds()
    def test_moving_after_patching(self, case):
        model, clips, selection = case.patched(dtype=torch.float32), case.clips(), case.selection()
        before = case.run(model, clips.float(), selection)
        actual = case.run(model.double(), clips, selection)
        case.close(actual, case.expected(case.plain(), clips, selection), max(1e-6, case.rounding))
        case.close(actual.float(), before, 1e-4)


def double_gradients(case: HostCase, clips: Tensor, selection: et.TokenSelection) -> dict[str, Tensor]:
    plain = case.plain()
    weighted(case.expected(plain, clips, selection)).backward()
    return gradients(plain)


class TestGradientCheckpointing:
    """Blocks run again in backward, by another thread on a GPU, when the forward that they belong to is long over."""

    @staticmethod
    def check(case: HostCase, enable: Callable[[Any], Any]) -> None:
        model = case.patched(drop_path=0.5).train()
        twin, runs = copy.deepcopy(model), []
        enable(twin)
        norms = [module for module in twin.get_submodule(case.blocks)[1].modules() if isinstance(module, nn.LayerNorm)]
        norms[0].register_forward_pre_hook(lambda module, args: runs.append(1))
        clips = [case.clips(batch=4, seed=seed).requires_grad_() for seed in (1, 2)]
        for each in (model, twin):
            losses = [weighted(case.run(each, given)) for given in clips]  # a forward between it and its backward
            backward = threading.Thread(target=lambda losses=losses: [loss.backward() for loss in losses])
            backward.start()
            backward.join()
        assert len(runs) == 4  # twice each
        case.close_gradients(twin, model, 1e-10)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    @kinds()
    def test_of_the_host(self, case):
        if case.name.startswith("eva") and before("timm", "1.0.13"):
            pytest.skip("timm before 1.0.13: Eva hands checkpoint a keyword that it doesn't take")
        self.check(case, case.checkpointing)

    @kinds()
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    def test_of_wrapped_blocks(self, case, reentrant):
        self.check(case, lambda model: case.checkpoint_blocks(model, reentrant))


class Meeting:
    """Where every thread waits for the others, so that all forwards are inside one another: in the selector, or before
    the embedding runs."""

    def __init__(self) -> None:
        self.barrier: threading.Barrier | None = None
        self.selector = et.ReRoSelector(0.5)

    def wait(self, *_: Any) -> None:
        if self.barrier is not None and not self.barrier.broken:
            self.barrier.wait()

    def __call__(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        self.wait()
        return self.selector(tokens, grid)


def a_third(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The most changed third of the tokens, where visible tokens must not be random."""
    return et.ReRoSelector(1 / 3)(tokens, grid)


class TestThreads:
    """A server's workers and nn.DataParallel run one model at once: none of 48 forwards may be wrong."""

    THREADS, CALLS = 4, 12  # each call meets the others inside its forward, so a mix-up shows in the first

    @kinds()
    def test_each_gets_its_own_tokens(self, case):
        self.check(case, hooked=False)

    @kinds()
    def test_each_gets_its_own_tokens_where_the_embedding_is_hooked(self, case):
        self.check(case, hooked=True)

    def check(self, case: HostCase, hooked: bool) -> None:
        meeting, wrong = Meeting(), []
        model = case.patched(
            meeting.selector if hooked else meeting,
            dtype=torch.float32,
            **({"visible": a_third} if case.pretraining else {}),
        )
        if hooked:
            embedding = model.get_submodule(case.projection.rpartition(".")[0])
            embedding.register_forward_pre_hook(meeting.wait)
        clips = [case.clips(seed=seed, dtype=torch.float32) for seed in range(self.THREADS)]
        selections = [case.selection(seed=seed) for seed in range(self.THREADS)]
        with torch.no_grad():
            own = [case.run(model, given) for given in clips]
            told = [case.run(model, given, selection) for given, selection in zip(clips, selections, strict=True)]
        meeting.barrier = threading.Barrier(self.THREADS, timeout=60)

        def serve(index: int) -> None:
            for call in range(self.CALLS):
                selection = selections[index] if call % 4 == 3 else None
                expected = own[index] if selection is None else told[index]
                try:
                    with torch.no_grad():
                        actual = case.output(model(clips[index], token_selection=selection))
                    fine = actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
                except Exception:
                    meeting.barrier.abort()
                    fine = False
                if not fine:
                    wrong.append(index)

        workers = [threading.Thread(target=serve, args=(index,)) for index in range(self.THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, f"{len(wrong)} of {self.THREADS * self.CALLS} wrong"


class TestFunctionalTransforms:
    @kinds()
    def test_functional_call(self, case):
        model, other = case.patched(), case.patched(seed=1)
        clips, selection = case.clips(), case.selection()
        weights = {name: value.detach() for name, value in other.named_parameters()}
        torch.manual_seed(11)
        output = torch.func.functional_call(model, weights, (clips,), {"token_selection": selection})
        expected = case.expected(case.plain(seed=1), clips, selection)
        case.close(case.output(output), expected)
        assert not torch.allclose(case.output(output), case.run(model, clips, selection))

    @kinds()
    def test_gradients_of_each_sample_are_a_loops(self, case):
        model, clips, selection = case.patched(), case.clips(batch=3), case.selection(batch=3)
        weights = {name: value.detach() for name, value in model.named_parameters()}

        index = {"visible": selection.visible} | ({"target": selection.target} if case.pretraining else {})

        def loss(weights: dict[str, Tensor], clip: Tensor, index: dict[str, Tensor]) -> Tensor:
            given = {"target": None} | {name: chosen[None] for name, chosen in index.items()}
            chosen = et.TokenSelection(**given, grid=case.grid)
            output = torch.func.functional_call(model, weights, (clip[None],), {"token_selection": chosen})
            return weighted(case.output(output))

        torch.manual_seed(11)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="same")
        per_sample = each(weights, clips, index)
        for row in range(3):
            model.zero_grad()
            one = pytree.tree_map_only(Tensor, lambda index, row=row: index[row : row + 1], selection)
            weighted(case.run(model, clips[row : row + 1], one)).backward()
            wanted = gradients(model)
            case.close_gradients({name: per_sample[name][row] for name in wanted}, wanted)

    @kinds()
    def test_forward_mode_agrees_with_backward(self, case):
        """⟨w, J·v⟩ = ⟨Jᵀ·w, v⟩."""
        model, clips, selection = case.patched(), case.clips().requires_grad_(), case.selection()
        direction = case.clips(seed=5)

        def output(clips: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no forward mode
                return case.run(model, clips, selection)

        weighted(output(clips)).backward()
        value, tangent = torch.func.jvp(output, (clips.detach(),), (direction,))
        case.close(value, output(clips))
        assert weighted(tangent).item() == pytest.approx((clips.grad * direction).sum().item(), rel=1e-9)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @kinds()
    def test_a_trace_through_a_file(self, case):
        model, buffer = case.patched(dtype=torch.float32), io.BytesIO()

        class Output(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, clips: Tensor) -> Tensor:
                return case.output(self.model(clips))

        traced = torch.jit.trace(Output(), case.clips(dtype=torch.float32), check_trace=False)
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded, clips = torch.jit.load(buffer), case.clips(batch=3, seed=4, dtype=torch.float32)
        torch.manual_seed(11)
        actual = loaded(clips)
        case.close(actual, case.run(model, clips), 1e-4)


SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "boolean index",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "_assert_async",
}


class CountOps(TorchDispatchMode):
    """Counts the aten operators that run, and those with a boolean index."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        self.counts[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.counts["boolean index"] += 1
        return func(*args, **(kwargs or {}))


SETTINGS = [
    pytest.param({}, id="defaults"),
    pytest.param({"keep_ratio": et.ReRoSelector(0.5, distance="cosine"), "drop_path": 0.2}, id="cosine"),
    pytest.param({"keep_ratio": et.ReRoSelector(0.5, distance="cka", descending=False)}, id="cka"),
    pytest.param({"frame_sampler": et.InfoFrameSampler(2.0)}, id="frames"),
    pytest.param({"keep_ratio": et.ReRoSelector(0.75, anchor="first", camera="compensate")}, id="camera"),
    pytest.param({"keep_ratio": et.RandomSelector(0.5)}, id="random"),
    pytest.param({"keep_ratio": et.TubeSelector(0.5)}, id="tubes"),
]


class TestOperators:
    @kinds()
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_nothing_waits_for_the_device(self, case, settings):
        model = case.patched(dtype=torch.float32, **settings).train()
        frames = 2 * case.clip[case.time] if "frame_sampler" in settings else None
        clips = case.clips(frames=frames, dtype=torch.float32)
        with CountOps() as forward:
            output = case.run(model, clips)
        with CountOps() as backward:
            weighted(output).backward()
        assert not {name: forward.counts[name] for name in SYNCHRONISING if forward.counts[name]}
        # embedded once, and by backward only where a token is visible: no convolution's gradient over the clip
        assert forward.counts["convolution"] <= 1
        assert backward.counts["convolution_backward"] == 0
        assert model.get_parameter(f"{case.projection}.weight").grad.abs().max() > 0

    def test_the_counter_would_see_them(self):
        (case,) = (parameter.values[0] for parameter in kinds().args[1] if parameter.id == "VideoMAEForPreTraining")
        plain = case.build(0)  # indexes with boolean masks, embeds with grad
        mask = torch.arange(case.tokens).expand(2, -1) % 2 == 0
        with CountOps() as forward:
            output = plain(case.clips(dtype=torch.float32), bool_masked_pos=mask)
        with CountOps() as backward:
            output.loss.backward()
        assert forward.counts["boolean index"] > 0
        assert backward.counts["convolution_backward"] == 1

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @kinds()
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_nothing_synchronises_on_a_gpu(self, case, settings):
        model = case.patched(dtype=torch.float32, **settings).train().cuda()
        frames = 2 * case.clip[case.time] if "frame_sampler" in settings else None
        clips = case.clips(frames=frames, dtype=torch.float32).cuda()
        case.output(model(clips)).square().sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.output(model(clips)).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
