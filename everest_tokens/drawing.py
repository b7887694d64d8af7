"""Which selections of a clip are drawn: what a model keeps, and what other masking strategies would keep (Figure 8)."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from everest_tokens.patching import select_tokens
from everest_tokens.selection import TokenSelection, compensates
from everest_tokens.selectors import RandomSelector, ReRoSelector, RunningCellSelector, TubeSelector

logger = logging.getLogger(__name__)

_UNITS = {"l2": "L2 distance", "l1": "L1 distance", "cosine": "−cosine", "cka": "−CKA"}


def unit_of(selector: Any) -> str:
    """Say what a selector's importance is measured in; "" where it doesn't tell."""
    return _UNITS.get(getattr(selector, "distance", ""), "")


def kept_by(model: Any, clip: Tensor, selector: Any, seed: int = 0) -> TokenSelection:
    """What a selector keeps of the model's embedding, however few that is; the model has it from now on."""
    policy = model.everest
    policy.frame_sampler = None  # a clip's own frames are drawn, and which of the kept tokens are visible is not
    policy.selector, policy.visible = selector, None
    policy.mask_ratio = 1 - policy.share_kept() / 2
    return select_tokens(model, clip, generator=torch.Generator().manual_seed(seed))


def frames_of(model: Any, frames: Tensor, selection: TokenSelection) -> Tensor:
    """Of all frames (T, …) that a model takes those that a selection's first clip is of: a sampler draws them."""
    if selection.steps is None:
        return frames
    candidates = frames.unflatten(0, (model.everest.num_candidates(selection.grid[0]), -1))
    return candidates[selection.steps[0].cpu()].flatten(0, 1)


def kept(model: Any, clip: Tensor) -> dict[str, TokenSelection]:
    """What the model keeps; where the camera's motion is compensated, what would be kept if it were ignored too."""
    own = model.everest.selector
    if not compensates(own):
        return {"kept": kept_by(model, clip, own)}
    ignoring = copy.deepcopy(own)
    ignoring.camera = "ignore"
    found = {"kept, camera ignored": kept_by(model, clip, ignoring)}
    return {"kept, camera compensated": kept_by(model, clip, own), **found}


def nearest_running_cells(ratio: float) -> RunningCellSelector:
    """Running cells keep a quarter, a half or three quarters: the nearest to a keep ratio."""
    return RunningCellSelector(min(max(round(4 * ratio), 1), 3) / 4)


def strategies(model: Any, clip: Tensor, *, ratio: float = 0.5, seed: int = 0) -> dict[str, TokenSelection]:
    """What random, tube, running cell and ReRo selection keep at one ratio (Figure 8), and what ReRo's variants do.

    A grid of odd height or width has no running cells. An anchor is drawn where more tokens are kept than those of its
    step. The model's own selector stays; of its settings the distance and the order are drawn.
    """
    own = model.everest.selector
    rows: dict[str, Any] = {"random (ST-MAE)": RandomSelector(ratio), "tube (VideoMAE)": TubeSelector(ratio)}
    grid = model.everest.host.example(model.everest.root)[1]
    if grid[1] % 2 == 0 and grid[2] % 2 == 0:
        rows["running cell (VideoMAE V2)"] = nearest_running_cells(ratio)
    else:
        logger.info("no running cells on %d×%d tokens: they are of 2×2", *grid[1:])
    rero = copy.deepcopy(own) if isinstance(own, ReRoSelector) else ReRoSelector()
    rero.keep_ratio, rero.anchor, rero.camera = ratio, None, "ignore"  # which the variants' rows show
    rows["ReRo (EVEREST)"] = rero
    variants = {"ReRo, camera compensated": ("camera", "compensate")}
    if rero.num_kept(grid) > grid[1] * grid[2]:
        variants = {"ReRo, first step anchored": ("anchor", "first"), **variants}
    for label, (name, value) in variants.items():
        rows[label] = copy.deepcopy(rero)
        setattr(rows[label], name, value)
    try:
        return {label: kept_by(model, clip, selector, seed) for label, selector in rows.items()}
    finally:
        model.everest.selector = own
