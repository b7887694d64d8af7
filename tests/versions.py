"""What releases of other libraries get wrong or lack, each by name: the one place where tests look at versions."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version


def before(package: str, fixed_in: str) -> bool:
    """Whether the installed `package` is older than `fixed_in`."""
    return Version(version(package)).release < Version(fixed_in).release


def set_attention(model: Any, implementation: str) -> None:
    """Switch a transformers model's attention; skips the test where this transformers can't, once a model is built."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(implementation)
    elif model.config._attn_implementation != implementation:
        pytest.skip("this transformers chooses the attention when it builds a model")


def needs_argument(cls: Any, name: str) -> None:
    """Skip the test where this transformers' `cls.forward` neither takes the argument nor hands it on."""
    parameters = inspect.signature(cls.forward).parameters
    if name not in parameters and "kwargs" not in parameters:
        pytest.skip(f"this transformers' {cls.__name__}.forward takes no {name}")


def autocast_keeps_gradients() -> bool:
    """Whether this torch's autocast casts weights again after a forward without grad. Older ones keep those casts."""
    layer = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            layer(torch.ones(1, 2))
        return layer(torch.ones(1, 2)).requires_grad
