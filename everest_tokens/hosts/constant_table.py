"""A constant that a forward needs on its device: copied there once, not at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class ConstantTable:
    """Holds a constant tensor and its copies on the devices in use.

    Not a buffer: buffers follow the model's dtype, DDP broadcasts them at every step, and they add to what a model
    reports as its own. Copying from the host at every forward instead would stall an accelerator.
    """

    def __init__(self, value: Tensor, device: torch.device) -> None:
        self.value = value.detach()
        self._copies = {device: self.value.to(device)}

    def to(self, device: torch.device) -> Tensor:
        """The constant on `device`."""
        if device in self._copies:
            return self._copies[device]
        copy = self.value.to(device)
        if not torch.compiler.is_compiling():  # a graph must not keep what it computes
            self._copies[device] = copy
        return copy
