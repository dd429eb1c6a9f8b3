"""Division: how shifts, carry and decay divide the change that a step made to every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.precision import double, sum_device
from lightning_gradtrace.record._base import ParameterInfo, Record, StepShifts
from lightning_gradtrace.record._parts import WORKSPACE
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.store.schema import ArraySpec, escape
from lightning_gradtrace.update.ledger import Entry

PARTS = ("weights", "shifts", "carry", "decay", "rest")
"""The weights before the step, the three parts of their change, and what these leave unexplained."""


class Division(Record):
    """Keeps all inner products between the weights and the parts of their change (docs/concepts.md, 3).

    The parts of a step are the sum of the shifts, carry and decay, and the rest that the ledger can't explain, so that
    together they are the whole change. Their Gram matrix, with the weights before the step as a fifth part, says how
    large each part is, how much of the change lies along it, and whether it makes the weights larger or smaller:
    `lightning_gradtrace.analysis.division` turns it into a table.

    With a basis, the same is kept for every component ``b W`` of a parameter: a frequency, a head, a neuron, or
    whatever rows b of a matrix over the parameter's first axis stand for.

    Cost: 200 bytes per step, parameter and component. The ledger is computed at every step of the record.

    Arrays: ``division/gram`` (step, param, part, other) and ``division/along/<param>/gram`` (step, component, part,
    other), float64; NaN at steps that did not move the parameter.

    Args:
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.
        bases: by parameter, a matrix (component, first axis); orthonormal rows make components add up to the whole.

    Raises:
        ValueError: ``schedule`` is none of these, or a basis is no matrix of finite numbers.

    Example::

        >>> Division(schedule=10)
        Division(schedule=EveryNSteps(n=10, first=0, width=1))
    """

    wants_ledger = True

    def __init__(self, schedule: Any = None, bases: Mapping[str, Any] | None = None) -> None:
        self.schedule = as_schedule("Division", schedule)
        self._bases = {str(name): _basis(name, basis) for name, basis in (bases or {}).items()}

    @property
    @override
    def group(self) -> str:
        return "division"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        shapes = {p.name: p.shape for p in parameters}
        for name, basis in self._bases.items():
            if not shapes.get(name) or shapes[name][0] != basis.shape[1]:
                found = f"has shape {shapes[name]}" if name in shapes else f"is not among {', '.join(shapes)}"
                raise ValueError(
                    f"`Division(bases=...)`: the basis for `{name}` has shape {tuple(basis.shape)}, and the parameter "
                    f"{found}; expected a tracked parameter whose first axis is as long as the basis has columns"
                )
        tail = (len(PARTS), len(PARTS))
        meaning = "inner products of " + ", ".join(PARTS)
        dims = ("step", "param", "part", "other")
        specs = [ArraySpec("division/gram", dims, (len(shapes), *tail), "float64", meaning, codec="float")]
        for name, basis in self._bases.items():
            dims = ("step", f"{name}.component", "part", "other")
            meaning = f"inner products of the components of {', '.join(PARTS)} of {name}"
            specs.append(ArraySpec(along_path(name), dims, (len(basis), *tail), "float64", meaning, codec="float"))
        return specs

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        column = {p.info.name: number for number, p in enumerate(step.parameters)}
        size = len(PARTS)
        rows = {along_path(n): np.full((1, len(b), size, size), np.nan) for n, b in self._bases.items()}
        rows["division/gram"] = whole = np.full((1, len(column), size, size), np.nan)
        for entry in step.ledger() if step.ledger is not None else ():
            basis = self._bases.get(entry.name)
            gram = torch.zeros(size, size, dtype=torch.float64, device=sum_device(entry.before.device))
            along = None if basis is None else gram.expand(len(basis), -1, -1).clone()
            for block in _blocks(entry):
                flat = block.flatten(1)
                gram += flat @ flat.T
                if basis is not None and along is not None:
                    components = torch.einsum("mr,prc->mpc", basis.to(block.device), block)
                    along += components @ components.mT
            whole[0, column[entry.name]] = gram.cpu().numpy()
            if along is not None:
                rows[along_path(entry.name)][0] = along.cpu().numpy()
        return rows

    @override
    def describe(self) -> dict[str, Any]:
        bases = {name: list(basis.shape) for name, basis in self._bases.items()}
        return {**super().describe(), "arguments": {"bases": bases} if bases else {}}


def along_path(param: str) -> str:
    """Return the path of the array that holds the inner products of a parameter's components."""
    return f"division/along/{escape(param)}/gram"


def _basis(name: str, basis: Any) -> Tensor:
    found = torch.as_tensor(basis, dtype=torch.float64, device="cpu").detach()
    if found.dim() != 2 or not found.numel() or not found.isfinite().all():
        raise ValueError(
            f"`Division(bases=...)`: the basis for `{name}` has shape {tuple(found.shape)}; expected a matrix "
            "(component, first axis) of finite numbers"
        )
    return found


def _blocks(entry: Entry) -> Iterator[Tensor]:
    """Yield the parts of a ledger's line in float64, shape (part, first axis, some of the other axes)."""
    shape, numel = entry.before.shape, entry.before.numel()
    rows = shape[0] if shape else 1
    columns = numel // max(1, rows)

    def matrix(tensor: Tensor, where: slice) -> Tensor:
        return double(tensor.reshape(rows, columns)[:, where])

    at_once = max(1, WORKSPACE // max(1, len(PARTS) * rows))
    for start in range(0, columns, at_once):
        where = slice(start, start + at_once)
        before, after = matrix(entry.before, where), matrix(entry.after, where)
        moved = (entry.shifts, entry.carry, entry.decay)
        parts = [torch.zeros_like(before) if part is None else matrix(part, where) for part in moved]
        yield torch.stack([before, *parts, after - before - sum(parts)])
