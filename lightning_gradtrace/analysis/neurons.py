"""From entries to neurons: entries of a weight that share a column or a row (docs/concepts.md, 5, step 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis.components import attributed_samples, components

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

    Source: docs/concepts.md, 5, step 4.
    """
    return components(trace, entries, notable, "neuron", axis=axis, links=links, steps=steps, client=client)


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

    Source: docs/concepts.md, 5, step 4.
    """
    one = pd.DataFrame({"param": [param], "axis": [axis], "neuron": [neuron]})
    table = attributed_samples(trace, entries, one, links=links, steps=steps)
    return table[["occurrence", "step", "sample_id", "n_entries"]]
