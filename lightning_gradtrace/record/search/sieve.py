"""Leaves out most entries of an outer product by forming it in bfloat16, with a bound on the error.

An entry ``g = sum over t of a[t] b[t]`` is formed in bfloat16 as ``p``: both factors are rounded to a unit roundoff of
``u = 2^-8``, products are added in float32, and the sum is rounded once more. With ``|a|`` and ``|b|`` the norms over
positions, by Cauchy-Schwarz

    |p|  >=  (1 - u) (|g| - eta |a| |b|),        1 + eta = (1 + u)^2 (1 + T w) (1 + 2^-20)

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, 3.1). ``w = 2^-22`` is four times float32's unit
roundoff, as some processors add with truncation. They also take what is below 2^-126 for zero, for which `_flushed` has
a term of its own. So an entry with ``|scale g| >= threshold`` has a ``|p|`` of at least

    (1 - u) (threshold / |scale| - eta |a| |b|).

What reaches that is a candidate whose shift has an error; those that are left at the end of a search are formed again
in float32. Where too much reaches it, the block goes through float32 as a whole: that is decided by numbers alone, so
that a resumed run does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.record.search.comparison import Found, memory, product_of

UNIT = 2.0**-8
# Forming one entry again takes as long as forming so many of a block in float32: with more, the block is formed.
AGAIN = 32
# With fewer positions forming an entry takes no longer than looking at it.
POSITIONS = 64
_ADDING = 2.0**-22
_FLUSHED = 2.0**-125
_ROOM = 2.0**-18  # for float32 arithmetic on limits
_LARGE, _SMALL = 2.0**120, 2.0**-100
_MAGNITUDE = np.uint16(0x7FFF)


def is_worth(positions: int) -> bool:
    """Say whether shares of so many positions are sieved."""
    return positions >= POSITIONS and is_fast()


@cache
def is_fast() -> bool:
    """Say whether this processor multiplies bfloat16 faster than float32, and adds the products in float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    able = any(getattr(torch.cpu, name, bool)() for name in names) and torch.backends.mkldnn.is_available()
    return able and _adds_in_float32()


def _adds_in_float32() -> bool:
    """Say whether a sum of small and large numbers comes out as in float32; in bfloat16 ones add up to 256 at most."""
    ones = torch.ones(1, 1024, 64, dtype=torch.bfloat16, device="cpu")
    return bool((torch.bmm(ones.transpose(1, 2), ones) == 1024).all())


def relative_error(positions: int) -> float:
    """Return ``eta``, to which the rounding of the float32 entry is added that is compared in the end."""
    adding = positions * _ADDING
    return (1 + UNIT) ** 2 * (1 + adding) * (1 + 2.0**-20) - 1 + adding


@dataclass
class Sieve:
    """The factors of some samples, divided by the samples' thresholds: every shift has to reach 1.

    Attributes:
        left: cotangents, shape (sample, position, row).
        right: inputs over threshold, shape (sample, position, column), bfloat16.
        rows: upper bounds of the rows' norms over positions, shape (sample, row).
        columns: likewise of the columns, over threshold.
        flushed: bound of what entries lose as it is below the smallest normal number, shape (sample,).
        threshold: the thresholds, shape (sample,).
        fit: samples whose numbers are finite and far from the ends of the range; of others the bounds are zero.
    """

    left: Tensor
    right: Tensor
    rows: np.ndarray
    columns: np.ndarray
    flushed: np.ndarray
    threshold: np.ndarray
    fit: np.ndarray

    @classmethod
    def of(
        cls, left: Tensor, right: Tensor, rows: np.ndarray, columns: np.ndarray, threshold: np.ndarray
    ) -> Sieve | None:
        """Copy the inputs of some samples; None if no sample is fit.

        Args:
            left: cotangents, shape (sample, position, row).
            right: inputs, shape (sample, position, column).
            rows: upper bounds of the rows' norms over positions, shape (sample, row); inf where they, or the row's
                scales, are not finite.
            columns: likewise, of the columns.
            threshold: what shifts have to reach, one per sample.
        """
        tallest, widest, positions = rows.max(1, initial=0), columns.max(1, initial=0), left.shape[1]
        with np.errstate(all="ignore"):
            fit = (threshold > _SMALL) & (threshold < 1 / _SMALL)
            for size in (tallest * widest, tallest * widest / threshold, widest / threshold):
                fit &= size < _LARGE
        if not fit.any():
            return None
        weights = np.where(fit, 1 / np.where(fit, threshold, 1), 0)
        divided = torch.empty(right.shape, dtype=torch.bfloat16, device="cpu")
        torch.mul(right, torch.from_numpy(weights.astype(np.float32))[:, None, None], out=divided)
        rows, columns = np.where(fit[:, None], rows, 0), np.where(fit[:, None], columns, 0) * weights[:, None]
        flushed = _FLUSHED * (2 * positions + positions**0.5 * (rows.max(1, initial=0) + columns.max(1, initial=0)))
        return cls(left, divided, rows, columns, flushed, threshold.copy(), fit)

    def __post_init__(self) -> None:
        self.eta = relative_error(self.left.shape[1])
        self._copied: tuple[slice, Tensor] | None = None

    def left_of(self, rows: slice) -> Tensor:
        """Return the cotangents of some rows in bfloat16; the last ones are kept for the next columns."""
        if self._copied is None or self._copied[0] != rows:
            part = self.left[:, :, rows]
            self._copied = rows, memory("cotangents", tuple(part.shape), torch.bfloat16).copy_(part)
        return self._copied[1]

    def block(self, rows: slice, columns: slice, scale: float | Tensor, threshold: np.ndarray) -> Block:
        """Prepare some rows and columns of all samples.

        Args:
            rows: which rows.
            columns: which columns.
            scale: by which entries are still to be multiplied: a number, or one for every row and column.
            threshold: one per sample, not below what it was when the inputs were copied.
        """
        wrong, widest = self.eta * self.rows[:, rows], self.columns[:, columns].max(1)
        risen = np.where(self.fit, threshold / self.threshold, np.inf) * (1 - _ROOM)
        if isinstance(scale, Tensor):
            lost = (wrong * widest[:, None] + self.flushed[:, None]).max(0)
            limit = _limits(scale, float(risen.min()), lost)
        else:
            with np.errstate(divide="ignore"):
                least = risen / abs(np.float64(scale)) - wrong.max(1) * widest - self.flushed
            least = torch.from_numpy(least.clip(0, 2 * _LARGE).astype(np.float32))
            limit = _bits(least.mul_(1 - 2 * UNIT).bfloat16())
        return Block(self, rows, columns, scale, limit)


