"""Numbers with fewer bits, in which sums agree less closely, and with more, in which sums are taken.

Not every device has float64 (Apple's MPS): what is summed in it is brought to the host then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
"""Dtypes with half of the bits: what is computed in them is rounded so that another order of summation shows."""
FINE_TO_COARSE = (torch.float64, torch.float32, *HALF)
"""Dtypes by how closely they round."""
WITHOUT_FLOAT64 = {"mps"}
"""Types of devices."""


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that rounds most, one of `FINE_TO_COARSE`.

    Args:
        dtypes: one or more. A complex one counts as that of its parts, one with fewer bits than 16 as the last.
    """
    parts = [dtype.to_real() if dtype.is_complex else dtype for dtype in dtypes]
    last = len(FINE_TO_COARSE) - 1
    return FINE_TO_COARSE[max(FINE_TO_COARSE.index(part) if part in FINE_TO_COARSE else last for part in parts)]


def coarsest_by_name(found: Iterable[Mapping[str, torch.dtype]]) -> dict[str, torch.dtype]:
    """Return of every name the dtype that rounds most, see `coarsest`."""
    merged: dict[str, torch.dtype] = {}
    for part in found:
        merged.update({name: coarsest([dtype, merged.get(name, dtype)]) for name, dtype in part.items()})
    return merged


def summable(tensor: Tensor) -> Tensor:
    """Return a tensor where float64 can be computed: where it is, or on the host."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where it is or on the host."""
    return summable(tensor).double()


def sum_device(device: torch.device) -> torch.device:
    """Return the device on which sums in float64 over tensors of a device are taken."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def brought_to(device: torch.device, numbers: Tensor, non_blocking: bool = False) -> Tensor:
    """Bring numbers from the host to a device, those in float64 in float32 if it has nothing wider."""
    narrow = device.type in WITHOUT_FLOAT64 and numbers.dtype == torch.float64
    return (numbers.float() if narrow else numbers).to(device, non_blocking=non_blocking)
