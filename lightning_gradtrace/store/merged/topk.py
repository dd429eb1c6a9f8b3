"""The k largest shifts of a step over all ranks, out of the k largest of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Kept = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Occurrence (-1 for none), entry and shift of kept entries, each of shape (step, k)."""


def merge_kept(parts: Sequence[Kept]) -> Kept:
    """Keep the k largest of what the ranks kept; ties are broken by occurrence, then by entry.

    The outcome is exact: an entry is among the k largest of all only if it is among the k largest of its rank.

    Example:
        >>> a = np.array([[0, 1]]), np.array([[7, 3]]), np.array([[0.5, -2.0]])
        >>> b = np.array([[2, -1]]), np.array([[4, 0]]), np.array([[1.0, 0.0]])
        >>> [x.tolist() for x in merge_kept([a, b])]
        [[[1, 2]], [[3, 4]], [[-2.0, 1.0]]]

    Args:
        parts: of every rank, with occurrences of the merged trace.

    Returns:
        Kept entries by occurrence, then by entry; padding comes last.
    """
    k = parts[0][0].shape[1]
    occurrence, entry, shift = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    size = np.abs(shift)
    size = np.where(occurrence < 0, -1.0, np.where(np.isnan(size), np.inf, size))
    chosen = np.lexsort((entry, occurrence, -size), axis=1)[:, :k]
    occurrence, entry, shift = (np.take_along_axis(a, chosen, 1) for a in (occurrence, entry, shift))
    last = np.where(occurrence < 0, np.iinfo(np.int64).max, occurrence)
    order = np.lexsort((entry, last), axis=1)
    occurrence, entry, shift = (np.take_along_axis(a, order, 1) for a in (occurrence, entry, shift))
    return occurrence, entry, shift
