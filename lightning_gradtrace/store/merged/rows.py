"""Which row of the merged trace lies in which row of which part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Occurrences:
    """The occurrences of all parts: step by step, of a step rank 0's first, then rank 1's.

    Example:
        >>> places = Occurrences.of(np.array([[2, 1], [1, 2]]))  # two steps of three occurrences
        >>> places.rank.tolist(), places.row.tolist()
        ([0, 0, 1, 0, 1, 1], [0, 1, 0, 2, 1, 2])
        >>> places.numbers[1].tolist()
        [2, 4, 5]

    Attributes:
        rank: rank of every occurrence, shape (occurrence,).
        row: its row in the part of that rank, shape (occurrence,).
        n_ranks: number of ranks.
    """

    rank: np.ndarray
    row: np.ndarray
    n_ranks: int

    @classmethod
    def of(cls, counts: np.ndarray) -> Occurrences:
        """Number the occurrences.

        Args:
            counts: occurrences of every step and rank, shape (step, rank).
        """
        n_ranks = counts.shape[1]
        sizes = counts.reshape(-1)
        rank = np.repeat(np.tile(np.arange(n_ranks, dtype=np.int32), len(counts)), sizes)
        first = (np.cumsum(counts, 0) - counts).reshape(-1)  # row in the part of the first one of each block
        begins = np.cumsum(sizes) - sizes
        return cls(rank, np.arange(len(rank)) + np.repeat(first - begins, sizes), n_ranks)

    @cached_property
    def numbers(self) -> list[np.ndarray]:
        """Number in the merged trace of every row of each part, rising."""
        return [np.flatnonzero(self.rank == rank) for rank in range(self.n_ranks)]

    def listed(self, labels: Sequence[np.ndarray]) -> Rows:
        """Merge the rows of a group that not every occurrence has, up to the last occurrence that is visible.

        Args:
            labels: rows of its part that the rows of the group belong to, rising, for each rank.
        """
        merged = [number[own[own < len(number)]] for number, own in zip(self.numbers, labels, strict=True)]
        joined = np.concatenate(merged)
        order = np.argsort(joined, kind="stable")
        rank = np.repeat(np.arange(self.n_ranks, dtype=np.int32), [len(own) for own in merged])[order]
        row = np.concatenate([np.arange(len(own)) for own in merged])[order]
        return Rows(rank, row, joined[order])

    @cached_property
    def every(self) -> Rows:
        """The rows of a group that every occurrence has."""
        return Rows(self.rank, self.row, np.arange(len(self.rank)))


@dataclass(frozen=True)
class Rows:
    """Rows along "occurrence" of one group.

    Attributes:
        rank: rank whose part holds the row, shape (rows,).
        row: its row there, shape (rows,); rising for each rank.
        labels: occurrence of the merged trace that it belongs to, rising, shape (rows,).
    """

    rank: np.ndarray
    row: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class StepRows:
    """Rows along "step" of one group, each of which several ranks may hold.

    Attributes:
        labels: step of every row, rising, shape (rows,).
        rows: the row in each part, -1 where a part has none, shape (rank, rows).
    """

    labels: np.ndarray
    rows: np.ndarray

    @classmethod
    def listed(cls, labels: Sequence[np.ndarray], known: np.ndarray) -> StepRows:
        """Merge the rows of a group.

        Args:
            labels: steps of the rows of each part, rising.
            known: steps of the merged trace.
        """
        merged = np.intersect1d(np.unique(np.concatenate(labels)), known)
        rows = np.full((len(labels), len(merged)), -1, np.int64)
        for own, steps in zip(rows, labels, strict=True):
            if len(steps):
                at = np.searchsorted(steps, merged).clip(0, len(steps) - 1)
                own[:] = np.where(steps[at] == merged, at, -1)
        return cls(merged, rows)
