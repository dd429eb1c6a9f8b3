"""Does the training have phases? The series that any trace has, their change points, and where many of them agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis.changes import change_points
from lightning_gradtrace.analysis.concentration import self_influence, shift_sparsity
from lightning_gradtrace.analysis.movement import movement
from lightning_gradtrace.analysis.weights import weight_statistics

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

KEYS = ["series", "param"]
# Points of a series: enough to place a change to half a percent of the training.
_POINTS = 200
_FEWEST_SNAPSHOTS = 8
# The window of a boundary is this part of the training, unless it is given.
_WINDOWS = 40


def trace_series(trace: Trace, *, every: int | None = None, moved: pd.DataFrame | None = None) -> pd.DataFrame:
    """Gather the series of a trace in which phases may show: the default set, as far as the trace holds them.

    - of every trace: `loss`, `grad_norm` (means over `every` steps; without steps that are not finite);
    - with a `TopK` record, by parameter: `moved` (sum of the kept |s|) and `participation` (see `shift_sparsity`);
    - with a `Norms` record: `self_influence_gini` (see `self_influence`) and, by parameter, `shift_norm` (the root
      mean square of |s|);
    - with 8 or more weight snapshots, by parameter: `weight_norm`.

    Source: docs/concepts.md, 3 and 5; shifts and norms are in units of the weight, losses in nats.

    Args:
        trace: an open trace.
        every: steps that share a point; None for as many as give at most 200 points.
        moved: the table of `movement` by parameter, where it is at hand; None makes it.

    Returns:
        `series`, `param` (empty for series of the whole run), `step` (the first of its `every` steps), `value`.

    Raises:
        ValueError: `every` below 1.

    Example::

        >>> # changes = series_changes(trace_series(trace))
    """
    if every is not None:
        _access.check_count("every", every, of="steps")
    known = trace.steps.index.to_numpy()
    if known.size == 0:
        return pd.DataFrame({"series": [], "param": [], "step": [], "value": []})
    every = every or max(1, -(-int(known[-1] - known[0] + 1) // _POINTS))
    parts = [part.assign(series=name) for name, part in _parts(trace, every, moved)]
    table = pd.concat(parts, ignore_index=True)
    return table[np.isfinite(table["value"].to_numpy(float))].reset_index(drop=True)[[*KEYS, "step", "value"]]


def _parts(trace: Trace, every: int, moved: pd.DataFrame | None) -> Iterator[tuple[str, pd.DataFrame]]:
    steps = trace.steps
    first = steps.index[0]
    start = first + (steps.index.to_numpy() - first) // every * every
    for name in ("loss", "grad_norm"):
        if name in steps:
            means = steps[name].where(np.isfinite(steps[name])).groupby(start).mean()
            yield name, pd.DataFrame({"param": "", "step": means.index, "value": means.to_numpy()})
    if "topk" in trace.records:
        table = movement(trace, by="param", every=every) if moved is None else moved
        yield "moved", table.rename(columns={"moved": "value"})[["param", "step", "value"]].astype({"param": object})
        sparse = shift_sparsity(trace, every=every)
        sparse = sparse[sparse["param"] != ""]
        yield "participation", sparse.rename(columns={"participation": "value"})[["param", "step", "value"]]
    if "norms" in trace.records:
        influence = self_influence(trace, every=every)
        whole = influence[influence["param"] == ""]
        yield "self_influence_gini", whole.rename(columns={"gini": "value"})[["param", "step", "value"]]
        single = influence[influence["param"] != ""]
        single = single.assign(value=np.sqrt(single["square"]))
        yield "shift_norm", single[["param", "step", "value"]]
    if len(trace.weight_steps) >= _FEWEST_SNAPSHOTS:
        table = weight_statistics(trace, spectra=False)
        yield "weight_norm", table.rename(columns={"norm": "value"})[["param", "step", "value"]]


def series_changes(series: pd.DataFrame, *, penalty: float | None = None, min_size: int = 3) -> pd.DataFrame:
    """Return the change points of each series (see `change_points`, also for what can mislead).

    Source: as in `change_points`; levels are in units of the series, jumps in those of its noise.

    Args:
        series: from `trace_series`, or any table with its columns.
        penalty: as in `change_points`.
        min_size: as in `change_points`.

    Returns:
        `series`, `param`, `step`, `before`, `after`, `jump`.

    Raises:
        ImportError: ruptures is not installed.
        ValueError: as in `change_points`.
    """
    return change_points(series, "value", by=KEYS, penalty=penalty, min_size=min_size)


def phase_boundaries(changes: pd.DataFrame, window: int, *, span: tuple[int, int] | None = None) -> pd.DataFrame:
    """Find the steps at which most series change within a window.

    The window that holds changes of most series is a boundary; it is taken out, and the search goes on with what is
    left until no window holds more than one series. Series of one run share its randomness, and a steady drift is a
    staircase of changes, so agreement alone is no proof: `expected` says how many series would have a change in a
    window of this length if each had its own changes anywhere.

    Source: this project; counts of series.

    Args:
        changes: from `series_changes`.
        window: steps.
        span: first and last step of the run; None for those of the changes.

    Returns:
        One row per boundary, in order of time: `first_step`, `last_step` (of the changes in the window), `series`
        (number with a change there), `of` (number with any change at all), `expected`, `names` (of the series, each
        kind once).

    Raises:
        ValueError: `window` below 1, or a column is missing.

    Example:
        >>> changes = pd.DataFrame({"series": ["loss", "moved", "moved"], "param": ["", "a", "b"], "step": [5, 6, 90]})
        >>> phase_boundaries(changes, window=10, span=(0, 100))[["first_step", "last_step", "series", "of"]]
           first_step  last_step  series  of
        0           5          6       2   3
    """
    missing = {*KEYS, "step"} - set(changes.columns)
    if missing or window < 1:
        raise ValueError(f"`changes` lacks the columns {sorted(missing)}; `window` is {window}, expected 1 or more")
    columns = ["first_step", "last_step", "series", "of", "expected", "names"]
    if changes.empty:
        return pd.DataFrame(columns=columns)
    number = changes.groupby(KEYS, sort=False, observed=True).ngroup().to_numpy()
    step = changes["step"].to_numpy()
    low, high = span or (int(step.min()), int(step.max()))
    share = min(1.0, window / max(1, high - low + 1))
    expected = float((1 - (1 - share) ** np.bincount(number)).sum())
    left, rows = np.ones(len(changes), dtype=bool), []
    while left.any():
        starts = np.unique(step[left])
        inside = [left & (step >= at) & (step < at + window) for at in starts]
        sizes = [np.unique(number[one]).size for one in inside]
        best = inside[int(np.argmax(sizes))]
        if max(sizes) < 2:
            break
        names = ", ".join(dict.fromkeys(changes["series"].to_numpy()[best]))
        rows.append([int(step[best].min()), int(step[best].max()), max(sizes), int(number.max()) + 1, expected, names])
        left &= ~best
    return pd.DataFrame(rows, columns=columns).sort_values("first_step", ignore_index=True)


def trace_phases(trace: Trace, series: pd.DataFrame | None = None, *, window: int | None = None) -> pd.DataFrame:
    """Find the phase boundaries of a trace.

    Source: this project; counts of series.

    Args:
        trace: an open trace.
        series: any series by step, with the columns of `trace_series`; None for that default set.
        window: as in `phase_boundaries`; None for a fortieth of the training.

    Returns:
        As `phase_boundaries`.

    Raises:
        ImportError: ruptures is not installed.
        ValueError: a column is missing, or `window` below 1.
    """
    changes, step = series_changes(trace_series(trace) if series is None else series), trace.steps.index
    if not len(step):
        return phase_boundaries(changes, window or 1)
    first, last = int(step[0]), int(step[-1])
    length = max(1, (last - first + 1) // _WINDOWS) if window is None else window
    return phase_boundaries(changes, length, span=(first, last))
