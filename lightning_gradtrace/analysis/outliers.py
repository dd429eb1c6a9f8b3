"""Which single shifts stick out: of a step, a sample, a parameter, a neuron or an entry (docs/concepts.md, 5)?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._groups import Groups, groups_of
from lightning_gradtrace.analysis._ranking import LargestOfRows, ranks
from lightning_gradtrace.analysis._workers import over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

OF = ("step", "sample", "param", "neuron", "entry")
NORMALISED = ("none", "param", "neuron", "series")

Scale = Callable[[IntArray, IntArray, FloatArray], FloatArray]


def outliers(
    trace: Trace,
    of: str = "step",
    *,
    n: int = 10,
    normalise: str = "none",
    axis: str = "in",
    entries: Entries | None = None,
    min_count: int = 10,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """List the `n` largest recorded shifts of every step, sample, parameter, neuron or entry.

    "Largest" is by absolute value, which `normalise` may put in proportion: "param" and "neuron" divide |s| by the
    root mean square of the weights of its parameter or its neuron, as they were in the last snapshot before the step;
    "series" compares each entry with itself: (|s| - mean) / standard deviation over all its recorded shifts, for
    entries with at least `min_count` of them. Weights that are all zero (or a series without spread) give no scale,
    and their shifts are left out.

    What can mislead: a TopK record holds what was among the k largest, so the small shifts of an entry are missing
    from its series, and the shifts of parameters with small weights may be missing altogether however large they are
    in proportion. A feature spread thinly over many weights has no outlier at all: see `direction_shifts`.

    Args:
        trace: an open trace with a `TopK` record.
        of: "step", "sample", "param", "neuron" or "entry".
        n: how many of each.
        normalise: "none", "param", "neuron" or "series".
        axis: of neurons: "in" for columns, "out" for rows. With `normalise="neuron"` only matrices take part.
        entries: look at these only: a table with a column `entry`, or global entry numbers; None for all.
        min_count: smallest length of an entry's series.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per outlier, groups in ascending order (neurons and parameters: of the model), the largest first:
        the columns of the group (`step`, `sample_id`, `param`, ... `neuron`, or `entry`), `rank`, `value` (what was
        compared), `shift` (with its sign), `occurrence`, `step`, `sample_id`, `entry`, `param`, `index`.

    Raises:
        ValueError: no `TopK` record, an unknown name, `n` or `min_count` out of range, no weights in the trace where
            they are needed.

    Source: docs/concepts.md, 5. `shift` is in units of the weight.
    """
    if of not in OF:
        raise ValueError(f"`of` is {of!r}, expected one of {', '.join(repr(o) for o in OF)}")
    if normalise not in NORMALISED:
        raise ValueError(f"`normalise` is {normalise!r}, expected one of {', '.join(repr(o) for o in NORMALISED)}")
    _access.check_count("n", n)
    _access.check_count("min_count", min_count, least=2)
    matrices = "neuron" in (of, normalise)
    groups = groups_of(trace, entries, "neuron" if matrices else "entry", axis=axis)
    occurrences = trace.occurrences
    step, (sample, sample_ids) = occurrences["step"].to_numpy(), pd.factorize(occurrences["sample_id"], sort=True)
    number = np.searchsorted(trace.steps.index.to_numpy(), step)
    scale = _scale(trace, normalise, groups, min_count, steps, client)
    of_entry, n_rows = _rows_by_entry(trace, of, groups)
    if of in ("step", "sample"):
        n_rows = len(trace.steps) if of == "step" else len(sample_ids)
    of_occurrence = {"step": number, "sample": sample}.get(of)
    arguments = (groups.entry, scale, of_occurrence, of_entry, n_rows, n)
    best = over_steps(client, trace, steps, _largest, LargestOfRows.merge, *arguments)
    return _table(trace, of, groups, best.result(3))


def _table(trace: Trace, of: str, groups: Groups, found: Sequence[Any]) -> pd.DataFrame:
    """Describe outliers, given by row, value, shift, occurrence and entry; see `outliers`."""
    row, value, shift, occurrence, entry = found
    names, of_occurrence = trace.entries(entry), trace.occurrences
    table = pd.DataFrame(
        {
            "rank": ranks(row),
            "value": value,
            "shift": shift.astype(np.float64),
            "occurrence": occurrence,
            "step": of_occurrence["step"].to_numpy()[occurrence],
            "sample_id": of_occurrence["sample_id"].to_numpy()[occurrence],
            "entry": entry,
            "param": names["param"].astype(str).array,
            "index": names["index"].to_numpy(),
        }
    )
    if of == "neuron":
        table = pd.concat([groups.table.iloc[row][["axis", "neuron"]].reset_index(drop=True), table], axis=1)
    first = {"sample": ["sample_id"], "neuron": ["param", "axis", "neuron"]}.get(of, [of])
    return table[[*first, *(c for c in table.columns if c not in first)]]


def _largest(
    trace: Trace,
    entries: IntArray,
    scale: Scale,
    of_occurrence: IntArray | None,
    of_entry: IntArray,
    n_rows: int,
    n: int,
    steps: Steps,
) -> LargestOfRows:
    """Return the largest scaled shifts of each row, which the occurrence or else the entry belongs to."""
    best = LargestOfRows(n_rows, n)
    for occurrence, at, entry, shift in _access.shifts_of(trace, entries, np.arange(entries.size), steps):
        row = of_entry[at] if of_occurrence is None else of_occurrence[occurrence]
        best.add(row, scale(occurrence, at, np.abs(shift).astype(np.float64)), shift, occurrence, entry)
    return best


def _rows_by_entry(trace: Trace, of: str, groups: Groups) -> tuple[IntArray, int]:
    """Return the row of each of the groups' entries, and the number of rows."""
    if of == "neuron":
        return groups.row, len(groups.table)
    if of == "param":
        offsets = [p.offset for p in _access.shapes(trace)]
        return np.searchsorted(offsets, groups.entry, side="right") - 1, len(offsets)
    order = np.argsort(groups.entry)
    row = np.empty(order.size, dtype=np.int64)
    row[order] = np.arange(order.size)
    return row, row.size


