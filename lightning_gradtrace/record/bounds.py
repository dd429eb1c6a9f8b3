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
        rows: norm over positions of every row's cotangent times the row's largest scale, shape (sample, out).
        columns: norm over positions of every column's input, shape (sample, in).
        slack: factor just above 1 that makes up for the rounding of the entries and of the bounds.
    """

    rows: np.ndarray
    columns: np.ndarray
    slack: float

    @classmethod
    def of(cls, share: OuterShare, scale: float | Tensor) -> OuterBounds:
        """Compute the bounds of a share whose shifts are ``scale * g``."""
        rows, columns = _norms(share.left.to(share.dtype)), _norms(share.right.to(share.dtype))
        rows = rows * (scale.abs().amax(1) if isinstance(scale, Tensor) else abs(scale))
        slack = 1.0 + (share.left.shape[1] + 16) * torch.finfo(share.dtype).eps
        return cls(_host(rows), _host(columns), slack)

    def reachable(self, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Say which rows and columns may hold an entry at or above the threshold of their sample.

        What is not finite is always reachable.

        Args:
            threshold: one per sample.

        Returns:
            Masks of shape (sample, out) and (sample, in).
        """
        limit = (threshold / self.slack)[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            rows = ~(self.rows * self.columns.max(1, keepdims=True) < limit)
            columns = ~(self.columns * self.rows.max(1, keepdims=True) < limit)
        return rows, columns


def _norms(factor: Tensor) -> Tensor:
    """Return an upper bound of the norms over positions, tight but for squares that underflow; (sample, features).

    Ten times faster than `torch.linalg.vector_norm` along a middle axis.
    """
    lost = (factor.shape[1] * torch.finfo(factor.dtype).tiny) ** 0.5
    return (factor * factor).sum(1).sqrt_() + lost


def typical_size(share: Share, scale: float | Tensor, outer: OuterBounds | None) -> np.ndarray:
    """Return the squared size of a share's shifts per sample, for comparing samples and steps; shape (sample,).

    It is the squared Frobenius norm, or an estimate in proportion to it where that would cost too much. Of a sample's
    k-th largest shift its ratio to this size is what changes least from sample to sample and step to step.
    """
    factor = float(scale.square().mean()) if isinstance(scale, Tensor) else scale**2
    if isinstance(share, OuterShare):
        positions, numel = share.left.shape[1], share.shape.numel()
        if 3 * positions * sum(share.shape) < numel:
            return _host(share.squared_norms()) * factor
        assert outer is not None
        return np.asarray(np.square(outer.rows).sum(1) * np.square(outer.columns).sum(1) / positions)
    values = share.values if isinstance(share, DenseShare | RowShare) else share.total()[None]
    return _host(values.reshape(len(values), -1).float().square().sum(1)) * factor


def _host(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
