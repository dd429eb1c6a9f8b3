"""Candidates of a selection, and the order in which entries are kept: by size, then by place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Candidates:
    """Entries that may be among those to be kept.

    Attributes:
        occurrence: number of the occurrence within the step, shape (m,).
        entry: global entry number, shape (m,).
        shift: value, shape (m,).
    """

    occurrence: np.ndarray
    entry: np.ndarray
    shift: np.ndarray

    def by_occurrence(self) -> Iterator[Candidates]:
        """Split candidates that are sorted by occurrence."""
        if len(self.occurrence) and self.occurrence[0] == self.occurrence[-1]:
            yield self
            return
        edges = np.append(np.unique(self.occurrence, return_index=True)[1], len(self.occurrence))
        for a, b in itertools.pairwise(edges):
            yield Candidates(self.occurrence[a:b], self.entry[a:b], self.shift[a:b])

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        """Join candidates, in the order of the parts."""
        if not parts:
            return Candidates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        occurrence, entry = (np.concatenate([getattr(p, name) for p in parts]) for name in ("occurrence", "entry"))
        return Candidates(occurrence, entry, np.concatenate([p.shift for p in parts]))

    def sorted(self) -> Candidates:
        """Return the candidates by occurrence, and by entry within each."""
        order = np.lexsort((self.entry, self.occurrence))
        return Candidates(self.occurrence[order], self.entry[order], self.shift[order])


def magnitude(shift: np.ndarray) -> np.ndarray:
    """Absolute values, NaN counted as infinite: what is not finite is always selected."""
    size = np.abs(shift)
    return np.where(np.isnan(size), np.inf, size)


def largest(shift: np.ndarray, k: int) -> np.ndarray:
    """Return the ascending positions of the ``k`` largest magnitudes; ties go to the lower position."""
    if len(shift) <= k:
        return np.arange(len(shift))
    size = magnitude(shift)
    least = kth_largest(shift, k)
    keep = size > least
    tied = np.flatnonzero(size == least)[: k - int(keep.sum())]
    keep[tied] = True
    return np.flatnonzero(keep)


def kth_largest(shift: np.ndarray, k: int) -> float:
    """Return the k-th largest magnitude of at least ``k`` values."""
    return float(np.partition(magnitude(shift), len(shift) - k)[len(shift) - k])


def fill_with_zeros(entry: np.ndarray, shift: np.ndarray, k: int, n_entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Add the lowest entries with shift zero until there are ``k``: zeros tie, and ties go to the lower entry.

    Args:
        entry: entries found, ascending: all entries with a shift other than zero.
        shift: their shifts.
        k: number wanted.
        n_entries: number of all entries.

    Returns:
        Entries, ascending, and shifts; ``min(k, n_entries)`` of each.
    """
    missing = min(k, n_entries) - len(entry)
    if missing <= 0:
        return entry, shift
    free = np.setdiff1d(np.arange(min(n_entries, len(entry) + missing)), entry, assume_unique=True)[:missing]
    joined = np.concatenate([entry, free])
    order = np.argsort(joined, kind="stable")
    return joined[order], np.concatenate([shift, np.zeros(len(free), shift.dtype)])[order]


@dataclass
class Known:
    """What a selection per occurrence leaves for one over the whole step: its k largest of every occurrence.

    Attributes:
        k: number of entries that were looked for; an occurrence with fewer has no others that differ from zero.
        kept: the entries that were found.
    """

    k: int
    kept: Candidates

    def floor(self, k: int) -> float:
        """Return a value that at least ``k`` entries of the step reach, 0 if too few are known."""
        least = kth_largest(self.kept.shift, k) if len(self.kept.shift) >= k else 0.0
        return least if np.isfinite(least) else 0.0

    def at_least(self, threshold: np.ndarray) -> tuple[np.ndarray, Candidates]:
        """Say of which occurrences all entries at or above their threshold are known, and return these entries.

        Args:
            threshold: one per occurrence, positive; not finite where the occurrence isn't looked for.
        """
        size = magnitude(self.kept.shift)
        counts = np.bincount(self.kept.occurrence, minlength=len(threshold))
        least = np.full(len(threshold), np.inf)
        np.minimum.at(least, self.kept.occurrence, size)
        complete = np.isfinite(threshold) & ((counts < self.k) | (least < threshold))
        keep = complete[self.kept.occurrence] & (size >= threshold[self.kept.occurrence])
        return complete, Candidates(self.kept.occurrence[keep], self.kept.entry[keep], self.kept.shift[keep])
