"""How often was each weight among the most shifted ones (docs/concepts.md, 5, step 1)?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._workers import over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Up to here one counter per entry (8 bytes each) is held; beyond, only the entries that were selected.
_DENSE_LIMIT = 1 << 26


def count_entries(trace: Trace, steps: Steps = None, *, client: Any = None) -> pd.DataFrame:
    """Count in how many occurrences each parameter entry was selected.

    One pass over the record. The count says how often an entry was among the k largest, not how far it moved; under
    one k for all parameters, parameters with larger shifts crowd out the others. Entries with a shift of zero, which
    fill up a record where fewer than k weights moved, and shifts that are not finite don't count.

    Args:
        trace: an open trace with a `TopK` record.
        steps: step numbers to count as in `trace.topk.frame` (a slice holds both its ends); None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per entry selected at least once, largest count first, ties by entry number: `entry` (global number),
        `param`, `index` (flat, row-major, inside the parameter), `count` (occurrences).

    Raises:
        ValueError: the trace holds no `TopK` record, or `steps` matches none of its steps.

    Source: docs/concepts.md, 5, step 1.
    """
    return _table(trace, *_ordered(client, trace, steps))


def frequent_entries(trace: Trace, n_entries: int = 5000, steps: Steps = None, *, client: Any = None) -> pd.DataFrame:
    """Keep the `n_entries` entries that were selected most often.

    At the cut, entries of equal count are kept in the order of their numbers, which prefers the parameters that come
    first in the model; compare the last `count` with the first one left out in `count_entries` if that matters.

    Args:
        trace: an open trace with a `TopK` record.
        n_entries: how many to keep. Fewer come back if fewer were ever selected.
        steps: as in `count_entries`.
        client: as in `count_entries`.

    Returns:
        The first rows of `count_entries`.

    Raises:
        ValueError: `n_entries` is below 1 or larger than the number of entries that the trace tracks; or as in
            `count_entries`.

    Source: docs/concepts.md, 5, step 1.
    """
    _access.check_trace(trace)
    _access.check_count("n_entries", n_entries)
    if n_entries > trace.n_entries:
        raise ValueError(
            f"`n_entries` is {n_entries}, but this trace tracks {trace.n_entries} entries; pass at most that many"
        )
    entry, count = _ordered(client, trace, steps)
    return _table(trace, entry[:n_entries], count[:n_entries])


def _counts(trace: Trace, steps: Steps) -> tuple[IntArray, IntArray]:
    dense = np.zeros(trace.n_entries, dtype=np.int64) if trace.n_entries <= _DENSE_LIMIT else None
    seen: IntArray = np.zeros(0, dtype=np.int64)
    counts: IntArray = np.zeros(0, dtype=np.int64)
    for _, entry in _access.selected(trace, steps):
        if dense is not None:
            dense += np.bincount(entry, minlength=dense.size)
        else:
            seen, counts = _add((seen, counts), np.unique(entry, return_counts=True))
    if dense is not None:
        seen = np.flatnonzero(dense)
        counts = dense[seen]
    return seen, counts


def _add(one: tuple[IntArray, IntArray], other: tuple[IntArray, IntArray]) -> tuple[IntArray, IntArray]:
    seen, place = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    return seen, np.bincount(place, np.concatenate([one[1], other[1]]), minlength=seen.size).astype(np.int64)


def _ordered(client: Any, trace: Trace, steps: Steps) -> tuple[IntArray, IntArray]:
    seen, counts = over_steps(client, trace, steps, _counts, _add)
    order = np.argsort(-counts, kind="stable")
    return seen[order], counts[order]


def _table(trace: Trace, entry: IntArray, count: IntArray) -> pd.DataFrame:
    names = trace.entries(entry)
    return pd.DataFrame(
        {"entry": entry, "param": names["param"].array, "index": names["index"].to_numpy(), "count": count}
    )
