"""Norms: how far every occurrence moved every parameter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.precision import double, sum_device, summable
from lightning_gradtrace.capture.shares import OuterShare, RowShare
from lightning_gradtrace.record._base import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record._parts import WORKSPACE, scaled_factors, shift_blocks
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.transfer import HostCopies
from lightning_gradtrace.store.schema import ArraySpec

Part = OuterShare | RowShare


class Norms(Record):
    """Keeps the Euclidean norm of every occurrence's shift, parameter by parameter (docs/concepts.md, 4).

    Of an outer product ``g = d^T a`` it is ``|g|^2 = sum over t, u of (d_t . d_u)(a_t . a_u)``, from Gram matrices of
    positions, without forming ``g`` (Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799, for
    one position). They are taken in float64, since terms may cancel. Where an optimizer scales every weight on its own
    (Adam), and where sequences are long, shifts are written out in blocks of bounded size instead. Norms that are not
    finite are kept as they are.

    Arrays: ``norms/norm`` (occurrence, param), zero where the loss did not reach a parameter; float64 if any
    parameter is.

    Args:
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: ``schedule`` is none of these.

    Example::

        >>> Norms()
        Norms()
    """

    def __init__(self, schedule: Any = None) -> None:
        self.schedule = as_schedule("Norms", schedule)
        self._dtype = "float32"

    @property
    @override
    def group(self) -> str:
        return "norms"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        self._dtype = "float64" if any(p.dtype == "float64" for p in parameters) else "float32"
        meaning = "Euclidean norm of the shift of a parameter"
        return [
            ArraySpec("norms/norm", ("occurrence", "param"), (len(parameters),), self._dtype, meaning, codec="float")
        ]

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        norms = np.zeros((step.n_occurrences, len(step.parameters)), self._dtype)
        with HostCopies() as host:
            for column, parameter in enumerate(step.parameters):
                for micro_batch, occurrences in enumerate(step.micro_batches):
                    if parameter.shares[micro_batch] is not None:
                        found = squared_norms(parameter, micro_batch).sqrt()
                        host.put(found, functools.partial(norms.__setitem__, (occurrences, column)))
        return {"norms/norm": norms}


def squared_norms(parameter: ParameterShifts, micro_batch: int) -> Tensor:
    """Return the squared norm of every sample's shift, shape (sample,), float64.

    Args:
        parameter: the parameter.
        micro_batch: one whose loss reached it.
    """
    found = scaled_factors(parameter, micro_batch)
    if found is not None and all(factors.order == found[1][0].order for factors in found[1]):
        number, parts = found[0], [factors.part for factors in found[1]]
        positions = sum(factors.positions for factors in found[1])
        # Of these two ways the cheaper one; look-ups are never written out.
        looked_up = any(isinstance(part, RowShare) for part in parts)
        if looked_up or positions * sum(parts[0].shape) <= parameter.info.numel:
            return _gram(parts, positions) * number**2
    share = parameter.shares[micro_batch]
    assert share is not None
    total: Tensor | None = None
    for samples, _, block in shift_blocks(parameter, micro_batch):
        if total is None:
            total = torch.zeros(share.n_samples, dtype=torch.float64, device=sum_device(block.device))
        total[samples] += double(block.reshape(len(block), -1)).square().sum(1)
    assert total is not None
    return total


def _gram(parts: Sequence[Part], positions: int) -> Tensor:
    """Sum the products of Gram matrices over all pairs of parts, a few samples at a time."""
    n = parts[0].n_samples
    size = max(1, WORKSPACE // max(1, positions**2))
    sums = []
    for start in range(0, n, size):
        some = [_wide(part, slice(start, start + size)) for part in parts]
        total = torch.zeros(len(_values(some[0])), dtype=torch.float64, device=_values(some[0]).device)
        for i, a in enumerate(some):
            for j, b in enumerate(some[: i + 1]):
                total += (_left(a, b) * torch.bmm(_values(a), _values(b).mT)).sum((1, 2)) * (1 if i == j else 2)
        sums.append(total)
    return torch.cat(sums).clamp(min=0)


def _wide(part: Part, samples: slice) -> Part:
    if isinstance(part, OuterShare):
        return OuterShare(double(part.left[samples]), double(part.right[samples]))
    return RowShare(summable(part.rows[samples]), double(part.values[samples]), part.n_rows)


def _values(part: Part) -> Tensor:
    """What stands along the parameter's second axis, shape (sample, position, features)."""
    return part.right if isinstance(part, OuterShare) else part.values


def _left(a: Part, b: Part) -> Tensor:
    """Inner products along the parameter's first axis, shape (sample, positions of a, positions of b)."""
    if isinstance(a, OuterShare) and isinstance(b, OuterShare):
        return torch.bmm(a.left, b.left.mT)
    if isinstance(a, RowShare) and isinstance(b, RowShare):
        return (a.rows[:, :, None] == b.rows[:, None, :]).double()
    if isinstance(a, OuterShare) and isinstance(b, RowShare):
        return a.left.gather(2, b.rows[:, None, :].expand(-1, a.left.shape[1], -1))
    return _left(b, a).mT
