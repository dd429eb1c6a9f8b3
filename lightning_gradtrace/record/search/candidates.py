"""Candidates of a selection, and the order in which entries are kept: by size, then by place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np


@dataclass
class Candidates:
    """Entries that may be among those to be kept.

    Attributes:
        occurrence: number of the occurrence within the step, shape (m,).
        entry: global entry number, shape (m,).
        shift: value, shape (m,).
        error: by how much its size may be wrong, shape (m,); 0 where it was formed in its own dtype.
    """

    occurrence: np.ndarray
    entry: np.ndarray
    shift: np.ndarray
    error: np.ndarray

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.shift)

    def __getitem__(self, which: np.ndarray | slice) -> Candidates:
        """Return some of the candidates."""
        return Candidates(self.occurrence[which], self.entry[which], self.shift[which], self.error[which])

    def least(self) -> np.ndarray:
        """Return what their magnitudes are at least, shape (m,)."""
        return np.maximum(magnitude(self.shift) - self.error, 0)

    def most(self) -> np.ndarray:
        """Return what their magnitudes are at most, shape (m,)."""
        return magnitude(self.shift) + self.error

    def by_occurrence(self) -> Iterator[Candidates]:
        """Split candidates that are sorted by occurrence."""
        if len(self.occurrence) and self.occurrence[0] == self.occurrence[-1]:
            yield self
            return
        edges = np.append(np.unique(self.occurrence, return_index=True)[1], len(self.occurrence))
        for a, b in itertools.pairwise(edges):
            yield self[a:b]

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        """Join candidates, in the order of the parts."""
        if not parts:
            none = np.empty(0, np.int64)
            return Candidates(none, none, np.empty(0, np.float32), np.empty(0))
        names = [field.name for field in fields(Candidates)]
        return Candidates(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def sorted(self) -> Candidates:
        """Return the candidates by occurrence, and by entry within each."""
        return self[np.lexsort((self.entry, self.occurrence))]


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
        return complete, self.kept[keep]
