"""Two-sided random sign projections, drawn from a seed and a name alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Projection:
    """``s -> P s Q^T`` for one parameter, whose shape is taken as (rows, columns).

    Attributes:
        name: the parameter.
        seed: of the signs.
        rows: length of the parameter's first axis; of a folded vector, its number of rows.
        columns: everything else.
        left: rows of P; P is the identity if this is ``rows``.
        right: rows of Q; Q is the identity if this is ``columns``.
        folded: whether the parameter is a vector that was folded to (rows, columns), padded with zeros.
    """

    name: str
    seed: int
    rows: int
    columns: int
    left: int
    right: int
    folded: bool = False
    _signs: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dim: int, seed: int) -> Projection:
        """Choose the sides for a parameter so that the bound of the variance is least.

        Args:
            name: the parameter.
            shape: its shape.
            dim: largest product of the sides.
            seed: of the signs.
        """
        numel = math.prod(shape)
        rows = shape[0] if shape else 1
        columns = numel // max(1, rows)
        # Vectors, and matrices that are all but vectors, are folded: P and Q then stay small.
        folded = min(rows, columns) == 1 and numel > dim
        if folded:
            columns = math.isqrt(numel - 1) + 1
            rows = -(-numel // columns)
        sides = [(p, min(columns, dim // p)) for p in range(1, min(rows, dim) + 1)]
        left, right = min(
            sides, key=lambda side: (_variance(side[0], side[1], rows, columns), -side[0] * side[1], side)
        )
        return cls(name, seed, rows, columns, left, right, folded)

    @property
    def dim(self) -> int:
        """Number of values of a sketch."""
        return self.left * self.right

    @property
    def relative_error(self) -> float:
        """Bound of the standard deviation of an inner product, relative to the norms of the two shifts."""
        return math.sqrt(_variance(self.left, self.right, self.rows, self.columns))

    def describe(self) -> dict[str, Any]:
        """Return what is needed to make the projection again, for the attributes of its array."""
        return {
            "projection": "signs",
            "seed": self.seed,
            "matrix": [self.rows, self.columns],
            "sides": [self.left, self.right],
            "relative_error": self.relative_error,
        }

    def left_signs(self, like: Tensor) -> Tensor | None:
        """Return P, shape (left, rows), in the type and place of a tensor; None for the identity."""
        return self._matrix("left", self.left, self.rows, like)

    def apply_right(self, values: Tensor) -> Tensor:
        """Multiply by Q^T: (..., columns) -> (..., right)."""
        signs = self._matrix("right", self.right, self.columns, values)
        return values if signs is None else values @ signs.T

    def apply_left(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Multiply some rows of shifts by the columns of P that belong to them: (n, rows, q) -> (n, left, q)."""
        signs = self.left_signs(values)
        if signs is not None:
            return signs[:, rows] @ values
        out = values.new_zeros(values.shape[0], self.rows, values.shape[2])
        out[:, rows] = values
        return out

    def apply(self, values: Tensor) -> Tensor:
        """Project whole shifts: (n, *shape) -> (n, left, right)."""
        flat = values.reshape(len(values), -1)
        whole = flat.new_zeros(len(flat), self.rows * self.columns)
        whole[:, : flat.shape[1]] = flat
        return self.apply_left(self.apply_right(whole.view(-1, self.rows, self.columns)))

    def _matrix(self, side: str, n: int, length: int, like: Tensor) -> Tensor | None:
        if n == length:
            return None
        key = (side, like.dtype, like.device)
        if key not in self._signs:
            made = torch.from_numpy(signs(f"{self.seed}/{self.name}/{side}", n, length) / math.sqrt(n))
            self._signs[key] = made.to(like)
        return self._signs[key]


def signs(key: str, n: int, length: int) -> np.ndarray:
    """Draw random signs: the bits of SHAKE-128 of the key, least significant first, row by row; 1 is +1, 0 is -1.

    Args:
        key: any text.
        n: number of rows.
        length: of a row.

    Returns:
        Shape (n, length), float64.

    Example::

        >>> signs("0/weight/left", 2, 4).tolist()
        [[-1.0, -1.0, -1.0, 1.0], [1.0, -1.0, -1.0, -1.0]]
    """
    data = hashlib.shake_128(key.encode()).digest(-(-n * length // 8))
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: n * length]
    return bits.reshape(n, length).astype(np.float64) * 2 - 1


def _variance(left: int, right: int, rows: int, columns: int) -> float:
    """Bound of the variance of an inner product, relative to the squared norms; 0 without projection."""
    return (1 if left == rows else 1 + 2 / left) * (1 if right == columns else 1 + 2 / right) - 1
