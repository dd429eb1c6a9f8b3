"""From entries to neurons: entries of a weight that share a column or a row (docs/concepts.md, 5, step 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._grid import Grid, check_neuron, grid_of, places, tokens_of
from lightning_gradtrace.analysis._groups import distinct_pairs
from lightning_gradtrace.analysis._texts import linked_samples
from lightning_gradtrace.analysis._workers import over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def neurons(
    trace: Trace,
    entries: Entries,
    notable: pd.DataFrame,
    axis: str = "in",
    *,
    links: IntArray | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """Gather entries into neurons; occurrences and notable tokens are the unions over a neuron's entries.

    For a weight of shape (out, in), flat index i lies in column `i % in` (`axis="in"`, the post's choice) and in row
    `i // in` (`axis="out"`). Rows of a packed attention weight `in_proj_weight` (3 E, E) are, in this order, queries,
    keys and values. Parameters with another number of axes have no neurons and are left out.

    What can mislead: a neuron with more entries has more occurrences and more chances of a notable token, whatever
    the samples say; compare `n_notable` with the null (`null_tokens`), not neurons with each other.

    Args:
        trace: an open trace with a `TopK` record.
        entries: table with a column `entry` (from `frequent_entries`), or global entry numbers.
        notable: from `notable_tokens` with the same entries (may be empty).
        axis: "in" for columns, "out" for rows.
        links: as in `notable_tokens`; only `n_samples` depends on them here.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per neuron with an entry, largest `n_notable` first, then `n_occurrences`, then by place in the model:
        `param`, `module`, `axis`, `neuron`, `n_entries`, `n_occurrences` (distinct), `n_samples` (distinct),
        `n_notable`, `tokens` (tuple of ids, the one with the largest summed count first), `text` (tuple of strings).

    Raises:
        ValueError: wrong axis, unknown entries, no `TopK` record.
    """
    numbers = _access.entry_numbers(trace, entries)
    grid = grid_of(trace, numbers, axis)
    n_neurons = len(grid.neuron)
    n_entries = np.bincount(grid.row, minlength=n_neurons)

    sample, ids = pd.factorize(linked_samples(trace, links))
    if client is not None:
        sample = client.scatter(sample, broadcast=True)
    n_occurrences, seen = over_steps(client, trace, steps, _met, _unite, grid, sample, len(ids))

    tokens, text = tokens_of(notable, grid.entry, grid.row, n_neurons)
    table = pd.DataFrame(
        {
            "param": pd.Series([p.param for p in grid.param], dtype=str),
            "module": pd.Series([p.module for p in grid.param], dtype=str),
            "axis": pd.Series([axis] * n_neurons, dtype=str),
            "neuron": grid.neuron,
            "n_entries": n_entries,
            "n_occurrences": n_occurrences,
            "n_samples": np.bitwise_count(seen).sum(axis=1, dtype=np.int64),
            "n_notable": np.array([len(t) for t in tokens], dtype=np.int64),
            "tokens": pd.Series(tokens, dtype=object),
            "text": pd.Series(text, dtype=object),
        }
    )
    # the rows lie in the order of the model, which a stable sort keeps among equals
    return table.sort_values(["n_notable", "n_occurrences"], ascending=False, kind="stable", ignore_index=True)


def _met(trace: Trace, grid: Grid, sample: IntArray, n_samples: int, steps: Steps) -> tuple[IntArray, IntArray]:
    """Return the number of occurrences of each neuron, and its samples as bits (neuron, sample / 8)."""
    n_neurons = len(grid.neuron)
    n_occurrences = np.zeros(n_neurons, dtype=np.int64)
    width = -(-n_samples // 8)
    seen = np.zeros(n_neurons * width, dtype=np.uint8)
    for block in _access.selections(trace, grid.entry, grid.row, steps):
        for occurrence, row, _ in distinct_pairs(*block, n_neurons):
            n_occurrences += np.bincount(row, minlength=n_neurons)
            place = sample[occurrence]
            np.bitwise_or.at(seen, row * width + (place >> 3), (1 << (place & 7)).astype(np.uint8))
    return n_occurrences, seen.reshape(n_neurons, width)


def _unite(one: tuple[IntArray, IntArray], other: tuple[IntArray, IntArray]) -> tuple[IntArray, IntArray]:
    return one[0] + other[0], one[1] | other[1]


def neuron_samples(
    trace: Trace,
    entries: Entries,
    param: str,
    neuron: int,
    axis: str = "in",
    *,
    links: IntArray | None = None,
    steps: Steps = None,
) -> pd.DataFrame:
    """List the occurrences that selected any of a neuron's entries.

    Args:
        trace: an open trace with a `TopK` record.
        entries: the kept entries, as in `neurons`.
        param: name of the parameter.
        neuron: column (`axis="in"`) or row (`axis="out"`) of the weight.
        axis: "in" or "out".
        links: as in `notable_tokens`.
        steps: step numbers to look at; None for all.

    Returns:
        One row per occurrence, in order, so a sample comes as often as it was seen: `occurrence`, `step`,
        `sample_id`, `n_entries` (how many of the neuron's entries it selected).

    Raises:
        ValueError: the parameter is not tracked or not a matrix, or has no such neuron.
    """
    check_neuron(trace, param, neuron, axis)
    one = pd.DataFrame({"param": [param], "axis": [axis], "neuron": [neuron]})
    table = attributed_samples(trace, entries, one, links=links, steps=steps)
    return table[["occurrence", "step", "sample_id", "n_entries"]]


def attributed_samples(
    trace: Trace,
    entries: Entries,
    neurons: pd.DataFrame,
    *,
    links: IntArray | None = None,
    steps: Steps = None,
) -> pd.DataFrame:
    """List the attributed occurrences of many neurons in one pass over the record per axis.

    Args:
        trace: an open trace with a `TopK` record.
        entries: the kept entries, as in `neurons`.
        neurons: table with the columns `param`, `axis`, `neuron`.
        links: as in `notable_tokens`.
        steps: step numbers to look at; None for all.

    Returns:
        In the order of `neurons`, then of occurrences: `place` (row number in `neurons`), `occurrence`, `step`,
        `sample_id`, `n_entries`.

    Raises:
        ValueError: as in `neuron_samples`, or a neuron named twice.
    """
    numbers = _access.entry_numbers(trace, entries)
    if neurons.duplicated(["param", "axis", "neuron"]).any():
        raise ValueError("`neurons` names some neurons twice, expected each once; drop the duplicates")
    for param, axis, neuron in zip(neurons["param"], neurons["axis"], neurons["neuron"], strict=True):
        check_neuron(trace, str(param), int(neuron), str(axis))
    size = max(1, trace.n_occurrences)
    found: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for axis in dict.fromkeys(neurons["axis"]):
        for occurrence, row in _access.selections(trace, *places(trace, numbers, neurons, axis), steps):
            found.append(row.astype(np.int64) * size + occurrence)
    pairs, count = np.unique(np.concatenate(found), return_counts=True)
    place, occurrence = np.divmod(pairs, size)
    return pd.DataFrame(
        {
            "place": place,
            "occurrence": occurrence,
            "step": trace.occurrences["step"].to_numpy()[occurrence],
            "sample_id": linked_samples(trace, links)[occurrence],
            "n_entries": count,
        }
    )


def with_tokens(trace: Trace, entries: Entries, notable: pd.DataFrame, neurons: pd.DataFrame) -> pd.DataFrame:
    """Return a table of neurons with `n_notable`, `tokens` and `text` taken from other notable tokens.

    Args:
        trace: the trace.
        entries: the kept entries.
        notable: from `notable_tokens`, e.g. with permuted links.
        neurons: table with the columns `param`, `axis`, `neuron`.

    Raises:
        ValueError: unknown entries, or a column is missing.
    """
    numbers = _access.entry_numbers(trace, entries)
    pairs = [places(trace, numbers, neurons, axis) for axis in dict.fromkeys(neurons["axis"])]
    empty = np.zeros(0, dtype=np.int64)
    entry, place = (np.concatenate([empty, *parts]) for parts in zip(*pairs, strict=True)) if pairs else (empty, empty)
    tokens, text = tokens_of(notable, entry, place, len(neurons))
    return neurons.assign(
        n_notable=np.array([len(t) for t in tokens], dtype=np.int64),
        tokens=pd.Series(tokens, dtype=object, index=neurons.index),
        text=pd.Series(text, dtype=object, index=neurons.index),
    )
