"""Groups of entries that an analysis takes together: single entries, neurons, attention heads, parameters, modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._grid import grid_of
from lightning_gradtrace.analysis.heads import head_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

GROUPS = ("entry", "neuron", "head", "head_part", "param", "module")
WEIGHTS = ("none", "shift", "value")

# Pairs of occurrence and group that are added up at once, 8 bytes each.
_SCRATCH = 1 << 22


@dataclass(frozen=True)
class Groups:
    """Entries and the groups they make up; an entry lies in one group.

    Attributes:
        by: kind of group.
        entry: (e,) global entry numbers.
        row: (e,) the group of each.
        table: one row per group with the columns that name it.
    """

    by: str
    entry: IntArray
    row: IntArray
    table: pd.DataFrame

    def between(self, start: int, stop: int) -> Groups:
        """Return the groups `start` to `stop` - 1, numbered from 0."""
        if start == 0 and stop >= len(self.table):
            return self
        inside = (self.row >= start) & (self.row < stop)
        return Groups(self.by, self.entry[inside], self.row[inside] - start, self.table.iloc[start:stop])


def groups_of(
    trace: Trace, entries: Entries | None, by: str = "entry", *, axis: str = "in", heads: pd.DataFrame | None = None
) -> Groups:
    """Gather entries into groups, in the order of the model (single entries: in the order given).

    Args:
        trace: an open trace.
        entries: table with a column `entry`, or global entry numbers; None for everything tracked.
        by: "entry"; "neuron" (columns or rows of matrices, other parameters are left out); "head" (all parts of an
            attention head) or "head_part" (its query, key, value, output weights apart), entries outside heads left
            out; "param"; "module".
        axis: for neurons, "in" for columns, "out" for rows.
        heads: for heads, the table of `attention_heads`.

    Raises:
        ValueError: `by` is none of these, `heads` is missing, or unknown entries.
    """
    if by not in GROUPS:
        raise ValueError(f"`by` is {by!r}, expected one of {', '.join(repr(g) for g in GROUPS)}")
    numbers = np.arange(trace.n_entries) if entries is None else _access.entry_numbers(trace, entries)
    if by == "entry":
        names = trace.entries(numbers)
        table = pd.DataFrame({"entry": numbers, "param": names["param"].array, "index": names["index"].to_numpy()})
        return Groups(by, numbers, np.arange(numbers.size), table)
    if by == "neuron":
        grid = grid_of(trace, numbers, axis)
        table = pd.DataFrame(
            {
                "param": pd.Series([p.param for p in grid.param], dtype=str),
                "module": pd.Series([p.module for p in grid.param], dtype=str),
                "axis": pd.Series([axis] * len(grid.neuron), dtype=str),
                "neuron": grid.neuron,
            }
        )
        return Groups(by, grid.entry, grid.row, table)
    if by in ("head", "head_part"):
        if heads is None:
            raise ValueError(f"`by` is {by!r}, which needs `heads`; pass `attention_heads(trace, n_heads)`")
        block = head_rows(trace, heads, numbers)
        numbers, block = numbers[block >= 0], block[block >= 0]
        keys = heads[["module", "head"] if by == "head" else ["module", "head", "part", "param"]]
    else:
        known = _access.shapes(trace)
        block = np.searchsorted([p.offset for p in known], numbers, side="right") - 1
        both = pd.DataFrame({"param": [p.param for p in known], "module": [p.module for p in known]}, dtype=str)
        keys = both if by == "param" else both[["module"]]
    present = keys.iloc[np.unique(block)].drop_duplicates()
    at = {key: i for i, key in enumerate(present.itertuples(index=False, name=None))}
    place = np.array([at.get(key, -1) for key in keys.itertuples(index=False, name=None)], dtype=np.int64)
    return Groups(by, numbers, place[block] if len(place) else block, present.reset_index(drop=True))


def group_selections(
    trace: Trace, groups: Groups, *, weight: str = "none", steps: Steps = None
) -> Iterator[tuple[IntArray, IntArray, FloatArray | None]]:
    """Run once over the record and yield which occurrence selected which group, each pair once.

    Args:
        trace: the trace.
        groups: from `groups_of`.
        weight: "none", "shift" (sum of |s| over the group's selected entries) or "value" (sum of |W|, the weights
            as in the last snapshot before the step).
        steps: step numbers to look at; None for all.

    Yields:
        occurrence (m,), row of the group (m,) and weight (m,), None for "none".

    Raises:
        ValueError: `weight` is none of these, or the trace keeps no weights.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"`weight` is {weight!r}, expected one of {', '.join(repr(w) for w in WEIGHTS)}")
    value = _Values(trace, groups) if weight == "value" else None
    for occurrence, row, entry, shift in _access.shifts_of(trace, groups.entry, groups.row, steps):
        size: FloatArray | None = None
        if weight == "shift":
            size = np.abs(shift).astype(np.float64)
        elif value is not None:
            size = value(occurrence, entry)
        if groups.by == "entry":
            yield occurrence, row, size
        else:
            yield from _pair_sums(occurrence, row, len(groups.table), size)


