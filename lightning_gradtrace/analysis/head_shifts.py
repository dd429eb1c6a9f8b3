"""Who moved an attention head? Shifts by head and by query, key, value and output weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import FloatArray, IntArray
from lightning_gradtrace.analysis._shift_sources import shift_blocks
from lightning_gradtrace.analysis._workers import joined, over_steps
from lightning_gradtrace.analysis.heads import attention_heads, head_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

RECORDS = ("topk", "dense", "factored", "token_grads")

_Moved = tuple[IntArray, IntArray, FloatArray]
"""Row of the record (an occurrence or a loss token), global entry number, shift: (m,) each."""


def head_shifts(
    trace: Trace,
    heads: pd.DataFrame | None = None,
    steps: _access.Steps = None,
    *,
    along: Mapping[str, FloatArray] | None = None,
    record: str = "topk",
    client: Any = None,
) -> pd.DataFrame:
    """Add up how much each occurrence, or each of its loss tokens, moved each part of each attention head.

    A `TopK` or `TokenGrads` record keeps the largest shifts over all tracked parameters; what is below the threshold is
    missing here, so `size` and `square` are lower bounds, and exact with ``k`` as large as the number of tracked
    entries. `Dense` and `Factored` records are exact.

    Args:
        trace: an open trace.
        heads: table of `attention_heads`; None makes it with its defaults.
        steps: step numbers; None for all.
        along: a direction by name of the parameter, of its shape: for instance `weight_change`. The size of shifts
            also counts what samples undo of each other; along the change, only what remained counts. Parameters left
            out have no direction.
        record: which record to read: "topk", "dense", "factored", or "token_grads" for the shifts of loss tokens.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per occurrence (or loss token) and block that it moved, in that order: `occurrence`, `step`,
        `sample_id`, for loss tokens `position` and `token`, then `module`, `head`, `part`, `n_entries`, `size` (sum of
        absolute shifts), `square` (sum of squared shifts) and, if `along` is given, `along` (inner product of the
        shifts and the direction) and `toward` (the same where it is positive, else 0). Sums of `along` are net: where
        most of it is undone again, shares of such a sum have no bounds, and those of `toward` say who pushed.

    Raises:
        ValueError: the trace holds no such record, tracks no attention head, or has none of the steps; a direction has
            another shape than its parameter.

    Source: docs/concepts.md, 3: shifts are in units of the weight.
    """
    heads = attention_heads(trace) if heads is None else heads
    if not len(heads):
        raise ValueError(
            "`heads` is empty: no tracked parameter was recognised as part of an attention head. Track attention "
            f"weights with `GradTrace(params=...)`; this trace tracks {', '.join(trace.params['param'].head(5))}"
        )
    if record not in RECORDS:
        raise ValueError(f"`record` is {record!r}, expected one of {', '.join(repr(r) for r in RECORDS)}")
    if record != "topk" and record not in trace.records:
        raise ValueError(f"`record` is {record!r}, and this trace holds {', '.join(trace.records) or 'none'}")
    direction = None if along is None else _flat(trace, along)
    return over_steps(client, trace, steps, _table, joined, heads, direction, record)


def _table(
    trace: Trace, heads: pd.DataFrame, direction: FloatArray | None, record: str, steps: _access.Steps
) -> pd.DataFrame:
    if record == "token_grads":
        where, moved = _of_loss_tokens(trace, steps)
    else:
        where = trace.occurrences[["step", "sample_id"]].rename_axis("occurrence").reset_index()
        moved = _access.moved(trace, steps) if record == "topk" else _of_whole(trace, heads, record, steps)
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    parts = [_sums(trace, heads, *block, direction) for block in (nothing, *moved)]
    sums = pd.concat(parts, ignore_index=True).sort_values(["row", "block"], ignore_index=True)
    if direction is not None:
        sums["toward"] = sums["along"].clip(lower=0)
    names = heads.iloc[sums.pop("block")][["module", "head", "part"]].reset_index(drop=True)
    return pd.concat([where.iloc[sums.pop("row")].reset_index(drop=True), names, sums], axis=1)


def weight_change(trace: Trace, steps: slice | None = None) -> dict[str, FloatArray]:
    """Return by how much each tracked parameter changed within some steps, from the snapshots that enclose them.

    Args:
        trace: an open trace, recorded with ``weights_every_n_steps``.
        steps: first and last step, both included; None for all.

    Returns:
        By name of the parameter, of its shape: the weights at the first snapshot after the last step (or the last
        snapshot) minus those at the last one up to the first step.

    Raises:
        ValueError: the trace keeps no two snapshots around these steps.
    """
    kept = trace.weight_steps
    first, last = (None, None) if steps is None else (steps.start, steps.stop)
    before = 0 if first is None else max(0, int(np.searchsorted(kept, first, side="right")) - 1)
    after = len(kept) - 1 if last is None else min(len(kept) - 1, int(np.searchsorted(kept, last, side="right")))
    if after <= before:
        raise ValueError(
            f"`steps` is {steps}, and the trace keeps no two snapshots of the weights around them (it has "
            f"{kept.tolist()}); record with `GradTrace(..., weights_every_n_steps=...)`"
        )
    return {
        name: trace.weights(name, int(kept[after])) - trace.weights(name, int(kept[before]))
        for name in trace.params["param"]
    }


def _sums(
    trace: Trace, heads: pd.DataFrame, row: IntArray, entry: IntArray, shift: FloatArray, direction: FloatArray | None
) -> pd.DataFrame:
    """Add up the shifts of each row within each block of `heads`."""
    block = head_rows(trace, heads, entry)
    inside = block >= 0
    found, place = np.unique(row[inside].astype(np.int64) * len(heads) + block[inside], return_inverse=True)
    moved = shift[inside].astype(np.float64)
    columns = {
        "row": found // len(heads),
        "block": found % len(heads),
        "n_entries": np.bincount(place, minlength=len(found)),
        "size": np.bincount(place, np.abs(moved), len(found)),
        "square": np.bincount(place, moved**2, len(found)),
    }
    if direction is not None:
        columns["along"] = np.bincount(place, moved * direction[entry[inside]], len(found))
    return pd.DataFrame(columns)


def _of_loss_tokens(trace: Trace, steps: _access.Steps) -> tuple[pd.DataFrame, Iterator[_Moved]]:
    """Return the loss tokens, one row each, and what they moved, step by step."""
    tokens = trace.token_grads.tokens(steps)

    def blocks() -> Iterator[_Moved]:
        for step, first in zip(*np.unique(tokens["step"], return_index=True), strict=True):
            entry, shift = trace.token_grads.shifts(int(step))
            row = np.repeat(first + np.arange(len(entry)), entry.shape[1])
            entry, shift = entry.reshape(-1), shift.reshape(-1)
            kept = (shift != 0) & np.isfinite(shift)
            yield row[kept], entry[kept], shift[kept]

    return tokens[["occurrence", "step", "sample_id", "position", "token"]], blocks()


def _of_whole(trace: Trace, heads: pd.DataFrame, record: str, steps: _access.Steps) -> Iterator[_Moved]:
    """Yield what moved in the parameters of `heads` from a record that holds all of it."""
    for name in heads["param"].unique():
        offset = int(trace.param(name)["offset"])
        for occurrence, shifts in shift_blocks(trace, record, name, steps):
            flat = shifts.reshape(len(shifts), -1)
            row, index = np.nonzero((flat != 0) & np.isfinite(flat))
            yield occurrence[row], index + offset, flat[row, index]


def _flat(trace: Trace, along: Mapping[str, FloatArray]) -> FloatArray:
    """Lay directions out by global entry number."""
    flat = np.zeros(trace.n_entries)
    for name, direction in along.items():
        row = trace.param(name)
        if tuple(direction.shape) != tuple(row["shape"]):
            raise ValueError(
                f"`along` has shape {tuple(direction.shape)} for `{name}`, which has shape {tuple(row['shape'])}"
            )
        flat[row["offset"] : row["offset"] + row["numel"]] = direction.reshape(-1)
    return flat
