"""Which tokens the running forward was asked for, and which it runs: one slot for each forward of each thread.

A forward opens the slot, the tubelet embedding fills in what it selects, and what needs the kept tokens' positions
reads them there. Dynamo reads a `threading.local` when the graph runs, in the thread that runs it, so that compiled
models, and compiled parts of a model, find their own as well.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from everest_tokens.hosts.patched_class import Patched
from everest_tokens.policy import SelectionPolicy
from everest_tokens.selection import TokenSelection


class Running:
    """One forward of a patched model.

    Attributes:
        given: the selection that the caller wants to be run, or None.
        generator: for the random choices, where nothing is given.
        only_selects: whether nobody but `select_tokens` asks, who also wants to see the importance.
        selection: what the tubelet embedding selected; None before it has run.
        ready: tokens that were embedded before the model's own code asks for them, or None.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        given: TokenSelection | None = None,
        generator: torch.Generator | None = None,
        only_selects: bool = False,
    ) -> None:
        self.policy = policy
        self.given = given
        self.generator = generator
        self.only_selects = only_selects
        self.selection: Any = None
        self.ready: Any = None
        self.outer: Running | None = None  # what this thread ran when it began
        self.opened_by: nn.Module | None = None


_thread = threading.local()


def _innermost() -> Running | None:
    return getattr(_thread, "innermost", None)


def running(policy: SelectionPolicy) -> Running | None:
    """Find the forward of this policy's model that this thread is in."""
    innermost = _innermost()
    return innermost if innermost is not None and innermost.policy is policy else None


class forward_of:
    """Keep the slot open for a forward of a model; inside another one of the same model, join that.

    Args: as of `Running`.
    """

    def __init__(self, policy: SelectionPolicy, given: Any = None, **kwargs: Any) -> None:
        self.policy = policy
        self.given = checked_selection(given)
        self.kwargs = kwargs

    def __enter__(self) -> Running:
        self.outer = _innermost()
        current = running(self.policy)
        if current is None:
            current = _thread.innermost = Running(self.policy, self.given, **self.kwargs)
        elif self.given is not None:
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


def checked_selection(selection: Any) -> TokenSelection | None:
    """Give back `token_selection`. Raises TypeError for anything but a TokenSelection or None."""
    if isinstance(selection, torch.fx.Proxy):
        raise TypeError("torch.fx can't trace what a patched model selects: use torch.export, or forward_intermediates")
    if selection is not None and not isinstance(selection, TokenSelection):
        raise TypeError(f"token_selection must be a TokenSelection, got {type(selection).__name__}")
    return selection


def _open(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: take `token_selection`, which the module's own forward doesn't know, and open the slot."""
    given = checked_selection(kwargs.get("token_selection"))
    module.everest.host.check_call(module, args, kwargs)
    current = running(module.everest)
    if current is None or current.opened_by is module:  # one that an interrupt has left open counts as over
        outer = _innermost() if current is None else current.outer
        current = Running(module.everest)
        current.outer, current.opened_by = outer, module
        _thread.innermost = current
    if given is not None:
        current.given = given
    return args, {name: value for name, value in kwargs.items() if name != "token_selection"}


def _close(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, called after an exception too: close the slot that `_open` opened for this module."""
    innermost = _innermost()
    if innermost is not None and innermost.opened_by is module:
        _thread.innermost = innermost.outer


def hook_forward(module: nn.Module) -> None:
    """Open the slot for each call of a module whose class must stay its own; `module.everest` is the policy."""
    module.register_forward_pre_hook(_open, prepend=True, with_kwargs=True)
    module.register_forward_hook(_close, always_call=True)


def unhook_forward(module: nn.Module) -> None:
    """Undo `hook_forward`, on copies of the module too."""
    for hooks, own in ((module._forward_pre_hooks, _open), (module._forward_hooks, _close)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for others in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                others.pop(key, None)
