"""What one forward of a clip costs: multiply–accumulates from shapes alone (paper Tables 1, 5, 10–12 and 15)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from everest_tokens.dry_run import counting, on_meta
from everest_tokens.hosts.running import forward_of
from everest_tokens.importance import MeasuresChange
from everest_tokens.patching import host_of, is_patched, patch_videomae, unwrap
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import RandomSelector, TubeSelector

# Where the parts lie in the hosts' models; all else is the encoder.
_EMBEDDINGS = (
    *("embeddings", "videomae.embeddings", "vivit.embeddings", "timesformer.embeddings"),
    *("encoder.embeddings", "vjepa2.encoder.embeddings", "patch_embed", "encoder.patch_embed"),
)
_DECODER, _DECODERS_HEAD = ("encoder_to_decoder", "decoder"), "decoder.head"
_HEADS = ("classifier", "head", "head_dist", "head_verb", "head_noun", "attn_pool", "pooler")
# Multiply–accumulates for each channel of a pair: a·b, and both norms where the distance divides by them.
_PRODUCTS = {"l2": 1, "l1": 1, "cosine": 3, "cka": 3}


@dataclass(frozen=True)
class FlopCount:
    """Multiply–accumulates of one clip's forward. `total / 1e9` is what the paper calls GFLOPs.

    Attributes:
        selection: the distances of Eq. 2, and the matrix products of a custom selector, or of undoing the camera's
            motion.
        patch_embedding: the tubelet embedding of the whole clip, of all candidates with a frame sampler.
        encoder: linear layers and attention products of its blocks.
        decoder: encoder_to_decoder and the decoder's blocks; 0 without a decoder.
        head: the pixel head over the targets, or the classifier with its pooling.
    """

    selection: int
    patch_embedding: int
    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_flops(model: nn.Module, num_visible: int | None = None) -> FlopCount:
    """Count one clip's forward, patched or not, by torch's `FlopCounterMode` over a copy without weights.

    The model is left alone, and may be on the meta device. Products written element by element don't count.

    Args:
        model: a model that `patch_videomae` takes. Its forward hooks run, with tensors of the meta device.
        num_visible: tokens that reach the encoder. Default: what the model's settings give, the most that a budget
            for each clip (`EnergyBudget`) lets through; for an unpatched pre-training model VideoMAE's 90 % tube mask
            (160 of 1568), for another unpatched one all.

    Raises:
        TypeError: a model that `patch_videomae` doesn't take, one whose forward needs the values of its weights or
            pixels, or calls an operator of unknown cost (`torch.utils.flop_counter.register_flop_formula` gives it).
        ValueError: num_visible leaves no visible token, or no target where there must be one.
    """
    root = unwrap(model)
    host = host_of(root)
    host.check(root)
    shape, grid, channels = host.example(root)
    if num_visible is not None and grid[0] == 1:
        raise ValueError(
            f"num_visible={num_visible}: {type(root).__qualname__} runs an image's every token until it is patched"
        )
    pretraining = host.task(root) == "pretraining"
    with counting(root):
        running = on_meta(root)
        if not is_patched(root) and (pretraining or num_visible is not None):
            # Its own forward takes tokens by a boolean mask, which has no values on the meta device.
            if hasattr(running, "config"):
                running.config.everest = None
            patch_videomae(running, RandomSelector(1.0), visible=TubeSelector(0.1) if pretraining else None)

    given, compared = host.arguments(running), 0
    if is_patched(running):
        policy, (_, height, width) = running.everest, grid
        passes = [grid[0]] if policy.frame_sampler is None else [policy.num_candidates(grid[0]), grid[0]]
        with counting(root, RuntimeError) as counter, forward_of(policy) as current:
            host.embeds(running)(torch.empty(shape, dtype=torch.float32, device="meta"))
        selection = current.selection
        given["token_selection"] = selection if num_visible is None else _with_visible(selection, num_visible)
        products = 0
        if isinstance(policy.selector, MeasuresChange):
            products = _PRODUCTS.get(policy.selector.settings["distance"], 0)
        pairs = sum(steps - 1 for steps in passes) * height * width
        compared = pairs * channels * products + counter.get_total_flops() // 2
    with counting(root) as counter:
        running(torch.empty(shape, dtype=torch.float32, device="meta"), **given)
    # PEFT's modules_to_save puts the copy that runs where the model's own part was.
    by_module = {
        re.sub(r"\.modules_to_save\.[^.]+", "", name): each for name, each in counter.get_flop_counts().items()
    }

    def spent(*paths: str) -> int:
        names = (f"{type(running).__name__}.{path}" for path in paths)
        return sum(sum(by_module[name].values()) for name in names if name in by_module) // 2

    embedding, head = spent(*_EMBEDDINGS), spent(_DECODERS_HEAD, *_HEADS)
    decoder = spent(*_DECODER) - spent(_DECODERS_HEAD)
    encoder = counter.get_total_flops() // 2 - embedding - decoder - head
    if is_patched(running):
        compared -= embedding  # of which selecting needed one, counted by itself
    return FlopCount(compared, embedding, encoder, decoder, head)


def _with_visible(selection: TokenSelection, num_visible: int) -> TokenSelection:
    """A selection of as many tokens of which `num_visible` are visible: which ones costs the same."""
    kept = selection.kept
    most = kept.shape[1] - (selection.target is not None)  # a decoder needs a target
    if not isinstance(num_visible, int) or not 1 <= num_visible <= most:
        raise ValueError(f"num_visible must be in 1…{most} ({kept.shape[1]} tokens are kept), got {num_visible}")
    target = None if selection.target is None else kept[:, num_visible:]
    return replace(selection, visible=kept[:, :num_visible], target=target, lengths=None)
