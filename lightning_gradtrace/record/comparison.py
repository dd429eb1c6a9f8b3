"""Finds the entries of a block that reach a limit, in as few passes over memory as possible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_HOST = torch.device("cpu")
_EIGHT_TRUE = np.uint64(0x0101010101010101)


@dataclass
class Found:
    """What was found in a block.

    Attributes:
        sample: number of the sample within the block.
        row: row within it.
        column: column within it.
        shift: the shift.
        error: by how much its size may be wrong.
    """

    sample: np.ndarray
    row: np.ndarray
    column: np.ndarray
    shift: np.ndarray
    error: np.ndarray


def at_least(
    values: Tensor, factor: float, limit: np.ndarray, on_device: bool, k: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Find the entries with ``|factor * value| >= limit`` or not finite.

    Args:
        values: shape (n, numel), contiguous.
        factor: a number by which the values are still to be multiplied.
        limit: one per row.
        on_device: compare with torch where the values are, instead of with NumPy on the host.
        k: on a device, entries below the k-th largest of their row may be left out; 0 leaves out none.

    Returns:
        Flat positions, ascending, and the shifts there. A few below the limit may be among them.
    """
    # Compared before scaling, one pass less; a limit a little too low only lets in more candidates. With a learning
    # rate of zero all shifts are zero, or NaN.
    eps = torch.finfo(values.dtype).eps
    limits = limit * (1 - 4 * eps) / abs(factor) if factor else np.full_like(limit, np.inf)
    position, found = _with_torch(values, limits, k) if on_device else _with_numpy(values, limits)
    return position, found * found.dtype.type(factor)


def _with_numpy(values: Tensor, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = values.numpy()
    limits = limits[:, None].astype(found.dtype)
    whole = -(-found.size // 8) * 8
    small, above = (memory(name, (whole,), torch.bool).numpy() for name in ("small", "above"))
    np.less(found, limits, out=small[: found.size].reshape(found.shape))
    np.greater(found, -limits, out=above[: found.size].reshape(found.shape))
    np.logical_and(small, above, out=small)
    small[found.size :] = True
    # Almost nothing is found: eight comparisons at a time are looked at as one number.
    some = np.flatnonzero(small.view(np.uint64) != _EIGHT_TRUE)
    word, within = np.nonzero(~small.reshape(-1, 8)[some])
    position = some[word] * 8 + within
    return position, found.reshape(-1)[position]


def _with_torch(values: Tensor, limits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    size = values.abs()
    limit = torch.as_tensor(limits, dtype=values.dtype, device=values.device)
    if 0 < k < values.shape[1]:
        least = size.topk(k, dim=1).values[:, -1]
        limit = torch.where(least.isfinite(), torch.maximum(limit, least), limit)
    position = torch.logical_not(size < limit[:, None]).flatten().nonzero().squeeze(1)
    return position.cpu().numpy(), values.flatten()[position].cpu().numpy()


_memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


def memory(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _HOST) -> Tensor:
    """Return a tensor to write to, in memory that the next call with the same name writes to again.

    Fresh memory costs more than comparing what is in it.
    """
    size, key = int(np.prod(shape)), (name, dtype, device)
    if key not in _memory or len(_memory[key]) < size:
        _memory[key] = torch.empty(size, dtype=dtype, device=device)
    return _memory[key][:size].view(shape)


def product_of(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right`` for every sample, in `memory` that the next call writes to again.

    Args:
        left: shape (sample, position, row).
        right: shape (sample, position, column).
    """
    shape = (left.shape[0], left.shape[2], right.shape[2])
    return torch.bmm(left.transpose(1, 2), right, out=memory("product", shape, left.dtype, left.device))
