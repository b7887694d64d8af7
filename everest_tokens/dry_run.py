"""A forward without weights: a model's copy on the meta device, and a count of the products that it runs."""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

# Words in the names of torch's operators that sum products; its counter knows only some of them.
_SUMS_PRODUCTS = re.compile(r"\w*(mm|mv|rnn)|v?dot|addr|matmul|(tri)?linear|conv.*|attention|cdist|lstm|gru|fft|linalg")
_SPACES = ("aten", "prim", "prims", "profiler")  # torch's own operators
_DENSE = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")  # transformers' names


def on_meta(root: nn.Module) -> Any:
    """Copy a model whose every parameter, buffer and plain tensor is on the meta device, in `eval()`.

    Forward hooks come along; those bound to something outside the model share it. FSDP2, compilation of submodules and
    what accelerate wraps a forward in do not: they are about where and how a forward runs, not about what it computes.
    Floating-point tensors become float32, so that half-precision and mixed models run without autocast.
    """
    modules = dict.fromkeys(getattr(module, "_orig_mod", module) for module in root.modules())
    attributes = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(x): _without_values(x) for x in chain(root.parameters(), root.buffers(), attributes)}
    memo |= {id(module): object.__new__(_unsharded(type(module))) for module in modules}
    memo |= {id(module): memo[id(module._orig_mod)] for module in root.modules() if module not in modules}
    for module in modules:
        memo[id(module)].__dict__.update({name: _copied(x, memo) for name, x in _state(module, memo).items()})
    copied = memo[id(root)].eval()
    for config in (module.config for module in copied.modules() if hasattr(module, "config")):
        if getattr(config, "_attn_implementation", None) in _DENSE:
            config._attn_implementation = "sdpa"  # the same products, by operators that need no device
    return copied


@contextmanager
def counting(root: nn.Module, failures: type[Exception] = Exception) -> Iterator[FlopCounterMode]:
    """Count what runs. Raise TypeError, that the cost of `root` isn't known, where one of the failures is raised."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _OneThreadsModules()
    try:
        with torch.no_grad(), _Known(), counter:
            yield counter
    except failures as error:
        raise TypeError(f"count_flops doesn't know what {type(root).__qualname__} costs: {error}") from error


def _solving(a_shape: Any, b_shape: Any, **_: Any) -> int:
    """Two for each multiply–accumulate of an LU decomposition and of two triangular solutions."""
    *batch, size, _ = a_shape
    return prod(batch) * (2 * size**3 // 3 + 2 * size**2 * b_shape[-1])


_FORMULAS = {torch.ops.aten._linalg_solve_ex: _solving}  # of camera.py; torch's counter has none


class _OneThreadsModules(ModuleTracker):
    """Follows the modules that its own thread runs; torch's hooks are called for those of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def _fw_pre_hook(self, *given: Any) -> None:
        if threading.get_ident() == self._thread:
            super()._fw_pre_hook(*given)

    def _fw_post_hook(self, *given: Any) -> None:
        if threading.get_ident() == self._thread:
            super()._fw_post_hook(*given)


class _Known(TorchDispatchMode):
    """Refuses operators that sum products and that torch's counter would take to cost nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split(".")[0].split("::")
        sums = name != "linalg_vector_norm" and any(map(_SUMS_PRODUCTS.fullmatch, name.split("_")))
        known = func.overloadpacket in flop_registry or func.overloadpacket in _FORMULAS
        if not known and (sums or space not in _SPACES):
            raise NotImplementedError(f"the operator {space}::{name} has no formula in torch.utils.flop_counter")
        return func(*args, **(kwargs or {}))


def _without_values(x: Tensor) -> Tensor:
    empty = torch.empty(x.shape, dtype=torch.float32 if x.is_floating_point() else x.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty


def _unsharded(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before `fully_shard`."""
    return next(base for base in cls.__mro__ if "FSDPModule" not in {each.__name__ for each in base.__mro__})


def _state(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """What of a module is copied."""
    state = {name: value for name, value in vars(module).items() if name not in ("_compiled_call_impl", "_hf_hook")}
    before = (state.get(name) for name in ("_old_forward", "_original_forward"))  # before accelerate wrapped it
    if any(getattr(forward, "__func__", None) is type(module).forward for forward in before):
        state.pop("forward", None)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        owners = {key: getattr(hook, "__self__", None) for key, hook in state[name].items()}
        kept = [key for key, owner in owners.items() if not type(owner).__module__.startswith("torch.distributed.")]
        state[name] = OrderedDict((key, state[name][key]) for key in kept)
        foreign = [key for key in kept if owners[key] is not None and id(owners[key]) not in memo]
        memo.update((id(hook), hook) for hook in map(state[name].get, foreign))
    return state


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; what has none (a lock, a file, an operator, a selector with a generator) is shared."""
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        while len(memo) > known:  # half-made copies
            memo.popitem()
        return value
