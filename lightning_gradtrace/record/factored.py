"""Factored: inputs and cotangents, from which every shift can be rebuilt."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.shares import OuterShare, RowShare
from lightning_gradtrace.record._base import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record._parts import Factors, Order, factors_of, scale_number
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.transfer import HostCopies
from lightning_gradtrace.store.schema import COLUMN_ROWS, ArraySpec, coordinate_spec, escape, with_own_rows

Rows = dict[str, list[np.ndarray]]


class Factored(Record):
    """Keeps what the shifts are made of: inputs, cotangents and the scale of the step (docs/concepts.md, 4).

    The shift of a linear use is ``s[i] = scale d[i]^T a[i]``. With T positions its factors are T (out + in) numbers
    instead of out * in, and nothing is lost: ``trace.factored[name].shifts(occurrence)`` is exact. Look-ups keep row
    numbers and cotangents. Of every parameter and micro-batch the smaller form is kept, factors or the shifts
    themselves; the latter too where a shift has no factors (biases, norms, the general rule). The scale is a number
    for SGD. For Adam and others that scale every weight on its own it is a tensor, kept once per step.

    Arrays, all with rows of their own: ``factored/<param>/input`` and ``cotangent`` (occurrence, position, features),
    padded with zeros, and ``length``; ``factored_rows/<param>/row``, ``value`` and ``length``;
    ``factored_dense/<param>/shift``; ``factored_scale/<param>/scale`` (step); ``factored_gain/<param>/gain``
    (step, *shape). docs/store-format.md, "Factored shifts", says how they go together.

    Args:
        form: "auto" keeps the smaller form, "factors" keeps factors wherever there are any.
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: an argument is out of range.

    Example::

        >>> Factored()
        Factored(form='auto')
    """

    def __init__(self, form: Literal["auto", "factors"] = "auto", schedule: Any = None) -> None:
        self.form = form
        self.schedule = as_schedule("Factored", schedule)
        self._declared: dict[str, ArraySpec] = {}
        self._orders: dict[str, Order | None] = {}
        self._kept: _Kept | None = None
        if form not in ("auto", "factors"):
            raise ValueError(f"`Factored(form={form!r})`: expected one of `auto`, `factors`")

    @property
    @override
    def group(self) -> str:
        return "factored"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        self._declared, self._orders = {}, {}
        # Says which steps the record holds, also of parameters that no sample moved.
        return [coordinate_spec("factored_steps", "step")]

    @override
    def later_specs(self, step: StepShifts) -> list[ArraySpec]:
        self._kept = self._keep(step)
        new = {path: spec for path, spec in self._kept.specs.items() if path not in self._declared}
        self._declared |= new
        return list(new.values())

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError("`Factored.reduce` was called before `Factored.later_specs`, which declares its arrays")
        rows = {"factored_steps/step": np.array([step.number])}
        for path, parts in kept.rows.items():
            spec = self._declared[path]
            joined = _join(parts, spec)
            rows[path] = joined + first_occurrence if spec.name == "occurrence" else joined
        return rows

    def planned(self, info: ParameterInfo, n_positions: int | None, gains: bool) -> list[ArraySpec]:
        """Declare what a parameter's arrays are going to be, for `lightning_gradtrace.record.plan`.

        Args:
            info: the parameter.
            n_positions: positions of a sample; None for the largest form.
            gains: whether the scale is going to be a tensor.
        """
        name, float_type = escape(info.name), info.dtype
        factored = (
            [
                ArraySpec(
                    f"factored/{name}/{part}",
                    ("occurrence", "position", part),
                    (n_positions or 1, n),
                    float_type,
                    "",
                    codec="float",
                )
                for part, n in (("input", info.numel // max(1, info.shape[0])), ("cotangent", info.shape[0]))
            ]
            if len(info.shape) > 1
            else []
        )
        numbers = sum(math.prod(spec.shape_tail) for spec in factored)
        if n_positions is None or not factored or (numbers >= info.numel and self.form == "auto"):
            dims = ("occurrence", *map(str, range(len(info.shape))))
            return with_own_rows(
                [ArraySpec(f"factored_dense/{name}/shift", dims, info.shape, float_type, "", codec="float")]
            )
        lengths = ArraySpec(f"factored/{name}/length", ("occurrence",), (), "int32", "", chunk_rows=COLUMN_ROWS)
        scale_path = f"factored_scale/{name}/scale"
        scale = [
            lengths,
            ArraySpec(scale_path, ("step",), (), "float64", "", codec="float", chunk_rows=COLUMN_ROWS),
        ]
        if gains:
            dims = ("step", *map(str, range(len(info.shape))))
            scale.append(ArraySpec(f"factored_gain/{name}/gain", dims, info.shape, float_type, "", codec="float"))
        return with_own_rows([*factored, *scale])

    def _keep(self, step: StepShifts) -> _Kept:
        with HostCopies() as host:
            kept = _Kept(step.number, host)
            self._collect(step, kept)
        return kept

    def _collect(self, step: StepShifts, kept: _Kept) -> None:
        for parameter in step.parameters:
            scaled = False
            for micro_batch, occurrences in enumerate(step.micro_batches):
                if parameter.shares[micro_batch] is None:
                    continue
                numbers = np.arange(occurrences.start, occurrences.stop)
                parts = self._factors(parameter, micro_batch)
                if parts is None:
                    kept.dense(parameter, numbers, parameter.shifts(micro_batch))
                    continue
                scaled = True
                for factors in parts:
                    if isinstance(factors.part, OuterShare):
                        kept.outer(parameter, numbers, factors.part, factors.order)
                    else:
                        kept.looked_up(parameter, numbers, factors.part)
            if scaled:
                kept.scale(parameter)

    def _factors(self, parameter: ParameterShifts, micro_batch: int) -> list[Factors] | None:
        """Return the factors of a share, at most one of each form, if they are to be kept."""
        share = parameter.shares[micro_batch]
        assert share is not None
        parts = factors_of(share)
        if parts is None:
            return None
        outer = [factors.part for factors in parts if isinstance(factors.part, OuterShare)]
        rows = [factors.part for factors in parts if isinstance(factors.part, RowShare)]
        orders = {factors.order for factors in parts if isinstance(factors.part, OuterShare)}
        # One parameter is kept in one order: that of its first use.
        name = parameter.info.name
        if outer and (len(orders) > 1 or orders != {self._orders.setdefault(name, next(iter(orders)))}):
            return None
        joined = [Factors(OuterShare.merge(outer), *orders)] if outer else []
        if rows:
            looked_up = torch.cat([part.rows for part in rows], 1), torch.cat([part.values for part in rows], 1)
            joined.append(Factors(RowShare(*looked_up, rows[0].n_rows)))
        n_samples, numel = share.n_samples, parameter.info.numel
        size = sum(_numbers(factors.part) for factors in joined)
        size += 0 if scale_number(parameter) is not None else numel
        return joined if self.form == "factors" or size < n_samples * numel else None


def _numbers(part: OuterShare | RowShare) -> int:
    if isinstance(part, OuterShare):
        return part.left.numel() + part.right.numel()
    return part.rows.numel() * 2 + part.values.numel()


@dataclass
class _Kept:
    """Arrays of one step as they come together, and their declarations.

    Attributes:
        number: number of the step.
        host: brings tensors to the host, after which they are among the rows.
        specs: declarations by path.
        rows: parts of the rows by path.
    """

    number: int
    host: HostCopies
    specs: dict[str, ArraySpec] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)

    def outer(self, parameter: ParameterShifts, numbers: np.ndarray, share: OuterShare, order: Order | None) -> None:
        name = parameter.info.name
        attrs = {} if order is None else {"sizes": list(order[0]), "order": list(order[1])}
        self._list("factored", parameter, numbers)
        self._positions("factored", parameter, "input", share.right, f"inputs of the uses of {name}", attrs)
        self._positions("factored", parameter, "cotangent", share.left, f"cotangents of the uses of {name}", attrs)
        self._lengths("factored", parameter, numbers, share.left.shape[1])

    def looked_up(self, parameter: ParameterShifts, numbers: np.ndarray, share: RowShare) -> None:
        name = parameter.info.name
        self._list("factored_rows", parameter, numbers)
        self._positions("factored_rows", parameter, "row", share.rows, f"rows of {name} that were looked up")
        self._positions(
            "factored_rows", parameter, "value", share.values, f"cotangents of the looked-up rows of {name}"
        )
        self._lengths("factored_rows", parameter, numbers, share.rows.shape[1])

    def dense(self, parameter: ParameterShifts, numbers: np.ndarray, shifts: Tensor) -> None:
        self._list("factored_dense", parameter, numbers)
        dims = ("occurrence", *(f"{parameter.info.name}.{axis}" for axis in range(shifts.dim() - 1)))
        self._put("factored_dense", parameter, "shift", dims, shifts, f"shift of {parameter.info.name}")

    def scale(self, parameter: ParameterShifts) -> None:
        number, name = scale_number(parameter), parameter.info.name
        self._list("factored_scale", parameter, np.array([self.number]), "step")
        values = np.array([1.0 if number is None else number])
        meaning = f"number from products of factors to shifts of {name}"
        self._add("factored_scale", parameter, "scale", ("step",), values, meaning)
        if isinstance(parameter.scale, Tensor) and number is None:
            self._list("factored_gain", parameter, np.array([self.number]), "step")
            dims = ("step", *(f"{name}.{axis}" for axis in range(parameter.scale.dim())))
            gain = parameter.scale.expand(parameter.info.shape)[None]
            self._put("factored_gain", parameter, "gain", dims, gain, f"further factor for every weight of {name}")

    def _list(self, group: str, parameter: ParameterShifts, numbers: np.ndarray, axis: str = "occurrence") -> None:
        spec = coordinate_spec(f"{group}/{escape(parameter.info.name)}", axis)
        self.specs[spec.path] = spec
        self.rows.setdefault(spec.path, []).append(numbers)

    def _lengths(self, group: str, parameter: ParameterShifts, numbers: np.ndarray, length: int) -> None:
        values = np.full(len(numbers), length, np.int32)
        self._add(group, parameter, "length", ("occurrence",), values, "number of positions, the rest is padding")

    def _positions(
        self,
        group: str,
        parameter: ParameterShifts,
        name: str,
        values: Tensor,
        meaning: str,
        attrs: dict[str, Any] | None = None,
    ) -> None:
        features = (f"{parameter.info.name}.{name}",) if values.dim() == 3 else ()
        position = f"{parameter.info.name}.position"
        self._put(group, parameter, name, ("occurrence", position, *features), values, meaning, attrs)

    def _put(
        self,
        group: str,
        parameter: ParameterShifts,
        name: str,
        dims: tuple[str, ...],
        values: Tensor,
        meaning: str,
        attrs: dict[str, Any] | None = None,
    ) -> None:
        kept = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bfloat16
        add = functools.partial(self._add, group, parameter, name, dims, meaning=meaning, attrs=attrs)
        self.host.put(kept, add)

    def _add(
        self,
        group: str,
        parameter: ParameterShifts,
        name: str,
        dims: tuple[str, ...],
        values: np.ndarray,
        meaning: str,
        attrs: dict[str, Any] | None = None,
    ) -> None:
        path = f"{group}/{escape(parameter.info.name)}/{name}"
        grows = name in ("input", "cotangent", "row", "value")
        spec = ArraySpec(
            path,
            dims,
            values.shape[1:],
            values.dtype.name,
            meaning,
            codec="float" if values.dtype.kind == "f" else "plain",
            chunk_rows=COLUMN_ROWS if values.ndim == 1 else None,
            own_rows=True,
            grows=grows,
            fill=0 if grows else None,
            attrs=attrs or {},
        )
        self.specs.setdefault(path, spec)
        self.rows.setdefault(path, []).append(values)


def _join(parts: list[np.ndarray], spec: ArraySpec) -> np.ndarray:
    """Put the rows of all micro-batches below each other, padded to the same number of positions.

    Raises:
        ValueError: if the numbers don't fit into the declared type without loss.
    """
    if spec.grows:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(p, [(0, 0), (0, width - p.shape[1]), *[(0, 0)] * (p.ndim - 2)]) for p in parts]
    joined = np.concatenate(parts)
    if not np.can_cast(joined.dtype, spec.dtype, "safe"):
        raise ValueError(
            f"`{spec.path}` was {spec.dtype} at the first recorded step and is {joined.dtype} now; Factored keeps "
            "factors exactly, so their precision may not grow during a run"
        )
    return joined.astype(spec.dtype, copy=False)
