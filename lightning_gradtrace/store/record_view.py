"""Rows of a record: which occurrence has which row, in records that keep every step and in those that don't."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lightning_gradtrace.store.checked import CheckedArray
from lightning_gradtrace.store.reading import find_array
from lightning_gradtrace.store.schema import escape
from lightning_gradtrace.store.target import StoreError

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace

V = TypeVar("V")


class Rows:
    """The rows of one group.

    Args:
        trace: the trace.
        group: the group, such as "dense/fc.weight".
        axis: its first axis, "occurrence" or "step".
    """

    def __init__(self, trace: Trace, group: str, axis: str = "occurrence") -> None:
        self._trace, self._group, self._axis = trace, group, axis

    @cached_property
    def labels(self) -> np.ndarray:
        """Occurrences or steps of the rows, rising, shape (rows,).

        Raises:
            StoreError: if they don't rise, or name what the trace doesn't hold.
        """
        found = self._trace.row_labels(self._group, self._axis)
        known = self._trace.n_occurrences if self._axis == "occurrence" else np.inf
        if len(found) and (found[0] < 0 or found[-1] >= known or (np.diff(found) <= 0).any()):
            raise StoreError(f"`{self._group}/{self._axis}` doesn't rise within the trace's rows: the trace is damaged")
        return found

    def find(self, labels: np.ndarray) -> np.ndarray:
        """Return the row of every label, -1 where there is none; shape of ``labels``."""
        if not len(self.labels):
            return np.full(labels.shape, -1, np.int64)
        row = np.searchsorted(self.labels, labels).clip(0, len(self.labels) - 1)
        return np.where(self.labels[row] == labels, row, -1)

    def of(self, labels: Any) -> np.ndarray:
        """Return the row of every label.

        Args:
            labels: numbers of occurrences or steps, in any order.

        Returns:
            Row numbers, shape (n,).

        Raises:
            KeyError: if one has no row.
        """
        wanted = np.atleast_1d(np.asarray(labels, np.int64))
        row = self.find(wanted)
        if (row < 0).any():
            known = self.labels
            span = f"{len(known)} of them, {known[0]} to {known[-1]}" if len(known) else "none"
            raise KeyError(f"{self._axis} {wanted[row < 0][0]} has no row in `{self._group}`, which holds {span}")
        return row


def array_of(trace: Trace, path: str) -> CheckedArray:
    """Give access to an array that a record must have.

    Raises:
        StoreError: if the trace has no such array.
    """
    # Of a trace of several ranks, some parts may hold what others never needed.
    holder = next((part for part in trace.parts if part.has(path)), trace)
    find_array(holder.group, path)
    return trace.checked(path)


def read_rows(array: Any, rows: np.ndarray) -> np.ndarray:
    """Read rows of a zarr array in any order, neighbouring ones at once; shape (n, *tail)."""
    order = np.unique(rows)
    breaks = np.flatnonzero(np.diff(order) > 1) + 1
    runs = [run for run in np.split(order, breaks) if len(run)]
    parts = [np.asarray(array[int(run[0]) : int(run[-1]) + 1]) for run in runs]
    found = np.concatenate(parts) if parts else np.empty((0, *array.shape[1:]), array.dtype)
    return np.asarray(found[np.searchsorted(order, rows)])


class ByParameter(Mapping[str, V]):
    """A record that has something for every tracked parameter, by name.

    Args:
        trace: the trace.
    """

    group = ""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getitem__(self, name: str) -> V:
        """Return what the record holds of one parameter.

        Raises:
            KeyError: if it is not tracked.
        """
        self._trace.param(name)
        return self._of(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tracked parameters."""
        return iter(self._trace.params["param"])

    def __len__(self) -> int:
        """Number of tracked parameters."""
        return len(self._trace.params)

    def _of(self, name: str) -> V:
        raise NotImplementedError

    def _path(self, name: str) -> str:
        return f"{self.group}/{escape(name)}"
