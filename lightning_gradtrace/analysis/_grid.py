"""Which neuron of which matrix an entry lies in."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


@dataclass(frozen=True)
class Grid:
    """Entries that lie in a matrix, and the neurons they make up, in the order of the model.

    Attributes:
        entry: (e,) global entry numbers.
        row: (e,) which of the neurons each lies in.
        param: (neuron,) the parameter of each neuron.
        neuron: (neuron,) its column or row.
    """

    entry: IntArray
    row: IntArray
    param: list[_access.Shape]
    neuron: IntArray


def grid_of(trace: Trace, numbers: IntArray, axis: str) -> Grid:
    """Gather entries into the columns (`axis="in"`) or rows ("out") of their matrices.

    Entries of parameters with another number of axes are left out.
    """
    _access.check_axis(axis)
    known = _access.shapes(trace)
    at = np.searchsorted([p.offset for p in known], numbers, side="right") - 1
    in_matrix = np.array([len(p.shape) == 2 for p in known], dtype=bool)[at]
    numbers, at = numbers[in_matrix], at[in_matrix]
    width = np.array([p.shape[-1] if p.shape else 1 for p in known], dtype=np.int64)[at]
    index = numbers - np.array([p.offset for p in known], dtype=np.int64)[at]
    neuron = index % width if axis == "in" else index // width
    pairs, row = np.unique(np.stack([at, neuron]), axis=1, return_inverse=True)
    return Grid(numbers, row.reshape(-1), [known[i] for i in pairs[0]], pairs[1])


def check_neuron(trace: Trace, param: str, neuron: int, axis: str) -> None:
    """Raise unless the trace tracks a matrix of this name that has this column or row."""
    _access.check_axis(axis)
    shape = _access.matrix(trace, param).shape
    size, what = (shape[1], "columns") if axis == "in" else (shape[0], "rows")
    if not isinstance(neuron, Integral) or not 0 <= neuron < size:
        raise ValueError(f"`{param}` has shape {shape}, so {size} {what} (0 to {size - 1}), but `neuron` is {neuron!r}")
