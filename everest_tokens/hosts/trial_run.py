"""A first forward without weights, so that a model which can't run over fewer tokens is refused when patched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from everest_tokens.dry_run import on_meta
from everest_tokens.hosts.base import Host
from everest_tokens.selection import TokenSelection


def trial_run(host: Host, root: Any) -> None:
    """Run a patched model over half the tokens of a clip, on a copy without weights.

    What runs over those runs over all. Where the copy fails, because the model's code wants values, the model itself
    runs one clip of zeros in `eval()`.

    Raises:
        TypeError: that fails too; it says in which module and why, and whether all tokens fail as well.
    """
    twin = _without_foreign_hooks(on_meta(root))
    path = _trace_modules(twin, host.embeds(twin))
    try:
        _run(host, twin, part=True)
        return
    except Exception as error:
        reason, where = error, f" in {path[-1]}" if path and path[-1] else ""
    if not next(root.parameters()).is_meta:
        training = [(module, module.training) for module in root.modules()]
        try:
            with torch.random.fork_rng():
                _run(host, root.eval(), part=True)
            return
        except Exception as error:
            reason = error
        finally:
            for module, mode in training:
                module.training = mode
    failure = f"fails{where} with {type(reason).__name__}: {reason}"
    try:
        _run(host, twin, part=False)
    except Exception:
        raise TypeError(f"{type(root).__qualname__} doesn't run over one clip: its forward {failure}") from reason
    raise TypeError(
        f"{type(root).__qualname__} runs over all tokens of a clip alone: over half of them its forward {failure}"
    ) from reason


def _run(host: Host, root: Any, part: bool) -> None:
    shape, grid, _ = host.example(root)
    parameter = next(root.parameters())
    device, dtype, tokens = parameter.device, parameter.dtype, math.prod(grid)
    kept = tokens
    if part:  # a number that fills no rows, columns or steps, so that a forward which folds tokens into a grid fails
        kept = next(count for count in range(max(2, tokens // 2), 1, -1) if math.gcd(count, tokens) == 1 or count == 2)
    visible = max(1, kept // 4) if host.task(root) == "pretraining" else kept
    positions = torch.arange(kept, device=device)[None]
    steps = None if root.everest.frame_sampler is None else torch.arange(grid[0], device=device)[None]
    target = positions[:, visible:] if host.task(root) == "pretraining" else None
    selection = TokenSelection(positions[:, :visible], target, grid, steps=steps)
    with torch.no_grad():
        root(torch.zeros(shape, dtype=dtype, device=device), token_selection=selection, **host.arguments(root))


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
            module.register_forward_hook(lambda *_: path.__delitem__(-1))  # a hook's value would replace the output
    return path
