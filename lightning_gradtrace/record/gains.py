"""Gains: by what the optimizer multiplied gradients at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.record._base import ParameterInfo, Record, StepShifts
from lightning_gradtrace.store.schema import ArraySpec, escape


class Gains(Record):
    """Keeps the optimizer's own factor of every weight, step by step (docs/concepts.md, 3).

    The gain turns a clipped gradient into its shift: -lr for plain SGD, about -lr (1 - b1) / den for Adam.
    `lightning_gradtrace.analysis.eventual_shift` needs the later ones to say what Adam's memory made of a sample.

    Cost: one number per tracked weight and step, so track few parameters: ``GradTrace(params=...)``.

    Arrays: ``gains/<param>/gain`` (step, *shape), float64 if the parameter is; NaN at steps that did not move it.

    Example::

        >>> Gains()
        Gains()
    """

    def __init__(self) -> None:
        self._dtypes: dict[str, str] = {}

    def __repr__(self) -> str:
        return "Gains()"

    @property
    @override
    def group(self) -> str:
        return "gains"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        specs = []
        for p in parameters:
            dims = ("step", *(f"{p.name}.{axis}" for axis in range(len(p.shape))))
            meaning = f"factor from clipped gradients to shifts of {p.name}"
            specs.append(ArraySpec(gain_path(p.name), dims, p.shape, p.dtype, meaning, codec="float"))
            self._dtypes[p.name] = p.dtype
        return specs

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        rows = {}
        for p in step.parameters:
            gain = float("nan") if p.gain is None else p.gain
            values = gain.detach().cpu().double().numpy() if isinstance(gain, Tensor) else gain
            row = np.broadcast_to(np.asarray(values), p.info.shape)
            rows[gain_path(p.info.name)] = row[None].astype(self._dtypes[p.info.name])
        return rows


def gain_path(param: str) -> str:
    """Return the path of the array that holds a parameter's gains."""
    return f"gains/{escape(param)}/gain"
