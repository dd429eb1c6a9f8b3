"""Cauchy-Schwarz bounds (docs/concepts.md, 4): ``|s[i][r, c]| <= |scale[r, c]| |d[i][:, r]| |a[i][:, c]|``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare, Share


@dataclass
class OuterBounds:
    """Bounds of one outer-product share on the host; products of ``rows`` and ``columns`` bound the entries.

    Attributes:
        rows: norm over positions of every row's cotangent times the row's largest scale, shape (sample, out). What is
            not finite counts as infinite.
        columns: norm over positions of every column's input, shape (sample, in), likewise.
        norms: norms over positions of the rows' cotangents alone; infinite where `rows` is.
        squares: squared size of the shifts, shape (sample,), by which samples and steps are compared: of a sample's
            k-th largest shift the ratio to it changes little. It is the squared Frobenius norm as it would be if
            positions had nothing to do with each other, which costs nothing.
        slack: factor just above 1 that makes up for the rounding of the entries and of the bounds.
    """

    rows: Tensor
    columns: Tensor
    norms: Tensor
    squares: Tensor
    slack: float

    @classmethod
    def of(cls, share: OuterShare, scale: float | Tensor) -> OuterBounds:
        """Compute the bounds of a share whose shifts are ``scale * g``."""
        rows, columns = _norms(share.left.to(share.dtype)), _norms(share.right.to(share.dtype))
        positions = share.left.shape[1]
        squares = rows.square().sum(1) * columns.square().sum(1) * (_mean_square(scale) / positions)
        scaled = rows * (scale.abs().amax(1) if isinstance(scale, Tensor) else abs(scale))
        scaled, columns, rows = (torch.nan_to_num(t.double(), torch.inf, torch.inf) for t in (scaled, columns, rows))
        rows = torch.where(scaled.isfinite(), rows, torch.inf)
        return cls(scaled, columns, rows, squares.double(), _slack(share))

    def summary(self) -> Tensor:
        """Return the squared sizes and a bound of all entries of every sample, shape (2, sample)."""
        return torch.stack([self.squares, self.rows.amax(1) * self.columns.amax(1) * self.slack])

    def per_sample(self, summary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `summary` consists of."""
        return summary[0], summary[1]

    def reaching(self, samples: np.ndarray, limit: np.ndarray) -> tuple[int, int]:
        """Return how many rows and columns reach the limit in some place, in the sample that has most; at least 1."""
        rows, columns, limit = self.rows.numpy()[samples], self.columns.numpy()[samples], limit / self.slack
        n_rows, n_columns = _reaching(rows, columns.max(1), limit), _reaching(columns, rows.max(1), limit)
        return max(1, n_rows), max(1, n_columns)


