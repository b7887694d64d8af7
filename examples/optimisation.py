"""Parameter groups for AdamW: layer-wise learning rates in fine-tuning, weight decay only where it belongs."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import VideoMAEModel

# One vector each, although stored as (1, 1, D); BEiT exempts them from weight decay as it does biases.
_TOKENS = ("cls_token", "mask_token")


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimiser whose learning rates fall towards the input (BEiT, Bao et al. 2021, App. H).

    With L encoder blocks the embeddings are layer 0, block i is layer i + 1, and all after the blocks (final norm,
    classifier, decoder) is layer L + 1. Layer l learns with lr·layer_decay^(L + 1 − l), so that what comes last has the
    full `lr`, and with `layer_decay=1` (pre-training) everything has. Biases, the parameters of norms and single tokens
    get no weight decay.

    (timm's `param_groups_layer_decay` writes an `lr_scale` that only timm's optimisers and schedulers look at.)

    Args:
        model: a transformers VideoMAE, patched or not, wrapped (DDP, torch.compile, PEFT) or not. Its frozen parameters
            are left out.
        lr: learning rate of the last layer, after scaling with the batch size.
        weight_decay: of matrices and kernels.
        layer_decay: in (0, 1], 0.75 in Table 8.

    Returns:
        [{"params", "lr", "weight_decay"}], no two of the same rates, each trainable parameter in exactly one, the
        highest rate first: Trainer logs the first group's.

    Raises:
        ValueError: a number out of its range, a model without a transformers VideoMAE in it, or all of it frozen.
    """
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay!r}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}")

    backbone = next((module for module in model.modules() if isinstance(module, VideoMAEModel)), None)
    if backbone is None:
        raise ValueError(f"expected a transformers VideoMAE (VideoMAEForVideoClassification, …), got {type(model)!r}")
    # Modules rather than names say which layer it is: wrappers and adapters put prefixes and infixes into names.
    blocks = backbone.encoder.layer
    layers = [backbone.embeddings, *blocks]
    layer_of = {parameter: number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    last = len(blocks) + 1

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim <= 1 or name.endswith((".bias", *_TOKENS))
        rates = (lr * layer_decay ** (last - layer_of.get(parameter, last)), 0.0 if vector else weight_decay)
        groups.setdefault(rates, []).append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__qualname__} has no trainable parameters: all of them are frozen")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
