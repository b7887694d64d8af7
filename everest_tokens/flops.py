"""What one forward of a clip costs: multiply–accumulates from shapes alone (paper Tables 1, 5, 10–12 and 15)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from everest_tokens.patching import host_of, is_patched, unwrap
from everest_tokens.selection import SelectionPolicy
from everest_tokens.selectors import ReRoSelector, TubeSelector

# Multiply–accumulates for each channel of a pair: a·b, and both norms where the distance divides by them.
_PRODUCTS = {"l2": 1, "l1": 1, "cosine": 3, "cka": 3}


@dataclass(frozen=True)
class FlopCount:
    """Multiply–accumulates of one clip's forward. `total / 1e9` is what the paper calls GFLOPs.

    Attributes:
        selection: the distances of Eq. 2.
        patch_embedding: the tubelet embedding of the whole clip, of all candidates with a frame sampler.
        encoder: linear layers and attention products of its blocks.
        decoder: encoder_to_decoder and the decoder's blocks; 0 without a decoder.
        head: the pixel head over the targets, or the classifier.
    """

    selection: int
    patch_embedding: int
    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return self.selection + self.patch_embedding + self.encoder + self.decoder + self.head


def count_flops(model: nn.Module, num_visible: int | None = None) -> FlopCount:
    """Count one clip's forward as the model would run it, patched or not; a model on the meta device will do.

    Args:
        model: a model that `patch_videomae` takes.
        num_visible: tokens that reach the encoder. Default: what the model's settings give; for an unpatched
            pre-training model VideoMAE's 90 % tube mask (160 of 1568), for another unpatched one all.

    Raises:
        TypeError: a model that `patch_videomae` doesn't take.
        ValueError: num_visible leaves no visible token, or no target where there must be one.
    """
    root = unwrap(model)
    shape = host_of(root).shape_of(root)
    grid = shape.grid
    candidates, compared = grid, 0
    visible = target = 0
    if is_patched(root):
        policy: SelectionPolicy = root.everest
        candidates = (policy.num_candidates(grid[0]), *grid[1:])
        selection = policy.select(torch.empty(1, math.prod(candidates), shape.width, device="meta"), grid)
        visible, target = selection.visible.shape[1], 0 if selection.target is None else selection.target.shape[1]
        if isinstance(policy.selector, ReRoSelector):
            passes = [grid] if policy.frame_sampler is None else [candidates, grid]
            products = _PRODUCTS.get(policy.selector.settings["distance"], 0)
            compared = products * sum((t - 1) * h * w * shape.width for t, h, w in passes)
    elif shape.decoder is None:
        visible = math.prod(grid)
    else:
        visible = TubeSelector(0.1).num_kept(grid)
        target = math.prod(grid) - visible
    if num_visible is not None:
        kept = visible + target
        most = kept if shape.decoder is None else kept - 1  # a decoder needs a target
        if not 1 <= num_visible <= most:
            raise ValueError(f"num_visible must be in 1…{most} ({kept} tokens are kept), got {num_visible}")
        visible, target = num_visible, target and kept - num_visible

    decoder = 0 if shape.decoder is None else visible * shape.bridge + shape.decoder.macs(visible + target)
    seen_by_head = target
    if shape.decoder is None:
        seen_by_head = visible + (0 if shape.head_drops_prefix else shape.prefix)
    return FlopCount(
        selection=compared,
        patch_embedding=math.prod(candidates) * shape.projection,
        encoder=shape.encoder.macs(shape.prefix + visible),
        decoder=decoder,
        head=seen_by_head * shape.head_per_token + shape.head_per_clip,
    )
