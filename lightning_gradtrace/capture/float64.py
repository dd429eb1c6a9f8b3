"""Sums in float64, also of what is on a device that has no such numbers (Apple's MPS): on the host then."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = {"mps"}
"""Types of devices without float64."""


def summable(tensor: Tensor) -> Tensor:
    """Return a tensor where float64 can be computed: where it is, or on the host."""
    return tensor.cpu() if tensor.device.type in WITHOUT else tensor


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where it is or on the host."""
    return summable(tensor).double()


def sum_device(device: torch.device) -> torch.device:
    """Return the device on which sums in float64 over tensors of a device are taken."""
    return torch.device("cpu") if device.type in WITHOUT else device


def brought_to(device: torch.device, numbers: Tensor) -> Tensor:
    """Bring numbers in float64 from the host to a device, in float32 if it has nothing wider."""
    return numbers.to(torch.float32 if device.type in WITHOUT else numbers.dtype).to(device)
