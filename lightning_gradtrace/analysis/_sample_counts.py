"""How often each sample selected each group of entries: what words and samples of groups are worked out from.

One table (sample, group) stands between the record and the texts. It grows neither with the steps of a run nor with
the words of its texts, and the texts, however often they were read, are multiplied with it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._groups import Groups, group_marks, group_selections
from lightning_gradtrace.analysis._workers import over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Memory of one table; more groups take another pass over the record.
_TABLE_BYTES = 1 << 30


@dataclass
class SampleCounts:
    """Selections of a run of neighbouring groups; adds up over steps.

    Attributes:
        first: number of the first group.
        table: (sample, group) how many occurrences of a sample selected the group, or the sum of their weights.
        number: (group,) occurrences that selected it.
    """

    first: int
    table: npt.NDArray[Any]
    number: IntArray

    def add(self, other: SampleCounts) -> SampleCounts:
        """Return the sums over the steps of both."""
        return SampleCounts(self.first, self.table + other.table, self.number + other.number)


def sample_counts(
    trace: Trace,
    groups: Groups,
    sample: IntArray,
    n_samples: int,
    *,
    weight: str = "none",
    steps: Steps = None,
    client: Any = None,
) -> Iterator[SampleCounts]:
    """Count selections by sample and group, in one pass over the record for every run of groups that fits into memory.

    Args:
        trace: the trace.
        groups: from `groups_of`.
        sample: (occurrence,) number of the sample that each occurrence is linked to.
        n_samples: how many samples there are.
        weight: as in `group_selections`.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client`, or None.

    Yields:
        The counts, run by run, in the order of the groups.
    """
    most_seen = int(np.bincount(sample, minlength=1).max()) if sample.size else 0
    dtype = np.min_scalar_type(most_seen) if weight == "none" else np.dtype(np.float64)
    at_once = max(1, _TABLE_BYTES // (dtype.itemsize * max(1, n_samples)))
    for start in range(0, len(groups.table), at_once):
        part = groups.between(start, start + at_once)
        found = over_steps(client, trace, steps, _count, SampleCounts.add, part, sample, n_samples, weight, dtype)
        yield SampleCounts(start, found.table, found.number)


def _count(
    trace: Trace, groups: Groups, sample: IntArray, n_samples: int, weight: str, dtype: np.dtype[Any], steps: Steps
) -> SampleCounts:
    n_groups = len(groups.table)
    table = np.zeros((n_samples, n_groups), dtype=dtype)
    if weight == "none" and groups.by != "entry":
        for occurrence, row in _access.selections(trace, groups.entry, groups.row, steps):
            for first, marked in group_marks(occurrence, row, n_groups):
                for one, selected in zip(sample[first : first + len(marked)].tolist(), marked, strict=True):
                    table[one] += selected
        return SampleCounts(0, table, table.sum(axis=0, dtype=np.int64))
    flat = table.reshape(-1)
    number = np.zeros(n_groups, dtype=np.int64)
    for occurrence, row, size in group_selections(trace, groups, weight=weight, steps=steps):
        # Of an array of ones `add.at` is many times as fast as of a single one.
        np.add.at(flat, sample[occurrence] * n_groups + row, np.ones(row.size, dtype) if size is None else size)
        number += np.bincount(row, minlength=n_groups)
    return SampleCounts(0, table, number)
