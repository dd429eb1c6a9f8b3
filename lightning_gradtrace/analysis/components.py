"""From entries to neurons, attention heads, parameters or modules: what shares occurrences and words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._components import KINDS, Components, tokens_of
from lightning_gradtrace.analysis._groups import groups_of
from lightning_gradtrace.analysis._sample_counts import SampleCounts, sample_counts
from lightning_gradtrace.analysis._texts import linked_samples
from lightning_gradtrace.analysis._workers import joined, over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.analysis.switches import Switch
    from lightning_gradtrace.store import Trace


def components(
    trace: Trace,
    entries: Entries | None,
    notable: pd.DataFrame,
    by: str = "head",
    *,
    axis: str = "in",
    heads: pd.DataFrame | None = None,
    links: IntArray | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """Gather entries into components of the model, and unite their occurrences and notable tokens.

    `neurons` is this with `by="neuron"`. The table names what ablations and controls switch off: neurons, heads, parts
    of heads, or single entries.

    What can mislead: a component with more entries has more occurrences and more chances of a notable token, whatever
    the samples say. Heads have thousands of entries, and most samples reach some of them: take few, frequent
    entries, or give `notable` of the heads themselves, and read the controls.

    Args:
        trace: an open trace with a `TopK` record.
        entries: table with a column `entry` (from `frequent_entries`), or global entry numbers; None for everything
            that is tracked.
        notable: from `notable_tokens` with the same entries, of these or with the same `by`; may be empty.
        by: "head", "head_part", "neuron" or "entry", as in `notable_tokens`.
        axis: of neurons: "in" for columns, "out" for rows.
        heads: of heads: the table of `attention_heads`.
        links: as in `notable_tokens`; only `n_samples` depends on them here.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per component with an entry, largest `n_notable` first, then `n_occurrences`, then by place in the
        model: what names it (heads: `module`, `head`, and by part `part`, `param`; neurons: `param`, `module`, `axis`,
        `neuron`; entries: `entry`, `param`, `index`), `n_entries`, `n_occurrences` (distinct), `n_samples` (distinct),
        `n_notable`, `tokens` (tuple of ids, the one with the largest summed count first), `text` (tuple of strings).

    Raises:
        ValueError: another `by`, unknown entries, `heads` missing, no `TopK` record.

    Source: docs/concepts.md, 5, step 4.
    """
    if by not in KINDS:
        raise ValueError(f"`by` is {by!r}, expected one of {', '.join(repr(kind) for kind in KINDS)}")
    groups = groups_of(trace, entries, by, axis=axis, heads=heads)
    named = Components(trace, groups.table, heads)
    size = len(named)
    sample, ids = pd.factorize(linked_samples(trace, links))
    counted = list(_numbers(sample_counts(trace, groups, sample, len(ids), steps=steps, client=client)))
    n_occurrences, n_samples = np.concatenate([np.zeros((2, 0), dtype=np.int64), *counted], axis=1)
    tokens, text = tokens_of(named.placed(notable, groups.entry), size)
    table = groups.table.assign(
        n_entries=np.bincount(groups.row, minlength=size),
        n_occurrences=n_occurrences,
        n_samples=n_samples,
        n_notable=np.array([len(t) for t in tokens], dtype=np.int64),
        tokens=pd.Series(tokens, dtype=object),
        text=pd.Series(text, dtype=object),
    )
    # the rows lie in the order of the model, which a stable sort keeps among equals
    return table.sort_values(["n_notable", "n_occurrences"], ascending=False, kind="stable", ignore_index=True)


def _numbers(counted: Iterable[SampleCounts]) -> Iterator[IntArray]:
    """Yield the numbers of occurrences and of different samples of each run of groups: (2, group)."""
    for one in counted:
        yield np.stack([one.number, np.count_nonzero(one.table, axis=0)])


def attributed_samples(
    trace: Trace,
    entries: Entries,
    components: pd.DataFrame,
    *,
    heads: pd.DataFrame | None = None,
    links: IntArray | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """List the attributed occurrences of many neurons, heads or entries in one pass over the record per axis.

    Args:
        trace: an open trace with a `TopK` record.
        entries: the kept entries, as in `components`.
        components: rows of `neurons`, `components` or `frequent_entries`: the columns that name them.
        heads: for heads, the table of `attention_heads`.
        links: as in `notable_tokens`.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        In the order of `components`, then of occurrences: `place` (row number in `components`), `occurrence`, `step`,
        `sample_id`, `n_entries` (how many of its entries the occurrence selected).

    Raises:
        ValueError: one that the trace doesn't have, or named twice.

    Source: docs/concepts.md, 5, step 4.
    """
    numbers = _access.entry_numbers(trace, entries)
    size = max(1, trace.n_occurrences)
    found: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for entry, place in Components(trace, components, heads).entries(numbers):
        found.append(over_steps(client, trace, steps, _pairs, joined, entry, place, size))
    pairs, count = np.unique(np.concatenate(found), return_counts=True)
    places, occurrence = np.divmod(pairs, size)
    return pd.DataFrame(
        {
            "place": places,
            "occurrence": occurrence,
            "step": trace.occurrences["step"].to_numpy()[occurrence],
            "sample_id": linked_samples(trace, links)[occurrence],
            "n_entries": count,
        }
    )


def _pairs(trace: Trace, entry: IntArray, place: IntArray, size: int, steps: Steps) -> IntArray:
    """Return place * size + occurrence of every selection of the entries."""
    found = [np.zeros(0, dtype=np.int64)]
    for occurrence, row in _access.selections(trace, entry, place, steps):
        found.append(row.astype(np.int64) * size + occurrence)
    return np.concatenate(found)


def component_switches(trace: Trace, components: pd.DataFrame, heads: pd.DataFrame | None = None) -> list[Switch]:
    """Return what `ablate` switches off for each row of a table of components, named as the table names it.

    Args:
        trace: the trace.
        components: rows of `neurons`, `components` or `frequent_entries`.
        heads: for heads, the table of `attention_heads`.

    Raises:
        ValueError: one that the trace doesn't have, or named twice.
    """
    return [replace(one.switch, keys=one.keys) for one in Components(trace, components, heads)]


def with_tokens(
    trace: Trace,
    entries: Entries,
    notable: pd.DataFrame,
    components: pd.DataFrame,
    heads: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return a table of components with `n_notable`, `tokens` and `text` taken from other notable tokens.

    Args:
        trace: the trace.
        entries: the kept entries.
        notable: from `notable_tokens`, e.g. with permuted links, of entries or of such components.
        components: rows of `neurons`, `components` or `frequent_entries`.
        heads: for heads, the table of `attention_heads`.

    Returns:
        The rows of `components` as they are but for these three columns.

    Raises:
        ValueError: unknown entries, or a column is missing.
    """
    placed = Components(trace, components, heads).placed(notable, _access.entry_numbers(trace, entries))
    tokens, text = tokens_of(placed, len(components))
    return components.assign(
        n_notable=np.array([len(t) for t in tokens], dtype=np.int64),
        tokens=pd.Series(tokens, dtype=object, index=components.index),
        text=pd.Series(text, dtype=object, index=components.index),
    )