def _limits(scale: Tensor, threshold: float, lost: np.ndarray) -> np.ndarray:
    """Return the limits of a block of which every entry has a scale, and every row an error."""
    limit = memory("limits", tuple(scale.shape), torch.float32)
    torch.reciprocal(scale, out=limit).abs_().mul_(threshold)
    limit.sub_(torch.from_numpy((lost * (1 + _ROOM)).astype(np.float32))[:, None]).clamp_(min=0)
    return _bits(limit.mul_(1 - 2 * UNIT).bfloat16())


def _bits(values: Tensor) -> np.ndarray:
    """Return bfloat16 numbers as numbers of 16 bits; without the sign, those have the same order."""
    return values.view(torch.int16).numpy().view(np.uint16)


@dataclass
class Block:
    """Some rows and columns of all samples.

    Attributes:
        sieve: all rows and columns.
        rows: which rows.
        columns: which columns.
        scale: see `Sieve.block`.
        limit: bits of what entries have to reach, shape (sample,) or (row, column); rounded to bfloat16 with a factor
            of (1 - 2 u), for this rounding and that of the entries.
    """

    sieve: Sieve
    rows: slice
    columns: slice
    scale: float | Tensor
    limit: np.ndarray

    def search(self, samples: slice) -> Found | None:
        """Find the entries of some samples that may reach the threshold.

        Args:
            samples: which samples.

        Returns:
            The entries, with bounds of their errors; None where the block is better formed in float32 as a whole.
        """
        sieve = self.sieve
        if not sieve.fit[samples].all():
            return None
        bits = _bits(product_of(sieve.left_of(self.rows)[samples], sieve.right[samples, :, self.columns]))
        limit = self.limit
        if not isinstance(self.scale, Tensor):
            limit = limit[samples, None, None] if len(bits) > 1 else limit[samples].item()
        above = memory("above", bits.shape, torch.bool).numpy()
        np.greater_equal(np.bitwise_and(bits, _MAGNITUDE, out=bits), limit, out=above)
        count = np.count_nonzero(above)
        if count * AGAIN > bits.size:
            return None
        place = np.flatnonzero(above) if count else np.empty(0, np.int64)
        sample, row, column = np.unravel_index(place, bits.shape)
        size = (bits.reshape(-1)[place].astype(np.uint32) << 16).view(np.float32)
        return self._with_errors(sample, row, column, size, sample + (samples.start or 0))

    def _with_errors(
        self, sample: np.ndarray, row: np.ndarray, column: np.ndarray, size: np.ndarray, of: np.ndarray
    ) -> Found:
        """Multiply sizes by what they were divided by, and bound their errors; ``of``: samples of the sieve."""
        sieve = self.sieve
        norms = sieve.rows[of, row + self.rows.start] * sieve.columns[of, column + self.columns.start]
        error = sieve.eta * norms + sieve.flushed[of] + 2 * UNIT * size
        scale = self.scale.numpy()[row, column] if isinstance(self.scale, Tensor) else self.scale
        factor = np.abs(scale) * sieve.threshold[of]
        return Found(sample, row, column, (size * factor).astype(np.float32), error * factor * (1 + _ROOM))
