"""An order in which ties go to the lower index: in eager, under compile, in torch.export and in ONNX."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Rank each row of (B, N); ties, which a static clip has everywhere, go to the lower index.

    ONNX has no stable sort, but its TopK breaks ties towards the lower index (operator set 11 and later), where
    torch's says nothing: `topk` is what an ONNX export records, and only that (torch 2.7's
    newer exporter doesn't say that it runs). ONNX's TopK takes no 8-bit integers.

    Returns:
        (B, N) int64, indices of the row in ascending order of the values, or descending.
    """
    if torch.onnx.is_in_onnx_export():
        wide = values if values.is_floating_point() else values.int()
        return wide.topk(values.shape[1], dim=1, largest=descending).indices
    return values.sort(dim=1, descending=descending, stable=True).indices
