"""S(·,·) of Eq. 2: how much a token changed from the one before it (paper §4.1, Appendix B, Table 9).

Four pure functions of two tensors (..., D) that return float32 (...,); larger means more changed. Where the two
vectors are equal element by element the result is exactly the least the distance can take (0, 0, -1, -1). A 0/0
between different vectors (cosine of a zero vector, correlation of a constant one) counts as most changed, because
nothing says that they are alike. Finite input never gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def _float32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # beyond float32's range the cast gives inf, and inf - inf NaN
        limit = torch.finfo(torch.float32).max
        x = x.clamp(-limit, limit)
    return x.float()


def l2(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖₂, the paper's default. (..., D), (..., D) → (...,) float32."""
    return torch.linalg.vector_norm(_float32(a) - _float32(b), dim=-1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖₁. (..., D), (..., D) → (...,) float32."""
    return (_float32(a) - _float32(b)).abs().sum(dim=-1)


def _unit(x: Tensor) -> Tensor:
    # Dividing by the largest element first keeps the squares of very large or very small vectors in range.
    x = x / _nonzero(x.abs().amax(dim=-1, keepdim=True))
    return x / _nonzero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """−cos(a, b) in [−1, 1]. (..., D), (..., D) → (...,) float32."""
    a, b = _float32(a), _float32(b)
    alike = (_unit(a) * _unit(b)).sum(dim=-1).clamp(-1.0, 1.0)
    undefined = (a == 0).all(dim=-1) | (b == 0).all(dim=-1)
    alike = torch.where(undefined, -1.0, alike)
    return 0.0 - torch.where((a == b).all(dim=-1), 1.0, alike)  # 0 - x, since -x would tell 0 from -0


def cka(a: Tensor, b: Tensor) -> Tensor:
    """Minus linear CKA, in [−1, 0]. (..., D), (..., D) → (...,) float32.

    For two single vectors of D features linear CKA (Cortes et al., 2012) is the squared Pearson correlation over D.
    """
    a, b = _float32(a), _float32(b)
    alike = (_unit(_centred(a)) * _unit(_centred(b))).sum(dim=-1).square().clamp(max=1.0)
    # A constant vector's centred elements are zero but for rounding, so look at the vector itself.
    undefined = (a == a[..., :1]).all(dim=-1) | (b == b[..., :1]).all(dim=-1)
    alike = torch.where(undefined, 0.0, alike)
    return 0.0 - torch.where((a == b).all(dim=-1), 1.0, alike)


def _centred(x: Tensor) -> Tensor:
    x = x / _nonzero(x.abs().amax(dim=-1, keepdim=True))
    return x - x.mean(dim=-1, keepdim=True)


DISTANCES: dict[str, Distance] = {"l2": l2, "l1": l1, "cosine": cosine, "cka": cka}