@dataclass
class OuterExtents:
    """What an outer-product share reaches at most, in few calls on the device that it is on.

    Attributes:
        extents: of the rows' cotangents and of the columns' inputs the norm of all and the largest norm over positions,
            shape (4, sample). Where every entry has a scale, the largest norm of a row times its largest scale as
            well, and the typical scale: shape (6, sample).
        scale: the scale, if there is one for all.
        positions: number of positions.
        dtype: in which entries are formed.
        slack: see `OuterBounds`.
    """

    extents: Tensor
    scale: float
    positions: int
    dtype: torch.dtype
    slack: float

    @classmethod
    def of(cls, share: OuterShare, scale: float | Tensor) -> OuterExtents:
        """Measure a share whose shifts are ``scale * g``."""
        norm = torch.linalg.vector_norm
        rows, columns = (norm(factor, dim=1, dtype=share.dtype) for factor in (share.left, share.right))
        extents = [part for norms in (rows, columns) for part in (norm(norms, dim=1), norms.amax(1))]
        if isinstance(scale, Tensor):
            scaled = (rows + _lost(share.left, share.dtype)) * norm(scale, torch.inf, dim=1)
            extents += [scaled.amax(1), (norm(scale) / scale.numel() ** 0.5).expand(len(scaled))]
        number = 1.0 if isinstance(scale, Tensor) else abs(scale)
        return cls(torch.stack(extents), number, share.left.shape[1], share.dtype, _slack(share))

    def summary(self) -> Tensor:
        """Return the extents."""
        return self.extents

    def per_sample(self, summary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared sizes and a bound of all entries of every sample, infinite where there is none."""
        with np.errstate(all="ignore"):
            left, row, right, column, *scaled = summary.astype(np.float64)
            lost = (self.positions * torch.finfo(self.dtype).tiny) ** 0.5
            row, column = row + lost, column + lost
            largest, typical = scaled or (row * self.scale, self.scale)
            finite = row * column <= torch.finfo(self.dtype).max  # entries may overflow before they are scaled
            return np.square(left * right * typical) / self.positions, np.where(
                finite, largest * column * self.slack, np.inf
            )


@dataclass
class Sizes:
    """Of a share that is no outer product: nothing bounds its entries before they are formed.

    Attributes:
        squares: squared Frobenius norm of the shifts, shape (sample,).
    """

    squares: Tensor

    @classmethod
    def of(cls, share: Share, scale: float | Tensor) -> Sizes:
        """Measure a share whose shifts are ``scale * g``."""
        values = share.values if isinstance(share, DenseShare | RowShare) else share.total()[None]
        norms = torch.linalg.vector_norm(values.reshape(len(values), values.shape[1:].numel()).float(), dim=1)
        return cls((norms.square() * _mean_square(scale)).expand(share.n_samples))

    def summary(self) -> Tensor:
        """Return the squared sizes, shape (1, sample)."""
        return self.squares[None]

    def per_sample(self, summary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared sizes, and infinite bounds."""
        return summary[0], np.full(summary.shape[1], np.inf)


@dataclass
class Stairs:
    """The entries that can reach a threshold: with rows and columns sorted by their bounds, a staircase.

    A row needs the columns up to some column, and the next row no more than that. The most promising rows come first.

    Attributes:
        rows: numbers of the rows that need any column, shape (sample, r), most promising first; filled up with others
            where another sample has more.
        columns: numbers of the columns that any row needs, likewise.
        row_bounds: their bounds.
        column_bounds: likewise.
        slack: see `OuterBounds`.
    """

    rows: np.ndarray
    columns: np.ndarray
    row_bounds: np.ndarray
    column_bounds: np.ndarray
    slack: float

    @classmethod
    def of(cls, bounds: OuterBounds, samples: np.ndarray, limit: np.ndarray) -> Stairs:
        """Sort the rows and columns of some samples and leave out those that can't reach the limit.

        Args:
            bounds: the bounds, on the host.
            samples: numbers of the samples.
            limit: one per sample.
        """
        rows, columns, limit = bounds.rows.numpy()[samples], bounds.columns.numpy()[samples], limit / bounds.slack
        row_order, row_bounds = _promising(rows, columns.max(1), limit)
        column_order, column_bounds = _promising(columns, rows.max(1), limit)
        return cls(row_order, column_order, row_bounds, column_bounds, bounds.slack)

    def columns_of(self, row: int, limit: np.ndarray) -> int:
        """Return how many columns a row, and those after it, need in the sample that needs most."""
        return int(self._needed(slice(row, row + 1), limit).max(initial=0))

    def area(self, limit: np.ndarray) -> int:
        """Return about how many entries of a sample are on the stairs; samples differ little."""
        every = max(1, self.rows.shape[1] // 16)
        return every * int(self._needed(slice(None, None, every), limit).max(0, initial=0).sum())

    def _needed(self, rows: slice, limit: np.ndarray) -> np.ndarray:
        """Return how many columns some rows need, shape (sample, row)."""
        with np.errstate(invalid="ignore", over="ignore"):
            bounds = self.row_bounds[:, rows, None] * self.column_bounds[:, None, :]
            return np.asarray((~(bounds < limit[:, None, None] / self.slack)).sum(2))


def _promising(own: np.ndarray, other: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (or columns) that reach the limit in some place, the largest first, and their bounds."""
    order = np.argsort(-own, axis=1)[:, : _reaching(own, other, limit)]
    return order, np.take_along_axis(own, order, 1)


def _reaching(own: np.ndarray, other: np.ndarray, limit: np.ndarray) -> int:
    """Return how many rows (or columns) reach the limit together with the largest column (or row)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return int((~(own * other[:, None] < limit[:, None])).sum(1).max(initial=0))


def _norms(factor: Tensor) -> Tensor:
    """Return an upper bound of the norms over positions, tight but for squares that underflow; (sample, features).

    NumPy's einsum needs no temporary and no other threads: a third of the time of torch, and a tenth of that of
    `torch.linalg.vector_norm` along a middle axis.
    """
    values = factor.detach().numpy()
    return torch.from_numpy(np.einsum("stf,stf->sf", values, values)).sqrt_() + _lost(factor, factor.dtype)


def _lost(factor: Tensor, dtype: torch.dtype) -> float:
    """Return what a norm over positions, taken in a dtype, may lack because squares underflow."""
    return float((factor.shape[1] * torch.finfo(dtype).tiny) ** 0.5)


def _slack(share: OuterShare) -> float:
    """Return a factor just above 1 that makes up for the rounding of entries and bounds."""
    return 1.0 + (share.left.shape[1] + 16) * torch.finfo(share.dtype).eps


def _mean_square(scale: float | Tensor) -> float | Tensor:
    return scale.square().mean() if isinstance(scale, Tensor) else scale**2