def group_marks(occurrence: IntArray, row: IntArray, n_rows: int) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Mark which of ascending occurrences selected which rows, piece by piece.

    A table in bounded memory takes a tenth of the time of sorting or hashing the pairs.

    Yields:
        The first occurrence of a piece, and (occurrences of it, `n_rows`) whether they selected each row.
    """
    width = max(1, _SCRATCH // max(1, n_rows))
    while occurrence.size:
        first = int(occurrence[0])
        end = int(np.searchsorted(occurrence, first + width))
        marked = np.zeros((int(occurrence[end - 1]) - first + 1, n_rows), dtype=bool)
        marked.reshape(-1)[(occurrence[:end] - first) * n_rows + row[:end]] = True
        yield first, marked
        occurrence, row = occurrence[end:], row[end:]


def _pair_sums(
    occurrence: IntArray, row: IntArray, n_rows: int, size: FloatArray | None
) -> Iterator[tuple[IntArray, IntArray, FloatArray | None]]:
    """Yield the distinct pairs of ascending occurrences and rows, and the sums of their sizes."""
    for first, marked in group_marks(occurrence, row, n_rows):
        pairs = np.flatnonzero(marked)
        found, rows = np.divmod(pairs, n_rows)
        end = int(np.searchsorted(occurrence, first + len(marked)))
        total: FloatArray | None = None
        if size is not None:
            place = (occurrence[:end] - first) * n_rows + row[:end]
            total = np.bincount(place, size[:end], minlength=marked.size)[pairs].astype(np.float64)
            size = size[end:]
        yield found + first, rows, total
        occurrence, row = occurrence[end:], row[end:]


class _Values:
    """Absolute weights of entries at the time of an occurrence, from the snapshots of a trace."""

    def __init__(self, trace: Trace, groups: Groups) -> None:
        if not len(trace.weight_steps):
            raise ValueError(
                '`weight="value"` needs the weights, and the trace keeps none; record with '
                "`GradTrace(..., weights_every_n_steps=...)`"
            )
        known = _access.shapes(trace)
        order = np.argsort(groups.entry)
        self._entry = groups.entry[order]
        at = np.searchsorted([p.offset for p in known], self._entry, side="right") - 1
        # (snapshot, entry)
        self._value = np.empty((len(trace.weight_steps), self._entry.size), dtype=np.float32)
        for number, step in enumerate(trace.weight_steps.tolist()):
            for one in np.unique(at).tolist():
                here = at == one
                weights = trace.weights(known[one].param, step).reshape(-1)
                self._value[number, here] = np.abs(weights[self._entry[here] - known[one].offset])
        self._snapshot = _access.snapshots_of(trace)

    def __call__(self, occurrence: IntArray, entry: IntArray) -> FloatArray:
        place = np.searchsorted(self._entry, entry)
        return self._value[self._snapshot[occurrence], place].astype(np.float64)
