"""Cauchy-Schwarz bounds on shifts: ``|s[i][r, c]| <= |scale[r, c]| |d[i][:, r]| |a[i][:, c]|`` (definitions.md, 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share


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
        if isinstance(scale, Tensor):
            rows = rows * scale.abs().amax(1)
        else:
            rows = rows * abs(scale)
        slack = 1.0 + (share.left.shape[1] + 16) * torch.finfo(share.dtype).eps
        return cls(_host(rows), _host(columns), slack)

    def largest(self) -> np.ndarray:
        """Bound of the largest entry of every sample, shape (sample,)."""
        return np.asarray(self.rows.max(1) * self.columns.max(1) * self.slack)

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


def largest(share: Share, scale: float | Tensor, outer: OuterBounds | None) -> np.ndarray:
    """Return the size that a sample's largest shift can have, or has, for comparing samples; shape (sample,)."""
    if outer is not None:
        return outer.largest()
    factor = float(scale.abs().amax()) if isinstance(scale, Tensor) else abs(scale)
    if isinstance(share, DenseShare):
        return _host(share.values.flatten(1).abs().amax(1).float()) * factor
    return np.zeros(share.n_samples)


def _host(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
