"""Cauchy-Schwarz bounds (docs/concepts.md, 4): ``|s[i][r, c]| <= |scale[r, c]| |d[i][:, r]| |a[i][:, c]|``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare, Share


@dataclass
class OuterBounds:
    """Bounds of one outer-product share; products of ``rows`` and ``columns`` bound the entries.

    Attributes:
        rows: norm over positions of every row's cotangent times the row's largest scale, shape (sample, out). What is
            not finite counts as infinite.
        columns: norm over positions of every column's input, shape (sample, in), likewise.
        norms: norms over positions of the rows' cotangents alone; infinite where `rows` is.
        squares: squared size of the shifts by which samples and steps are compared, see `typical_size`.
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
        scaled, columns, rows = (torch.nan_to_num(_wide(t), torch.inf, torch.inf) for t in (scaled, columns, rows))
        rows = torch.where(scaled.isfinite(), rows, torch.inf)
        return cls(scaled, columns, rows, _wide(squares), 1.0 + (positions + 16) * torch.finfo(share.dtype).eps)

    def peaks(self) -> Tensor:
        """Return the bound of all entries of every sample, shape (sample,); NaN where there is none."""
        return self.rows.amax(1) * self.columns.amax(1) * self.slack

    def reach(self, samples: np.ndarray, limit: np.ndarray) -> tuple[int, int]:
        """Return how many rows and columns reach the limit in some place, in the sample that has most; at least 1."""
        rows, columns, limit = self.rows.numpy()[samples], self.columns.numpy()[samples], limit / self.slack
        n_rows, n_columns = _reaching(rows, columns.max(1), limit), _reaching(columns, rows.max(1), limit)
        return max(1, n_rows), max(1, n_columns)


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

    On the CPU NumPy's einsum needs no temporary and no other threads: a third of the time of torch, and a tenth of that
    of `torch.linalg.vector_norm` along a middle axis.
    """
    lost = (factor.shape[1] * torch.finfo(factor.dtype).tiny) ** 0.5
    if factor.device.type == "cpu":
        values = factor.detach().numpy()
        return torch.from_numpy(np.einsum("stf,stf->sf", values, values)).sqrt_() + lost
    return (factor * factor).sum(1).sqrt_() + lost


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor on the host in float64; not every device has that."""
    return tensor.double() if tensor.device.type == "cpu" else tensor


def _mean_square(scale: float | Tensor) -> float | Tensor:
    return scale.square().mean() if isinstance(scale, Tensor) else scale**2


def typical_size(share: Share, scale: float | Tensor) -> Tensor:
    """Return the squared size of a share's shifts per sample, for comparing samples and steps; shape (sample,).

    It is the squared Frobenius norm. Of outer products `OuterBounds.squares` has an estimate that costs nothing: what
    it would be if positions had nothing to do with each other. Of a sample's k-th largest shift the ratio to this size
    changes little from sample to sample and step to step.
    """
    values = share.values if isinstance(share, DenseShare | RowShare) else share.total()[None]
    squares = values.reshape(len(values), -1).float().square().sum(1) * _mean_square(scale)
    return _wide(squares).expand(share.n_samples)