def _scale(trace: Trace, normalise: str, groups: Groups, min_count: int, steps: Steps, client: Any) -> Scale:
    """Return what turns occurrence, place among the groups' entries and |s| into the value compared."""
    if normalise == "none":
        return lambda occurrence, at, size: size
    if normalise == "series":
        count, total, square = over_steps(client, trace, steps, _moments, np.add, groups.entry)
        mean = total / np.maximum(count, 1)
        variance = np.maximum(square / np.maximum(count, 1) - mean**2, 0)
        # Equal shifts leave a rounding error of the squares instead of zero.
        spread = np.where((count >= min_count) & (variance > 1e-12 * mean**2), np.sqrt(variance), np.nan)
        return lambda occurrence, at, size: (size - mean[at]) / spread[at]
    row, rms = _rms(trace, normalise, groups)
    snapshot = _access.snapshots_of(trace)
    return lambda occurrence, at, size: size / rms[snapshot[occurrence], row[at]]


def _moments(trace: Trace, entries: IntArray, steps: Steps) -> FloatArray:
    """Return number, sum of |s| and sum of s^2 of each entry: (3, entry)."""
    moments = np.zeros((3, entries.size))
    for _, at, _, shift in _access.shifts_of(trace, entries, np.arange(entries.size), steps):
        size = np.abs(shift).astype(np.float64)
        for sums, weights in zip(moments, (None, size, size**2), strict=True):
            sums += np.bincount(at, weights, minlength=entries.size)
    return moments


def _rms(trace: Trace, normalise: str, groups: Groups) -> tuple[IntArray, FloatArray]:
    """Return the row of each entry, and the rms weight (snapshot, row), NaN where it is zero."""
    known = _access.shapes(trace)
    if not len(trace.weight_steps):
        raise ValueError(
            f"`normalise` is {normalise!r}, which needs the weights, and the trace keeps none; record with "
            "`GradTrace(..., weights_every_n_steps=...)`"
        )
    at = np.searchsorted([p.offset for p in known], groups.entry, side="right") - 1
    row, size = (at, len(known)) if normalise == "param" else (groups.row, len(groups.table))
    rms = np.full((len(trace.weight_steps), size), np.nan)
    for number, step in enumerate(trace.weight_steps.tolist()):
        for one in np.unique(at).tolist():
            squares = trace.weights(known[one].param, step).astype(np.float64) ** 2
            if normalise == "param":
                rms[number, one] = np.sqrt(squares.mean())
                continue
            mine = np.flatnonzero((groups.table["param"] == known[one].param).to_numpy())
            of_axis = squares.mean(axis=0 if groups.table["axis"].iloc[mine[0]] == "in" else 1)
            rms[number, mine] = np.sqrt(of_axis[groups.table["neuron"].to_numpy()[mine]])
    rms[rms == 0] = np.nan
    return row, rms
