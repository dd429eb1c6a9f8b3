"""Shares multiplied by matrices, for optimizers whose step mixes the entries of a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.shares import OuterShare, Share


@dataclass
class MatrixShare(Share):
    """``left @ (factor * g[i]) @ right`` of a share that is no outer product, written out a few samples at a time.

    Attributes:
        inner: the share of g.
        factor: a number or a tensor that broadcasts with the parameter.
        left: shape (out, out), None for none.
        right: shape (in, in), None for none.
    """

    inner: Share
    factor: float | Tensor
    left: Tensor | None
    right: Tensor | None

    def __post_init__(self) -> None:
        self.shape = self.inner.shape

    @property
    @override
    def n_samples(self) -> int:
        return self.inner.n_samples

    @property
    @override
    def is_held(self) -> bool:
        return self.inner.is_held

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        return self._multiplied(self.inner.dense(samples) * self.factor)

    @override
    def total(self) -> Tensor:
        return self._multiplied(self.inner.total() * self.factor)

    def _multiplied(self, values: Tensor) -> Tensor:
        values = values if self.left is None else self.left.to(values.dtype) @ values
        return values if self.right is None else values @ self.right.to(values.dtype)


def precondition(share: Share, factor: float | Tensor, left: Tensor | None, right: Tensor | None) -> Share:
    """Return ``left @ (factor * g[i]) @ right`` as a share; outer products stay outer products.

    ``left @ (d' a) @ right = (d left')' (a right)``: the factors are multiplied, nothing is written out, and selection
    can prune as before.

    Args:
        share: the share of g.
        factor: a number or a tensor that broadcasts with the parameter.
        left: shape (out, out), None for none.
        right: shape (in, in), None for none.

    Returns:
        The share.
    """
    if not isinstance(share, OuterShare) or isinstance(factor, Tensor):
        return MatrixShare(share, factor, left, right)
    d, a = share.left.to(share.dtype) * factor, share.right.to(share.dtype)
    d = d if left is None else d @ left.to(d.dtype).T
    return OuterShare(d, a if right is None else a @ right.to(a.dtype))
