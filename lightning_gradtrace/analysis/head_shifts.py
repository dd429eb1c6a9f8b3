"""Who moved an attention head? Shifts by head and by query, key, value and output weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis.heads import attention_heads, head_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def head_shifts(
    trace: Trace,
    heads: pd.DataFrame | None = None,
    steps: _access.Steps = None,
    *,
    along: Mapping[str, npt.NDArray[np.floating]] | None = None,
) -> pd.DataFrame:
    """Add up how much each occurrence moved each part of each attention head, among what the record kept.

    A `TopK` record keeps an occurrence's largest shifts over all tracked parameters; what is below its threshold is
    missing here, so these are lower bounds, and exact with ``k`` as large as the number of tracked entries.

    Args:
        trace: an open trace with a `TopK` record.
        heads: table of `attention_heads`; None makes it with its defaults.
        steps: step numbers; None for all.
        along: a direction by name of the parameter, of its shape: for instance by how much the weights changed between
            two snapshots. The size of shifts also counts what samples undo of each other; along the change, only what
            remained counts. Parameters left out have no direction.

    Returns:
        One row per occurrence and block with any kept entry, in that order: `occurrence`, `step`, `sample_id`,
        `module`, `head`, `part`, `n_entries`, `size` (sum of absolute shifts), `square` (sum of squared shifts) and,
        if `along` is given, `along` (inner product of the shifts and the direction).

    Raises:
        ValueError: the trace holds no TopK record, tracks no attention head, or has none of the steps; a direction has
            another shape than its parameter.
    """
    heads = attention_heads(trace) if heads is None else heads
    if not len(heads):
        raise ValueError(
            "`heads` is empty: no tracked parameter was recognised as part of an attention head. Track attention "
            f"weights with `GradTrace(params=...)`; this trace tracks {', '.join(trace.params['param'].head(5))}"
        )
    direction = None if along is None else _flat(trace, along)
    parts = []
    for occurrence, entry, shift in _access.moved(trace, steps):
        block = head_rows(trace, heads, entry)
        inside = block >= 0
        key = occurrence[inside].astype(np.int64) * len(heads) + block[inside]
        found, place = np.unique(key, return_inverse=True)
        moved = shift[inside].astype(np.float64)
        columns = {
            "occurrence": found // len(heads),
            "block": found % len(heads),
            "n_entries": np.bincount(place, minlength=len(found)),
            "size": np.bincount(place, np.abs(moved), len(found)),
            "square": np.bincount(place, moved**2, len(found)),
        }
        if direction is not None:
            columns["along"] = np.bincount(place, moved * direction[entry[inside]], len(found))
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["occurrence", "block"], dtype=int)
    where = trace.occurrences.iloc[table["occurrence"]]
    names = heads.iloc[table.pop("block")]
    for place, name in enumerate(("step", "sample_id"), start=1):
        table.insert(place, name, where[name].to_numpy())
    for place, name in enumerate(("module", "head", "part"), start=3):
        table.insert(place, name, names[name].to_numpy())
    return table


def _flat(trace: Trace, along: Mapping[str, npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
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
