"""What releases of other libraries get wrong or lack, each by name: the one place where tests look at versions."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


def before(package: str, fixed_in: str) -> bool:
    """Whether the installed `package` is older than `fixed_in`."""
    return Version(version(package)).release < Version(fixed_in).release


def broken_before(package: str, fixed_in: str, reason: str) -> pytest.MarkDecorator:
    """Mark a test that cannot pass with `package` before the release that mended it."""
    return pytest.mark.skipif(before(package, fixed_in), reason=f"{package} before {fixed_in}: {reason}")


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
