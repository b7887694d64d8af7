"""One kind of model for the host contract: how it is made and run, and what it must compute.

The references know nothing of the library: `masked_keys` runs all tokens with the others' keys masked out of each
block's attention; a case may bring its model's own way of leaving tokens out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import everest_tokens as et

Grid = tuple[int, int, int]
# Of the largest magnitude. The embedding may be a matrix product where the host convolves: equal to rounding, no more.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class HostCase:
    """One kind of model: how to make it, call it, and what it must compute.

    Attributes:
        build: seed → unpatched, in eval mode, float32, every parameter random (zero biases would hide mistakes).
        clip: shape of one clip as `forward` takes it; `time` is the index of its frames, so 0 means (T, C, H, W).
        grid: (t, h, w) of that clip.
        projection: path of the tubelet projection.
        blocks: path of the encoder's blocks; in front of their tokens stand `prefix` tokens that are always kept.
        adapted: paths of linear layers that LoRA is put on.
        output: forward's answer → the tensor that is compared.
        reference: (unpatched model, clips, selection) → the same tensor from the selected tokens alone.
        unpatched: the same with every token kept; the unpatched model's own forward where it takes clips.
        as_reference: unpatched model → what `reference` and `unpatched` take.
        whole: unpatched model → one that runs all tokens of a clip, for `masked_keys`.
        image_model: its own forward takes no clips.
        any_size: it takes clips of any height and width.
        any_length: it takes any number of tubelets of frames.
        place_major: its tokens run place by place, not step by step.
        settings: further arguments of `patch_videomae` that its clips need.
        checkpointing: switches on the host's own gradient checkpointing.
        rounding: of float64 results against the reference, where that is wider than `ROUNDING`.
        variant: another case has the same mechanism; `kinds` leaves it out, `hosts` doesn't.
        skip: a mark for where the installed library lacks the model.
        copied: patched models, of which `patched` gives copies.
    """

    name: str
    build: Callable[[int], Any]
    clip: tuple[int, int, int, int]
    grid: Grid
    projection: str
    blocks: str
    adapted: tuple[str, ...]
    reference: Callable[[Any, Tensor, et.TokenSelection], Tensor] | None = None
    unpatched: Callable[[Any, Tensor, et.TokenSelection], Tensor] | None = None
    time: int = 0
    prefix: int = 0
    pretraining: bool = False
    output: Callable[[Any], Tensor] = lambda output: output
    as_reference: Callable[[Any], Any] = lambda plain: plain
    whole: Callable[[Any], Any] = lambda plain: plain
    image_model: bool = False
    any_size: bool = False
    any_length: bool = False
    place_major: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointing: Callable[[Any], Any] | None = None
    rounding: float = 0.0
    variant: bool = False
    skip: pytest.MarkDecorator | None = None
    copied: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tubelet(self) -> int:
        return self.clip[self.time] // self.grid[0]

    def clips(self, batch: int = 2, seed: int = 1, frames: int | None = None, dtype: Any = torch.float64) -> Tensor:
        """(batch, …) normally distributed."""
        shape = list(self.clip)
        shape[self.time] = frames or shape[self.time]
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def patch(self, model: Any, keep_ratio: Any = 0.5, **settings: Any) -> Any:
        """Patches `model` in place; a number is a ReRoSelector's keep ratio. Pre-training sees a quarter."""
        selector = et.ReRoSelector(keep_ratio) if isinstance(keep_ratio, float) else keep_ratio
        return et.patch_videomae(model, selector, **{"mask_ratio": 0.75, **self.settings, **settings})

    def plain(self, seed: int = 0, dtype: Any = torch.float64) -> Any:
        """What `expected` and `expected_of_all` take, of the weights that `patched` has."""
        return self.as_reference(self.build(seed).to(dtype))

    def patched(self, keep_ratio: Any = 0.5, seed: int = 0, dtype: Any = torch.float64, **settings: Any) -> Any:
        """A patched model of its own; a copy where it can be, since patching runs a model for a trial."""
        if settings or not isinstance(keep_ratio, float):
            return self.patch(self.build(seed).to(dtype), keep_ratio, **settings)
        key = (keep_ratio, seed, dtype)
        if key not in self.copied:
            self.copied[key] = self.patch(self.build(seed).to(dtype), keep_ratio)
        return copy.deepcopy(self.copied[key])

    def shallow(self, **settings: Any) -> Any:
        """A patched model with one block in each stack, in float32: compiling and exporting take their time."""
        model = self.patched(dtype=torch.float32, **settings)
        decoder = getattr(model, "decoder", None)
        del model.get_submodule(self.blocks)[1:]
        del getattr(decoder, "decoder_layers", getattr(decoder, "blocks", []))[1:]
        return model

    def selection(self, batch: int = 2, seed: int = 3) -> et.TokenSelection:
        """Random tokens of every clip, made without the library's own selecting."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(self.tokens, generator=generator) for _ in range(batch)])
        seen, kept = self.tokens // (6 if self.pretraining else 3), self.tokens // 2
        target = order[:, seen:kept].sort(1).values if self.pretraining else None
        return et.TokenSelection(order[:, :seen].sort(1).values, target, self.grid)

    def run(self, model: Any, clips: Tensor, selection: et.TokenSelection | None = None) -> Tensor:
        """What is compared of the patched model's forward; what is random in it is the same at every call."""
        torch.manual_seed(11)
        return self.output(model(clips, token_selection=selection))

    def expected(self, plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        torch.manual_seed(11)
        return (self.reference or self.masked_keys)(plain, clips, selection)

    def expected_of_all(self, plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        torch.manual_seed(11)
        return self.output(plain(clips)) if self.unpatched is None else self.unpatched(plain, clips, selection)

    def own_output(self, model: Any, batch: int = 2) -> Tensor:
        """The unpatched model's own forward, of images where it takes no clips."""
        clips = self.clips(batch, dtype=next(model.parameters()).dtype)
        torch.manual_seed(11)
        if self.image_model:
            return model(clips[:, :, 0])
        if not self.pretraining:
            return self.output(model(clips))
        return self.output(model(clips, torch.arange(self.tokens).expand(batch, -1) % 3 > 0))

    def masked_keys(self, plain: Any, clips: Tensor, selection: et.TokenSelection) -> Tensor:
        """All tokens run through all blocks, the others' keys masked; the head sees the selected ones alone."""
        batch, prefix = clips.shape[0], self.prefix
        always = torch.arange(prefix).expand(batch, -1)
        chosen = selection.visible
        if self.place_major:
            area = self.grid[1] * self.grid[2]
            chosen = (chosen % area * self.grid[0] + chosen // area).sort(dim=1).values
        kept = torch.cat([always, prefix + chosen], dim=1)
        allowed = torch.zeros(batch, prefix + self.tokens, dtype=torch.bool).scatter(1, kept, True)

        def gather(module: Any, args: Any, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output
            chosen = torch.stack([clip[row] for clip, row in zip(tokens, kept, strict=True)])
            return (chosen, *output[1:]) if isinstance(output, tuple) else chosen

        blocks = plain.get_submodule(self.blocks)
        handle = blocks[-1].register_forward_hook(gather)
        try:
            with MaskedKeys(allowed) as mode:
                output = self.output(plain(clips))
        finally:
            handle.remove()
        assert mode.calls >= len(blocks), "an attention ran without the mask"
        return output

    def close(self, actual: Tensor, expected: Tensor, rounding: float | None = None) -> None:
        """Fails where they differ by more than rounding of the largest magnitude."""
        tolerance = max(ROUNDING.get(expected.dtype, 0.0), self.rounding) if rounding is None else rounding
        assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype
        scale = expected.detach().abs().max()
        assert scale > 0, "a reference of zero proves nothing"
        difference = (actual - expected).detach().abs().max() / scale
        assert difference <= tolerance, f"differs by {difference.item():.1e} of the largest magnitude"

    def close_gradients(self, actual: Any, expected: Any, rounding: float = 1e-9) -> None:
        """Fails where the gradients of two models, or two dicts of gradients, differ by more than rounding."""
        found, wanted = (each if isinstance(each, dict) else gradients(each) for each in (actual, expected))
        assert found.keys() == wanted.keys()
        largest = max(each.abs().max() for each in wanted.values())
        for name, gradient in wanted.items():
            if gradient.abs().max() < 1e-9 * largest:
                assert "k_" in name or "key" in name, f"{name}: a gradient of zero proves nothing"
                continue  # a key's bias moves every score of a query alike
            try:
                self.close(found[name], gradient, max(rounding, self.rounding))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None

    def embedded(self, model: Any, clips: Tensor) -> Tensor:
        """(B, N, D) of a patched model's projection by one product, before the positions."""
        projection = model.get_submodule(self.projection)
        *_, height, width = projection.weight.shape
        order = "b (t p) c (h q) (w r)" if self.time == 0 else "b c (t p) (h q) (w r)"
        patches = rearrange(clips, f"{order} -> b (t h w) (c p q r)", p=self.tubelet, q=height, r=width)
        return F.linear(patches, projection.weight.flatten(1), projection.bias)

    def importance(self, model: Any, clips: Tensor) -> Tensor:
        """Eq. 2 on those embeddings by plain differences, (B, N) float32."""
        tokens = self.embedded(model, clips).detach().float().unflatten(1, (-1, self.grid[1] * self.grid[2]))
        change = (tokens[:, 1:] - tokens[:, :-1]).norm(dim=-1)
        return torch.cat([change[:, :1], change], dim=1).flatten(1)

    def pixels(self, clips: Tensor, tokens: Tensor) -> Tensor:
        """Which values of the clips belong to the tokens (B, M): bool like `clips`, by plain loops."""
        _, h, w = self.grid
        frames, height, width = self.tubelet, self.clip[2] // h, self.clip[3] // w
        found = torch.zeros_like(clips, dtype=torch.bool).movedim(1 + self.time, 1)  # (B, T, C, H, W)
        for clip, row in enumerate(tokens.tolist()):
            for token in row:
                i, y, x = frames * (token // (h * w)), height * (token // w % h), width * (token % w)
                found[clip, i : i + frames, :, y : y + height, x : x + width] = True
        return found.movedim(1, 1 + self.time)

    def checkpoint_blocks(self, model: Any, reentrant: bool) -> None:
        """Wraps each of the encoder's blocks, as FSDP's scripts do."""
        blocks = model.get_submodule(self.blocks)
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        chosen = set(blocks)
        apply_activation_checkpointing(
            blocks, partial(checkpoint_wrapper, checkpoint_impl=kind), check_fn=lambda module: module in chosen
        )


class MaskedKeys(TorchFunctionMode):
    """Lets no query of self-attention see the keys that `allowed` (B, N) says no to."""

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self.allowed = allowed[:, None, None]
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tokens = kwargs or {}, self.allowed.shape[-1]
        if func is F.scaled_dot_product_attention and args[0].shape[-2] == args[1].shape[-2] == tokens:
            assert len(args) == 3
            assert kwargs.get("attn_mask") is None
            assert not kwargs.get("is_causal")
            self.calls += 1
            return func(*args, **{**kwargs, "attn_mask": self.allowed})
        if func in (torch.softmax, Tensor.softmax, F.softmax) and tuple(args[0].shape[-2:]) == (tokens, tokens):
            self.calls += 1
            return func(args[0].masked_fill(~self.allowed, -math.inf), *args[1:], **kwargs)
        return func(*args, **kwargs)


def gradients(model: Any) -> dict[str, Tensor]:
    """By name; a checkpoint wrapper's is left out of it."""
    named = ((name.replace("_checkpoint_wrapped_module.", ""), value.grad) for name, value in model.named_parameters())
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def assert_same_state(actual: Any, expected: dict[str, Tensor]) -> None:
    """Fails where a model's state dict isn't the expected one, to the bit and in its order."""
    state = actual.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def structure(model: Any) -> dict[str, Any]:
    """Every module's class, attributes and hooks, and the config, as values that compare."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (type(value), value.dtype, tuple(value.shape), value.requires_grad, value.device)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if not isinstance(key, int)} | {len: len(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if isinstance(value, (int, float, str, set, type(None))) else type(value)

    found = {name: (type(module), plain(vars(module))) for name, module in model.named_modules()}
    if hasattr(model, "config"):
        found["config"] = (type(model.config), plain(vars(model.config)))
    return found


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Fails where a model's structure or state isn't at the end what it was, to the bit."""
    before, state = structure(model), state_of(model)
    yield
    assert structure(model) == before
    assert_same_state(model, state)


def weighted(output: Tensor) -> Tensor:
    """A loss whose gradient is another one for each output."""
    weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype)
    return (output * weight.view_as(output)).sum()


def counted_by_torch(model: Any, *args: Any) -> float:
    """Half of what FlopCounterMode counts: for it a multiply–accumulate is two."""
    model = copy.deepcopy(model).requires_grad_(False)  # it stumbles over parameters as arguments
    for module in model.modules():  # it doesn't count fused attention on the CPU
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args)
    return counter.get_total_flops() / 2


def mask_of(index: Tensor, total: int) -> Tensor:
    """(B, total) bool, False at the indices (B, K)."""
    return torch.ones(index.shape[0], total, dtype=torch.bool).scatter(1, index, False)
