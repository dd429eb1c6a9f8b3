"""Finds the entries of a block that reach a limit, in as few passes over memory as possible."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.record.search.candidates import kth_largest

T = TypeVar("T", np.ndarray, Tensor)

_HOST = torch.device("cpu")
# With more words of eight that hold an entry than this times k, a row's own k-th largest is taken for a limit.
MANY = 8


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
    values: Tensor, factor: float, limit: np.ndarray, on_device: bool, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the entries with ``|factor * value| >= limit`` or not finite.

    Args:
        values: shape (n, numel), contiguous.
        factor: a number by which the values are still to be multiplied.
        limit: one per row.
        on_device: compare with torch where the values are, instead of with NumPy on the host.
        k: entries below the k-th largest of their row may be left out; 0 leaves out none.

    Returns:
        Flat positions, ascending, and the shifts there. A few below the limit may be among them.
    """
    kind, slack, size = torch.finfo(values.dtype), _slack(values.dtype), np.abs(np.float64(factor))
    search = _with_torch if on_device else _with_numpy
    with np.errstate(all="ignore"):
        normal = Range(float(kind.tiny / size), float(kind.max * slack / size))
        position, found = search(values, before_scaling(limit, factor, values.dtype), k, normal, slack)
        return position, found * found.dtype.type(factor)


def before_scaling(limit: T, factor: float, dtype: torch.dtype) -> T:
    """Return what values have to reach that are still to be multiplied by a factor: one pass less than scaling them.

    Scaling rounds, so what is a little smaller may tie with a limit; beyond the range of normal numbers, what is much
    smaller. With a learning rate of zero all shifts are zero, or NaN.
    """
    with np.errstate(all="ignore"):
        return limit * float(_slack(dtype) / np.abs(np.float64(factor)))


def _slack(dtype: torch.dtype) -> float:
    return 1 - 4 * torch.finfo(dtype).eps


class Range(NamedTuple):
    """Sizes that are normal numbers after scaling."""

    low: float
    high: float

    def holds(self, sizes: Any) -> Any:
        """Say of every size, of NumPy or torch, whether it is one."""
        return (sizes >= self.low) & (sizes <= self.high)


def _with_numpy(
    values: Tensor, limits: np.ndarray, k: int, normal: Range, slack: float
) -> tuple[np.ndarray, np.ndarray]:
    rows = values.numpy()
    reached = _reached(rows, limits)
    # Almost nothing is found: eight comparisons at a time are looked at as one number.
    some = np.flatnonzero(reached.view(np.uint64))
    if 0 < k < rows.shape[1] and len(some) > MANY * k * len(rows):  # the first step has no threshold yet
        least = np.array([kth_largest(row, k) for row in rows])
        reached = _reached(rows, np.where(normal.holds(least), np.maximum(limits, least * slack), limits))
        some = np.flatnonzero(reached.view(np.uint64))
    word, within = np.nonzero(reached.reshape(-1, 8)[some])
    position = some[word] * 8 + within
    return position, rows.reshape(-1)[position]


def _reached(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Say which values reach the limit of their row or are NaN, flat; filled up with none to whole words of eight."""
    limits = limits[:, None].astype(values.dtype)
    whole = -(-values.size // 8) * 8
    small, above = (memory(name, (whole,), torch.bool).numpy() for name in ("small", "above"))
    np.less(values, limits, out=small[: values.size].reshape(values.shape))
    np.greater(values, -limits, out=above[: values.size].reshape(values.shape))
    np.logical_and(small, above, out=small)
    small[values.size :] = True
    return np.logical_not(small, out=small)


def _with_torch(
    values: Tensor, limits: np.ndarray, k: int, normal: Range, slack: float
) -> tuple[np.ndarray, np.ndarray]:
    limit = torch.from_numpy(limits).to(values.dtype).to(values.device, non_blocking=True)
    position = _positions(values, limit)
    if 0 < k < values.shape[1] and len(position) > MANY * k * len(values):
        least = values.abs().topk(k, dim=1).values[:, -1]
        position = _positions(values, torch.where(normal.holds(least), torch.maximum(limit, least * slack), limit))
    return position.cpu().numpy(), values.flatten()[position].cpu().numpy()


def raised(limit: Tensor, values: Tensor, factor: float, k: int) -> Tensor:
    """Raise limits to the k-th largest shifts of their rows; waits for nothing.

    Args:
        limit: what shifts have to reach, one per row, or one for all.
        values: shape (n, numel), contiguous.
        factor: a number by which the values are still to be multiplied.
        k: number of entries of a row, or of all rows if there is one limit for all.
    """
    rows = values.view(len(limit), -1)
    if k > rows.shape[1]:
        return limit
    least = rows.abs().topk(k, dim=1).values[:, -1].to(limit.dtype) * abs(factor)
    kind = torch.finfo(values.dtype)
    normal = Range(kind.tiny, kind.max * _slack(values.dtype))
    return torch.where(normal.holds(least), torch.maximum(limit, least), limit)


def first_positions(values: Tensor, factor: float, limit: Tensor, room: int) -> Tensor:
    """Return the first flat positions of shifts that reach the limit of their row or are NaN; waits for nothing.

    Args:
        values: shape (n, numel), contiguous.
        factor: a number by which the values are still to be multiplied.
        limit: one per row, or one for all.
        room: number of positions to return.

    Returns:
        Positions, ascending, shape (room,); filled up with -1. A few below the limit may be among them.
    """
    reach = _reach(values, before_scaling(limit, factor, values.dtype).to(values.dtype))
    return torch.nonzero_static(reach, size=room, fill_value=-1).squeeze(1)


def _positions(values: Tensor, limit: Tensor) -> Tensor:
    """Return the flat positions of values that reach the limit of their row or are NaN; waits for the device."""
    return _reach(values, limit).nonzero().squeeze(1)


def _reach(values: Tensor, limit: Tensor) -> Tensor:
    """Say which values reach the limit of their row or are NaN, flat."""
    return (values.abs() < limit[:, None]).logical_not_().flatten()


class _Memory(threading.local):
    """Tensors to write to, of this thread."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_memory = _Memory()


def memory(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _HOST) -> Tensor:
    """Return a tensor to write to, in memory that this thread's next call with the same name writes to again.

    Fresh memory costs more than comparing what is in it.
    """
    size, key, tensors = int(np.prod(shape)), (name, dtype, device), _memory.tensors
    if key not in tensors or len(tensors[key]) < size:
        tensors[key] = torch.empty(size, dtype=dtype, device=device)
    return tensors[key][:size].view(shape)


def product_of(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right`` for every sample, in `memory` that the next call writes to again.

    Args:
        left: shape (sample, position, row).
        right: shape (sample, position, column).
    """
    shape = (left.shape[0], left.shape[2], right.shape[2])
    return torch.bmm(left.transpose(1, 2), right, out=memory("product", shape, left.dtype, left.device))
