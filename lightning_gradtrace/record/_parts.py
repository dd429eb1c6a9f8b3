"""Shares in parts that records can work on without writing them out, and shifts in blocks where they can't."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lightning_gradtrace.capture.shares import OuterShare, RowShare, Share, SumShare
from lightning_gradtrace.record._base import ParameterShifts

WORKSPACE = 1 << 20
"""Numbers that a block of shifts, or of Gram matrices, may hold; one row of one sample always fits."""


def flat_parts(share: Share) -> list[Share]:
    """Return the parts that a share is the sum of; a share that is no sum is its only part."""
    if not isinstance(share, SumShare):
        return [share]
    return [part for sub in share.parts for part in flat_parts(sub)]


def factored_parts(parameter: ParameterShifts, micro_batch: int) -> tuple[float, list[OuterShare | RowShare]] | None:
    """Return a number and factors whose products, summed and times the number, are the shifts.

    Args:
        parameter: the parameter.
        micro_batch: one whose loss reached it.

    Returns:
        None if a part is written out already, or if the scale differs between the weights of a factor's row.
    """
    share = parameter.shares[micro_batch]
    assert share is not None
    parts = flat_parts(share)
    number = scale_number(parameter)
    if number is None:
        # A gain per weight goes into the looked-up rows; into an outer product it doesn't.
        if not isinstance(parameter.scale, Tensor) or not all(type(part) is RowShare for part in parts):
            return None
        return 1.0, [replace(p, values=p.values * parameter.scale[p.rows]) for p in parts if isinstance(p, RowShare)]
    found = [part for part in parts if type(part) in (OuterShare, RowShare)]
    return (number, found) if len(found) == len(parts) else None  # type: ignore[return-value]


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
