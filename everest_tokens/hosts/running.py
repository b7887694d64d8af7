"""Which tokens the running forward was asked for, and which it runs: one slot for each forward of each thread.

A forward opens the slot, the tubelet embedding fills in what it selects, and what needs the kept tokens' positions
reads them there. Dynamo reads a `threading.local` when the graph runs, in the thread that runs it, so that compiled
models, and compiled parts of a model, find their own as well.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from everest_tokens.hosts.patched_class import Patched
from everest_tokens.policy import SelectionPolicy
from everest_tokens.selection import TokenSelection

PACKED = "everest_packed"  # the name by which transformers knows the attention of packing.py
_thread = threading.local()


class Packing(NamedTuple):
    """Where the clips of a packed batch, (1, ΣK, D), end.

    Attributes:
        lengths: how many tokens each clip has, those that are always kept (a class token) included.
        boundaries: (B + 1,) int32 on the clips' device, from 0 to ΣK.
    """

    lengths: list[int]
    boundaries: Tensor


def _innermost() -> forward_of | None:
    return getattr(_thread, "innermost", None)


def running(policy: SelectionPolicy) -> forward_of | None:
    """Find the forward of this policy's model that this thread is in."""
    innermost = _innermost()
    return innermost if innermost is not None and innermost.policy is policy else None


class forward_of:
    """One forward of a patched model, the slot, open within `with`; inside another one of the same model that one.

    Attributes:
        given: the selection that the caller wants to be run, or None. Raises TypeError for anything else.
        generator: for the random choices, where nothing is given.
        only_selects: whether nobody but `select_tokens` asks, who also wants to see the importance.
        opened_by: the module whose hooks opened it, if they did.
        selection: what the tubelet embedding selected; None before it has run.
        visible: what reaches the encoder: the selection's visible positions (B, V), or of a packed batch (1, ΣK).
        packing: of a packed batch, else None.
        ready: tokens that were embedded before the model's own code asks for them, or None.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        given: Any = None,
        generator: torch.Generator | None = None,
        only_selects: bool = False,
        opened_by: nn.Module | None = None,
    ) -> None:
        if isinstance(given, torch.fx.Proxy):
            raise TypeError(
                "torch.fx can't trace what a patched model selects: use torch.export, or forward_intermediates"
            )
        if given is not None and not isinstance(given, TokenSelection):
            raise TypeError(f"token_selection must be a TokenSelection, got {type(given).__name__}")
        self.policy, self.given, self.generator = policy, given, generator
        self.only_selects, self.opened_by = only_selects, opened_by
        self.selection: Any = None
        self.visible: Any = None
        self.packing: Packing | None = None
        self.ready: Any = None

    def __enter__(self) -> forward_of:
        self.outer = _innermost()
        current = running(self.policy)
        if current is not None and current.opened_by is not None and current.opened_by is self.opened_by:
            self.outer, current = current.outer, None  # an interrupt has left it open: it is over
        if current is None:
            _thread.innermost = self
            return self
        if self.given is not None:
            current.given = self.given
        return current

    def __exit__(self, *_: Any) -> None:
        _thread.innermost = self.outer


class SelectingModel(Patched):
    """A model whose own `forward` calls its own `forward_features`; each opens the slot."""

    def forward(self, x: Tensor, *args: Any, token_selection: TokenSelection | None = None, **kwargs: Any) -> Any:
        """The model's own over clips (B, C, T, H, W); `token_selection` runs instead of selecting."""
        with forward_of(self.everest, token_selection):
            return super().forward(x, *args, **kwargs)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own, over the visible tokens."""
        with forward_of(self.everest):
            return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]


def _open(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: take `token_selection`, which the module's own forward doesn't know, and open the slot."""
    own = {name: value for name, value in kwargs.items() if name != "token_selection"}
    slot = forward_of(module.everest, kwargs.get("token_selection"), opened_by=module)
    module.everest.host.prepare_call(module, args, own)
    slot.__enter__()
    return args, own


def _close(module: Any, args: Any, output: Any) -> Any:
    """Forward hook, called after an exception too: close the slot that `_open` opened for this module."""
    innermost = _innermost()
    if innermost is not None and innermost.opened_by is module:
        innermost.__exit__()
    if output is not None and innermost is not None and innermost.policy is module.everest:
        return module.everest.host.unpack(module, output, innermost)
    return None


def hook_forward(module: nn.Module) -> None:
    """Open the slot for each call of a module whose class must stay its own; `module.everest` is the policy."""
    module.register_forward_pre_hook(_open, prepend=True, with_kwargs=True)
    module.register_forward_hook(_close, always_call=True)


def unhook_forward(module: nn.Module) -> None:
    """Undo `hook_forward`, on copies of the module too."""
    marks = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks, own in ((module._forward_pre_hooks, _open), (module._forward_hooks, _close)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            for registered in (hooks, *marks):
                registered.pop(key, None)
