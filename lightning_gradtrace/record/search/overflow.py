"""Shifts that are not finite, of which a training that has diverged has hardly any others.

They count as the largest, and ties go to the lower entry. So of an occurrence with k of them the first k are the k
largest, and nothing else of it needs to be looked at; a search would find all there are, and hold them.
"""

from __future__ import annotations

import numpy as np

from lightning_gradtrace.record._base import StepShifts
from lightning_gradtrace.record.search.candidates import Candidates

# Squared typical size of an occurrence's shifts from which on it is looked at. What is larger may overflow.
SUSPICIOUS = 1e40
# Entries that are looked at together.
PART = 1 << 22


def suspicious(squares: np.ndarray) -> np.ndarray:
    """Say which occurrences may have shifts that are not finite, given the squares of their typical sizes."""
    return ~(squares < SUSPICIOUS)


def first_not_finite(step: StepShifts, occurrences: np.ndarray, k: int, pool: bool) -> tuple[np.ndarray, Candidates]:
    """Find occurrences whose k largest shifts are not finite.

    Args:
        step: the shifts.
        occurrences: which to look at, bool, one per occurrence of the step.
        k: number of entries to select.
        pool: whether to select them among all occurrences instead of for each; all are looked at then.

    Returns:
        Which occurrences are through, bool (all of them or none, if they are one pool); and their entries, sorted by
        occurrence.
    """
    through, found, missing = np.zeros(len(occurrences), bool), list[Candidates](), k
    for occurrence in range(len(through)) if pool else map(int, np.flatnonzero(occurrences)):
        first = _first(step, occurrence, missing)
        through[occurrence] = len(first) == missing
        if pool or through[occurrence]:
            found.append(first)
        if pool:
            missing -= len(first)
            if not missing:
                return np.ones_like(through), Candidates.join(found)
    return (np.zeros_like(through), Candidates.join([])) if pool else (through, Candidates.join(found))


def _first(step: StepShifts, occurrence: int, n: int) -> Candidates:
    """Return the first ``n`` shifts of an occurrence that are not finite, or all there are."""
    found, missing = list[Candidates](), n
    micro_batch = next(i for i, samples in enumerate(step.micro_batches) if occurrence < samples.stop)
    sample = occurrence - step.micro_batches[micro_batch].start
    for parameter in sorted(step.parameters, key=lambda parameter: parameter.info.offset):
        if parameter.shares[micro_batch] is None:
            continue
        shifts = parameter.shifts(micro_batch, slice(sample, sample + 1)).flatten()
        for start in range(0, len(shifts), PART):
            if not missing:
                return Candidates.join(found)
            part = shifts[start : start + PART]
            where = part.isfinite().logical_not_().nonzero().squeeze(1)[:missing]
            shift, entry = part[where].cpu().numpy(), where.cpu().numpy() + parameter.info.offset + start
            found.append(Candidates(np.full(len(entry), occurrence), entry, shift, np.zeros(len(entry))))
            missing -= len(entry)
    return Candidates.join(found)
