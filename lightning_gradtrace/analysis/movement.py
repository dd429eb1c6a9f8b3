"""When did a neuron, a head or a layer move, in which order do they form, and who moved them?"""

from __future__ import annotations

from collections.abc import Sequence
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

# Sums of one group of rows over samples (8 bytes each); more rows take another pass.
_GROUP_BYTES = 1 << 29
_MOST_TIMES = 200


def movement(
    trace: Trace,
    entries: Entries | None = None,
    by: str = "neuron",
    *,
    every: int | None = None,
    axis: str = "in",
    heads: pd.DataFrame | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """Add up the recorded shifts of each neuron (or entry, head, parameter, module) over time.

    One pass over the record. A TopK record holds the k largest shifts, so these are sums over what was kept, not over
    all that moved; a neuron that moved in many small shifts shows less than it did.

    Args:
        trace: an open trace with a `TopK` record.
        entries: look at these only: a table with a column `entry`, or global entry numbers; None for all.
        by: "entry", "neuron", "head", "head_part", "param" or "module".
        every: steps that share a row, counted from the trace's first step; None for as many as give at most 200 rows
            per group. Memory: 24 bytes per group and row.
        axis: of neurons: "in" for columns, "out" for rows.
        heads: of heads: the table of `attention_heads`.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per group and time, times without a shift included: the columns of the group, `step` (the first of
        its `every` steps), `shifts` (number recorded), `moved` (sum of |s|), `net` (sum of s).

    Raises:
        ValueError: no `TopK` record, `every` below 1, or as in `notable_tokens`.

    Source: docs/concepts.md, 3: shifts are in units of the weight.
    """
    if every is not None:
        _access.check_count("every", every, of="steps")
    groups = groups_of(trace, entries, by, axis=axis, heads=heads)
    known = trace.steps.index.to_numpy()
    if known.size == 0:
        raise ValueError("the trace holds no step, so nothing moved")
    every = every or max(1, -(-int(known[-1] - known[0] + 1) // _MOST_TIMES))
    step = trace.occurrences["step"].to_numpy()
    chosen = np.unique(step[_access.occurrences_in(trace, steps)]) if steps is not None else known
    bins = np.unique((chosen - known[0]) // every)
    number = np.searchsorted(bins, (step - known[0]) // every)
    width, size = bins.size, len(groups.table)
    sums = over_steps(client, trace, steps, _sums, np.add, groups, number, width)
    table = groups.table.iloc[np.repeat(np.arange(size), width)].reset_index(drop=True)
    return table.assign(
        step=np.tile(known[0] + bins * every, size), shifts=sums[0].astype(np.int64), moved=sums[1], net=sums[2]
    )


def _sums(trace: Trace, groups: Groups, column: IntArray, width: int, steps: Steps) -> FloatArray:
    """Return number, sum of |s| and sum of s by group and column of its occurrence: (3, group * column)."""
    sums = np.zeros((3, len(groups.table) * width))
    for occurrence, row, _, shift in _access.shifts_of(trace, groups.entry, groups.row, steps):
        place = row.astype(np.int64) * width + column[occurrence]
        wide = shift.astype(np.float64)
        for total, weights in zip(sums, (np.ones_like(wide), np.abs(wide), wide), strict=True):
            np.add.at(total, place, weights)
    return sums


def formation(movement: pd.DataFrame, *, shares: Sequence[float] = (0.1, 0.5, 0.9)) -> pd.DataFrame:
    """Say when each group made which share of its movement, and in which order they did.

    Source: docs/concepts.md, 3: `moved` is in units of the weight, the others are steps.

    Args:
        movement: from `movement`.
        shares: of the sum of `moved` over all times.

    Returns:
        One row per group that moved at all, in the order in which they reach the middle one of `shares` (ties as in
        `movement`): the columns of the group, `moved` (total), `step_10`, `step_50`, `step_90` (for the shares of 10,
        50 and 90 %: the first `step` at whose end this share was reached), `order` (1 for the first; ties alike).

    Raises:
        ValueError: a column is missing, or a share is not above 0 and at most 1.
    """
    missing = {"step", "moved"} - set(movement.columns)
    if missing:
        raise ValueError(f"`movement` lacks the columns {sorted(missing)}; pass the table of `movement`")
    shares = sorted(shares)
    if not shares or shares[0] <= 0 or shares[-1] > 1:
        raise ValueError(f"`shares` is {shares}, expected shares above 0 and at most 1")
    names = [c for c in movement.columns if c not in ("step", "shifts", "moved", "net")]
    rows = []
    for key, part in movement.groupby(names, sort=False, observed=True):
        done = part["moved"].to_numpy().cumsum()
        if done[-1] > 0:
            at = np.searchsorted(done, np.array(shares) * done[-1] * (1 - 1e-12))
            rows.append([*key, done[-1], *part["step"].to_numpy()[at]])
    columns = [f"step_{100 * share:g}" for share in shares]
    table = pd.DataFrame(rows, columns=[*names, "moved", *columns])
    middle = columns[len(columns) // 2]
    table = table.sort_values(middle, kind="stable", ignore_index=True)
    return table.assign(order=table[middle].rank(method="min").astype(np.int64))


def movers(
    trace: Trace,
    entries: Entries | None = None,
    by: str = "neuron",
    *,
    n: int = 10,
    axis: str = "in",
    heads: pd.DataFrame | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """List the samples that moved each neuron (or entry, head, parameter, module) most.

    Args:
        trace: an open trace with a `TopK` record.
        entries: as in `movement`.
        by: as in `movement`.
        n: samples per group.
        axis: as in `movement`.
        heads: as in `movement`.
        steps: step numbers to look at; None for all.
        client: as in `movement`.

    Returns:
        The columns of the group, `rank`, `sample_id`, `moved` (sum of |s| over the group's recorded shifts), `net`
        (sum of s), `share` (of all the group's recorded movement), the largest first, ties by sample id.

    Raises:
        ValueError: as in `movement`, or `n` below 1.

    Source: docs/concepts.md, 3: shifts are in units of the weight.
    """
    _access.check_count("n", n, of="samples")
    groups = groups_of(trace, entries, by, axis=axis, heads=heads)
    sample, ids = pd.factorize(trace.occurrences["sample_id"].to_numpy(), sort=True)
    size = len(groups.table)
    most = max(1, _GROUP_BYTES // (24 * max(1, len(ids))))
    best = LargestOfRows(size, n)
    totals = np.zeros(size)
    for start in range(0, size, most):
        part = groups.between(start, start + most)
        n_rows = len(part.table)
        _, moved, net = over_steps(client, trace, steps, _sums, np.add, part, sample, len(ids))
        found = np.flatnonzero(moved)
        row, column = np.divmod(found, max(1, len(ids)))
        totals[start : start + n_rows] = moved.reshape(n_rows, -1).sum(axis=1)
        best.add(row + start, moved[found], net[found], column)
    row, value, net, column = best.result(2)
    table = groups.table.iloc[row].reset_index(drop=True)
    return table.assign(
        rank=ranks(row), sample_id=ids[column.astype(np.int64)], moved=value, net=net, share=value / totals[row]
    )
