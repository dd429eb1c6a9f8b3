"""Shares held as factors that are more than an outer product of two matrices' axes.

`OuterView` is an outer product whose entries stand in another order or shape than (row, column): a convolution's
(out, in, height, width), or (heads, d_model, d_head). `Contraction` is any product of factors, written out by an
einsum for as many samples at a time as the reader asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.shares._base import OuterShare, Share, accumulation_dtype

_SAMPLE = "Z"  # the letter of the samples; no other axis may have it


@dataclass
class OuterView(Share):
    """An outer product seen in the shape of the parameter: ``matrix.reshape(sizes).permute(order)``.

    Attributes:
        matrix: the outer product, of shape (rows, columns).
        sizes: sizes of the axes that make up the rows, then of those that make up the columns.
        order: the parameter's axes by their number in ``sizes``.
    """

    matrix: OuterShare
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        self.shape = torch.Size(self.sizes[axis] for axis in self.order)

    @property
    @override
    def n_samples(self) -> int:
        return self.matrix.n_samples

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        values = self.matrix.dense(samples)
        order = (0, *(axis + 1 for axis in self.order))
        return values.reshape(len(values), *self.sizes).permute(order)

    @override
    def total(self) -> Tensor:
        return self.matrix.total().reshape(self.sizes).permute(self.order)

    @override
    def by_position(self, sample: int) -> Tensor:
        values = self.matrix.by_position(sample)
        return values.reshape(len(values), *self.sizes).permute(0, *(axis + 1 for axis in self.order))

    def as_matrix(self, values: Tensor) -> Tensor:
        """Arrange a tensor of the parameter's shape as the matrix."""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return values.permute(inverse).reshape(self.matrix.shape)

    def index(self, place: np.ndarray) -> np.ndarray:
        """Return flat indices in the parameter for flat indices in the matrix."""
        axes = np.unravel_index(place, self.sizes)
        return np.ravel_multi_index(tuple(axes[axis] for axis in self.order), tuple(self.shape))

    def place(self, index: np.ndarray) -> np.ndarray:
        """Return flat indices in the matrix for flat indices in the parameter: the inverse of `index`."""
        axes = np.unravel_index(index, tuple(self.shape))
        return np.ravel_multi_index(tuple(axes[self.order.index(n)] for n in range(len(self.order))), self.sizes)


@dataclass
class Contraction(Share):
    """``g[i]`` is an einsum of the sample's slices of some factors; nothing is written out before it is read.

    Attributes:
        factors: tensors with the samples along axis 0.
        terms: einsum letters of every factor, without the samples; any but `Z`.
        result: letters of the parameter's axes.
        scale: a number that multiplies the product.
    """

    factors: tuple[Tensor, ...]
    terms: tuple[str, ...]
    result: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for factor, term in zip(self.factors, self.terms, strict=True):
            sizes.update(zip(term, factor.shape[1:], strict=True))
        self.shape = torch.Size(sizes[letter] for letter in self.result)

    @property
    @override
    def n_samples(self) -> int:
        return self.factors[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which products are formed."""
        dtype = torch.float32
        for factor in self.factors:
            dtype = torch.promote_types(dtype, accumulation_dtype(factor.dtype))
        return dtype

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        return self._product(samples, _SAMPLE + self.result)

    @override
    def total(self) -> Tensor:
        return self._product(slice(None), self.result)

    def _product(self, samples: slice, result: str) -> Tensor:
        factors = [factor[samples].to(self.dtype) for factor in self.factors]
        terms = ",".join(_SAMPLE + term for term in self.terms)
        product = torch.einsum(f"{terms}->{result}", factors)
        return product if self.scale == 1 else product.mul_(self.scale)
