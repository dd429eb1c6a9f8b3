"""Collects candidates while the threshold that others have to reach rises with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightning_gradtrace.record.search.candidates import Candidates, kth_largest, magnitude

# Candidates that compete are cut down to the k largest, and their threshold raised, once there are this many times k.
TRIM = 2


class Gathering:
    """Candidates found so far, by group: those that compete with each other.

    Attributes:
        k: number of entries to select in every group.
        pool: whether all occurrences are one group; if not, each is a group of its own.
        threshold: what a new candidate has to reach, one per occurrence; inf for those that are not searched.
    """

    def __init__(self, k: int, threshold: np.ndarray, pool: bool) -> None:
        self.k = k
        self.pool = pool
        self.threshold = threshold
        n = 1 if pool else len(threshold)
        self._parts: list[list[Candidates]] = [[] for _ in range(n)]
        self._counts = [0] * n
        self._trim_at = [TRIM * k] * n

    def add(self, found: Candidates) -> None:
        """Add candidates, sorted by occurrence."""
        for one in [found] if self.pool else found.by_occurrence():
            if not len(one):
                continue
            group = 0 if self.pool else int(one.occurrence[0])
            self._parts[group].append(one)
            self._counts[group] += len(one)
            if self._counts[group] > self._trim_at[group]:
                self._trim(group)

    def _trim(self, group: int) -> None:
        """Keep the k largest, and ties, of a group."""
        every = Candidates.join(self._parts[group])
        least = kth_largest(every.least(), self.k)
        kept = _without_late_ties(every[every.most() >= least], least, self.k)
        self._parts[group], self._counts[group] = [kept], len(kept)
        self._trim_at[group] = max(TRIM * self.k, 2 * len(kept))
        if np.isfinite(least):
            owners = slice(None) if self.pool else slice(group, group + 1)
            searched = np.isfinite(self.threshold[owners])
            raised = np.maximum(self.threshold[owners], least)
            self.threshold[owners] = np.where(searched, raised, np.inf)

    def settle(self, exact: Callable[[Candidates], np.ndarray]) -> None:
        """Replace shifts that have an error by what they are, and drop those that don't reach the threshold.

        Args:
            exact: returns the shifts of some candidates, ordered by occurrence.
        """
        for group, count in enumerate(self._counts):
            if count > self.k:
                self._trim(group)
        every = Candidates.join([part for parts in self._parts for part in parts])
        rough = np.flatnonzero(every.error)
        if not len(rough):
            return
        every.shift[rough], every.error[rough] = exact(every[rough]), 0
        limit = self.threshold[every.occurrence[rough]]
        below = np.isfinite(limit) & (magnitude(every.shift[rough]) < limit)
        every = every[np.delete(np.arange(len(every)), rough[below])]
        self.drop(np.full(len(self._parts), True))
        self.add(every)

    def drop(self, occurrences: np.ndarray) -> None:
        """Forget the candidates of some occurrences (all of them, if they are one group): they are searched again."""
        for group in (0,) if self.pool else np.flatnonzero(occurrences):
            self._parts[group], self._counts[group], self._trim_at[group] = [], 0, TRIM * self.k

    def counts(self) -> np.ndarray:
        """Number of candidates in every occurrence's group."""
        return np.full(len(self.threshold), self._counts[0]) if self.pool else np.array(self._counts)

    def result(self) -> Candidates:
        """Return all candidates, sorted by occurrence and entry; of a group of more than k the k largest and ties."""
        for group, count in enumerate(self._counts):
            if count > self.k:
                self._trim(group)
        return Candidates.join([part for parts in self._parts for part in parts]).sorted()


def _without_late_ties(found: Candidates, least: float, k: int) -> Candidates:
    """Leave out what ties with the k-th largest and comes too late for a place, since ties go to the lower entry."""
    if len(found) <= TRIM * k:
        return found
    tied = np.flatnonzero((found.error == 0) & (magnitude(found.shift) == least))
    places = max(0, k - int((found.least() > least).sum()))
    late = np.lexsort((found.entry[tied], found.occurrence[tied]))[places:]
    return found[np.delete(np.arange(len(found)), tied[late])]
