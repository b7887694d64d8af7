"""A first forward without weights, so that a model which can't run over fewer tokens is refused when patched."""

from __future__ import annotations

import math
import traceback
from typing import Any

import torch

from everest_tokens.dry_run import on_meta
from everest_tokens.hosts.base import Host
from everest_tokens.selection import TokenSelection


def trial_run(host: Host, root: Any) -> None:
    """Run a patched model over half the tokens of a clip, on a copy without weights, and note if it runs over no clip.

    What runs over those runs over all. Where the copy fails, because the model's code wants values, the model itself
    runs one clip of zeros in `eval()`.

    Raises:
        TypeError: that fails too; it says in which module and why, and whether all tokens fail as well.
    """
    twin = on_meta(root)
    _drop_foreign_hooks(twin)
    error = _failure(host, twin)
    root.everest.runs_without_clips = twin.everest.runs_without_clips
    where = _where(twin, error) if error is not None else ""
    if error is not None and not next(root.parameters()).is_meta:
        training = [(module, module.training) for module in root.modules()]
        try:
            with torch.random.fork_rng():
                error = _failure(host, root.eval())
        finally:
            for module, mode in training:
                module.training = mode
    if error is None:
        return
    runs = "runs over all tokens of a clip alone: over half of them its"
    try:
        _run(host, twin, part=False)
    except Exception:
        runs = "doesn't run over one clip: its"
    raise TypeError(
        f"{type(root).__qualname__} {runs} forward fails{where} with {type(error).__name__}: {error}"
    ) from error


def _failure(host: Host, model: Any) -> Exception | None:
    """What a forward over half the tokens raises; where it runs, note in `model.everest` if one over no clip does."""
    model.everest.runs_without_clips = True
    try:
        _run(host, model)
    except Exception as error:
        return error
    try:
        _run(host, model, clips=0)
    except Exception:
        model.everest.runs_without_clips = False
    return None


def _run(host: Host, root: Any, part: bool = True, clips: int = 1) -> None:
    (_, *clip), grid, _ = host.example(root)
    parameter, tokens = next(root.parameters()), math.prod(grid)
    kept = tokens
    if part:  # a number that fills no rows, columns or steps, so that a forward which folds tokens into a grid fails
        kept = next(count for count in range(max(2, tokens // 2), 1, -1) if math.gcd(count, tokens) == 1 or count == 2)
    pretraining = host.task(root) == "pretraining"
    visible = max(1, kept // 4) if pretraining else kept
    positions = torch.arange(kept, device=parameter.device).expand(clips, -1)
    steps = torch.arange(grid[0], device=parameter.device).expand(clips, -1) if root.everest.frame_sampler else None
    target = positions[:, visible:] if pretraining else None
    lengths = torch.full((clips,), visible, device="cpu") if root.everest.packs else None
    selection = TokenSelection(positions[:, :visible], target, grid, steps=steps, lengths=lengths)
    pixels = torch.zeros(clips, *clip, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad():
        root(pixels, token_selection=selection, **host.arguments(root))


def _drop_foreign_hooks(twin: Any) -> None:
    """Leave the library's own hooks alone: a user's must not hear of a forward that the user didn't ask for."""
    for module in twin.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if not str(hook.__module__).startswith("everest_tokens.")]:
                del hooks[key]


def _where(twin: Any, error: Exception) -> str:
    """The innermost of the model's modules that an error went through."""
    names = {id(module): name for name, module in twin.named_modules() if name}
    passed = (id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return "".join([f" in {names[module]}" for module in passed if module in names][-1:])
