"""Numbers with fewer bits, in which sums agree less closely, and with more, in which sums are taken.

Not every device has float64 (Apple's MPS): what is summed in it is brought to the host then.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
"""Dtypes with half of the bits: what is computed in them is rounded so that another order of summation shows."""
WITHOUT_FLOAT64 = {"mps"}
"""Types of devices."""


def summable(tensor: Tensor) -> Tensor:
    """Return a tensor where float64 can be computed: where it is, or on the host."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where it is or on the host."""
    return summable(tensor).double()


def sum_device(device: torch.device) -> torch.device:
    """Return the device on which sums in float64 over tensors of a device are taken."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def brought_to(device: torch.device, numbers: Tensor) -> Tensor:
    """Bring numbers in float64 from the host to a device, in float32 if it has nothing wider."""
    return numbers.to(torch.float32 if device.type in WITHOUT_FLOAT64 else numbers.dtype).to(device)
