"""Shares in parts that records can work on without writing them out, and shifts in blocks where they can't."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_gradtrace.capture.shares import OuterShare, RowShare, Share, SumShare
from lightning_gradtrace.capture.shares.contraction import OuterView
from lightning_gradtrace.capture.shares.convolution import ConvolutionShare
from lightning_gradtrace.record._base import ParameterShifts

WORKSPACE = 1 << 20
"""Numbers that a block of shifts, or of Gram matrices, may hold; one row of one sample always fits."""


Order = tuple[tuple[int, ...], tuple[int, ...]]
"""How a matrix is seen in the shape of the parameter: ``matrix.reshape(sizes).permute(order)``."""


@dataclass
class Factors:
    """One part of a share that is kept as factors.

    Attributes:
        part: outer products or looked-up rows, of the parameter seen as a matrix (first axis, everything else).
        order: sizes and order of the axes, where the outer product sees the parameter otherwise; else None.
    """

    part: OuterShare | RowShare
    order: Order | None = None

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.part.left.shape[1] if isinstance(self.part, OuterShare) else self.part.rows.shape[1]


def factors_of(share: Share) -> list[Factors] | None:
    """Return the factors that a share is the sum of; None if a part of it has none."""
    if isinstance(share, SumShare):
        parts = [factors_of(part) for part in share.parts]
        return None if any(part is None for part in parts) else [f for part in parts if part is not None for f in part]
    if type(share) in (OuterShare, RowShare):
        return [Factors(share)]  # type: ignore[arg-type]
    if type(share) is OuterView:
        ascending = share.order == tuple(range(len(share.order)))
        plain = ascending and share.matrix.shape[0] == share.shape[0]
        return [Factors(share.matrix, None if plain else (share.sizes, share.order))]
    if type(share) is ConvolutionShare and share.groups == 1:
        n_positions = share.left.shape[1] * share.left[0, 0, 0].numel()
        if n_positions * (share.shape[0] + share.shape[1:].numel()) < share.shape.numel():
            left, right = share.factors()
            return [Factors(OuterShare(left.mT, right.mT))]
    return None


def scaled_factors(parameter: ParameterShifts, micro_batch: int) -> tuple[float, list[Factors]] | None:
    """Return a number and factors whose products, summed and times the number, are the shifts.

    Args:
        parameter: the parameter.
        micro_batch: one whose loss reached it.

    Returns:
        None if a part is written out already, or if the scale differs between weights and can't go into the factors.
    """
    share = parameter.shares[micro_batch]
    assert share is not None
    parts = factors_of(share)
    number = scale_number(parameter)
    if parts is None or number is not None:
        return None if parts is None or number is None else (number, parts)
    # A scale for every weight goes into looked-up rows; into an outer product it doesn't.
    rows = [factors.part for factors in parts if isinstance(factors.part, RowShare)]
    if len(rows) < len(parts) or not isinstance(parameter.scale, Tensor):
        return None
    return 1.0, [Factors(replace(part, values=part.values * parameter.scale[part.rows])) for part in rows]


def scale_number(parameter: ParameterShifts) -> float | None:
    """Return the scale of a parameter's step if it is one number for all weights, else None."""
    scale = parameter.scale
    if isinstance(scale, Tensor):
        return float(scale) if scale.dim() == 0 else None
    return float(scale)


def shift_blocks(parameter: ParameterShifts, micro_batch: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Write out the shifts of a micro-batch block by block, in bounded memory.

    Args:
        parameter: the parameter.
        micro_batch: one whose loss reached it.

    Yields:
        Samples, rows of the parameter's first axis, and the shifts there, shape (samples, rows, *rest). Only outer
        products are split by rows; other shares come with whole samples.
    """
    share = parameter.shares[micro_batch]
    assert share is not None
    numel, n_rows = parameter.info.numel, parameter.info.shape[0] if parameter.info.shape else 1
    for start in range(0, share.n_samples, max(1, WORKSPACE // max(1, numel))):
        samples = slice(start, min(share.n_samples, start + max(1, WORKSPACE // max(1, numel))))
        if type(share) is not OuterShare or numel <= WORKSPACE:
            yield samples, slice(0, n_rows), parameter.shifts(micro_batch, samples)
            continue
        height = max(1, WORKSPACE * n_rows // numel)
        for first in range(0, n_rows, height):
            rows = slice(first, min(n_rows, first + height))
            block = OuterShare(share.left[samples, :, rows], share.right[samples]).dense()
            scale = (
                parameter.scale[rows]
                if isinstance(parameter.scale, Tensor) and parameter.scale.dim()
                else parameter.scale
            )
            yield samples, rows, block * scale
