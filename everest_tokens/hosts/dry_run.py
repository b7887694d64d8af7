"""A first forward without weights, so that a model which can't run over fewer tokens is refused when patched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from everest_tokens.hosts.base import Host
from everest_tokens.meta_copy import on_meta
from everest_tokens.selection import TokenSelection


def dry_run(host: Host, root: Any) -> None:
    """Run a patched model over all tokens of a clip and over fewer, on a copy without weights.

    Where the copy fails, because the model's code wants values, the model itself runs one clip of zeros in `eval()`.

    Raises:
        TypeError: that fails too; it says in which module, and why.
    """
    twin = _without_foreign_hooks(on_meta(root))
    path = _trace_modules(twin, host.embeds(twin))
    try:
        _run(host, twin, torch.device("meta"))
    except Exception as on_copy:
        where = path[-1] if path else ""
        if next(root.parameters()).is_meta:
            raise _refusal(root, where, on_copy) from on_copy
        training = [(module, module.training) for module in root.modules()]
        try:
            with torch.random.fork_rng():
                _run(host, root.eval(), next(root.parameters()).device)
        except Exception as error:
            raise _refusal(root, where, error) from error
        finally:
            for module, mode in training:
                module.training = mode


def _run(host: Host, root: Any, device: torch.device) -> None:
    shape, grid, _ = host.example(root)
    dtype = next(root.parameters()).dtype
    tokens = math.prod(grid)
    # Fewer tokens in a number that divides into no rows, columns or steps: a forward that folds them into a grid fails.
    fewer = next(count for count in range(max(2, tokens // 2), 0, -1) if math.gcd(count, tokens) == 1 or count <= 2)
    for kept in (tokens, fewer):
        visible = max(1, kept // 4) if host.task(root) == "pretraining" else kept
        positions = torch.arange(kept, device=device)[None]
        steps = None if root.everest.frame_sampler is None else torch.arange(grid[0], device=device)[None]
        target = positions[:, visible:] if host.task(root) == "pretraining" else None
        selection = TokenSelection(positions[:, :visible], target, grid, steps=steps)
        with torch.no_grad():
            root(torch.zeros(shape, dtype=dtype, device=device), token_selection=selection)


def _refusal(root: nn.Module, where: str, error: Exception) -> TypeError:
    inside = f" in {where}" if where else ""
    return TypeError(
        f"{type(root).__qualname__} can't run over a part of its tokens: its forward fails{inside} with"
        f" {type(error).__name__}: {error}"
    )


def _without_foreign_hooks(twin: Any) -> Any:
    """Drop all hooks but the library's own: a user's must not hear of a forward that the user didn't ask for."""
    for module in twin.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if not str(hook.__module__).startswith("everest_tokens.")]:
                del hooks[key]
    return twin


def _trace_modules(twin: nn.Module, embedding: nn.Module) -> list[str]:
    """The paths of the modules that run, the innermost last; the embedding's parts must stay without hooks."""
    path: list[str] = []
    left_alone = set(embedding.modules())
    for name, module in twin.named_modules():
        if module not in left_alone:
            module.register_forward_pre_hook(lambda *_, name=name: path.append(name))
            module.register_forward_hook(lambda *_: path.pop())
    return path
