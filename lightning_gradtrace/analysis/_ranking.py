"""The largest values of each group, found in one pass over blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray


def first_of_rows(row: IntArray, keys: tuple[npt.NDArray[Any], ...], most: int) -> IntArray:
    """Order by row and then by `keys` (last key first), and keep the first `most` of every row."""
    order = np.lexsort([*keys, row])
    ordered = row[order]
    return order[np.arange(row.size) - np.searchsorted(ordered, ordered) < most]


class LargestOfRows:
    """Keeps the n largest values of each row, whatever comes; ties by what came first.

    Memory: rows x n x 8 bytes for values and for each column kept beside them, and a block.

    Args:
        n_rows: number of rows.
        n: how many to keep of each.
    """

    def __init__(self, n_rows: int, n: int) -> None:
        self._n = n
        # What a row must exceed once it holds n values.
        self._floor = np.full(n_rows, -np.inf)
        self._held: list[npt.NDArray[Any]] | None = None

    def add(self, row: IntArray, value: FloatArray, *columns: npt.NDArray[Any]) -> None:
        """Offer values (m,) of rows (m,) with further columns (m,); values that are not finite are left out."""
        chosen = np.flatnonzero((value > self._floor[row]) & np.isfinite(value))
        if not chosen.size and self._held is not None:
            return
        new = [column[chosen] for column in (row, value, *columns)]
        if self._held is not None:
            new = [np.concatenate(pair) for pair in zip(self._held, new, strict=True)]
        keep = first_of_rows(new[0], (np.arange(new[0].size), -new[1]), self._n)
        self._held = [column[keep] for column in new]
        row, value = self._held[:2]
        count = np.bincount(row, minlength=self._floor.size)
        last = np.cumsum(count) - 1
        full = count == self._n
        self._floor[full] = value[last[full]]

    def merge(self, later: LargestOfRows) -> LargestOfRows:
        """Return what is kept of all that was offered to this one and then to another one."""
        both = LargestOfRows(self._floor.size, self._n)
        for one in (self, later):
            if one._held is not None:
                both.add(*one._held)
        return both

    def result(self, n_columns: int) -> list[npt.NDArray[Any]]:
        """Return row, value and the further columns, rows ascending, the largest value of a row first."""
        if self._held is None:
            return [np.zeros(0, dtype=np.int64), np.zeros(0), *[np.zeros(0, dtype=np.int64)] * n_columns]
        return self._held


def ranks(row: IntArray) -> IntArray:
    """Return 1, 2, ... inside each run of equal, ascending rows."""
    return np.arange(row.size) - np.searchsorted(row, row) + 1
