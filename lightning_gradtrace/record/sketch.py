"""Sketch: random projections of the shifts, from which inner products of any two occurrences can be estimated."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.shares import OuterShare, RowShare
from lightning_gradtrace.record._base import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record._parts import scaled_factors, shift_blocks
from lightning_gradtrace.record.projection import Projection
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.transfer import HostCopies
from lightning_gradtrace.store.schema import ArraySpec, escape


class Sketch(Record):
    """Keeps a two-sided random projection of every occurrence's shift, parameter by parameter (docs/concepts.md, 4).

    The sketch of a shift ``s`` of shape (out, in) is ``P s Q^T``, with random signs ``P`` (p x out) and ``Q`` (q x in),
    divided by the square roots of p and q; ``p q <= dim``. Of an outer product ``d^T a`` it is ``(d P^T)^T (a Q^T)``:
    ``g`` is never formed. Where an optimizer scales every weight on its own (Adam), the shift is no product any more;
    it is then written out in blocks of bounded size, and the outcome is the same projection of the exact shift.

    Inner products are unbiased, ``E <sketch_i, sketch_j> = <s_i, s_j>`` over the draw of the signs, with

        Var <sketch_i, sketch_j>  <=  ((1 + 2/p) (1 + 2/q) - 1) |s_i|^2 |s_j|^2

    for every parameter; a side that is as long as the parameter's is not projected, and its factor is 1. The root of
    the factor before the norms is the attribute ``relative_error`` of each array. One-sided projections by signs are
    those of Achlioptas, "Database-friendly random projections", J. Comput. Syst. Sci. 66 (2003); docs/concepts.md, 4,
    derives the two-sided bound.

    The signs depend on ``seed`` and the parameter's name alone: runs, resumed runs and ranks with the same seed can be
    compared with each other.

    Arrays: ``sketch/<param>/shift`` (occurrence, dim), row-major (p, q); zero where the loss did not reach a parameter.

    Args:
        dim: largest number of values per occurrence and parameter, at least 1. Parameters with at most ``dim`` weights
            are kept exactly.
        seed: of the signs.
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: an argument is out of range.

    Example::

        >>> Sketch(256)
        Sketch(dim=256, seed=0)
    """

    def __init__(self, dim: int = 1024, seed: int = 0, schedule: Any = None) -> None:
        self.dim = dim
        self.seed = seed
        self.schedule = as_schedule("Sketch", schedule)
        self._projections: dict[str, Projection] = {}
        for name, value, least in (("dim", dim, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`Sketch({name}={value!r})`: expected a whole number, at least {least}")

    @property
    @override
    def group(self) -> str:
        return "sketch"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        self._projections = {p.name: Projection.of(p.name, p.shape, self.dim, self.seed) for p in parameters}
        return [self._spec(info, self._projections[info.name]) for info in parameters]

    @staticmethod
    def _spec(info: ParameterInfo, projection: Projection) -> ArraySpec:
        path, dims = f"sketch/{escape(info.name)}/shift", ("occurrence", f"{info.name}.dim")
        meaning = f"random projection of the shift of {info.name}"
        attrs = projection.describe()
        return ArraySpec(path, dims, (projection.dim,), info.dtype, meaning, codec="float", attrs=attrs)

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        rows = {}
        with HostCopies() as host:
            for parameter in step.parameters:
                projection = self._projections[parameter.info.name]
                out = np.zeros((step.n_occurrences, projection.dim), parameter.info.dtype)
                for micro_batch, occurrences in enumerate(step.micro_batches):
                    if parameter.shares[micro_batch] is not None:
                        found = sketch(parameter, micro_batch, projection).flatten(1)
                        host.put(found, functools.partial(out.__setitem__, occurrences))
                rows[f"sketch/{escape(parameter.info.name)}/shift"] = out
        return rows


def sketch(parameter: ParameterShifts, micro_batch: int, projection: Projection) -> Tensor:
    """Project the shifts of a micro-batch.

    Args:
        parameter: the parameter.
        micro_batch: one whose loss reached it.
        projection: of the parameter.

    Returns:
        Shape (sample, p, q).
    """
    found = None if projection.folded else scaled_factors(parameter, micro_batch)
    if found is not None and all(factors.order is None for factors in found[1]):
        number = found[0]
        projected = [_project_factors(factors.part, projection) for factors in found[1]]
        return torch.stack(projected).sum(0) * number if len(projected) > 1 else projected[0] * number
    share = parameter.shares[micro_batch]
    assert share is not None
    total: Tensor | None = None
    for samples, rows, block in shift_blocks(parameter, micro_batch):
        if total is None:
            total = block.new_zeros(share.n_samples, projection.left, projection.right)
        if projection.folded:
            total[samples] += projection.apply(block)
        else:
            total[samples] += projection.apply_left(
                projection.apply_right(block.reshape(len(block), rows.stop - rows.start, -1)), rows
            )
    assert total is not None
    return total


def _project_factors(part: OuterShare | RowShare, projection: Projection) -> Tensor:
    """Return ``P g Q^T`` of outer products or looked-up rows without forming ``g``, shape (sample, p, q)."""
    if isinstance(part, RowShare):
        dtype = torch.promote_types(part.values.dtype, torch.float32)
        right = projection.apply_right(part.values.to(dtype))
        signs = projection.left_signs(right)
        if signs is None:
            return RowShare(part.rows, right, part.n_rows).dense()
        return torch.bmm(signs.T[part.rows].mT, right)
    left, right = part.left.to(part.dtype), projection.apply_right(part.right.to(part.dtype))
    signs = projection.left_signs(right)
    return torch.bmm((left if signs is None else left @ signs.T).mT, right)
