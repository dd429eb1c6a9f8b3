"""Rows of one optimizer step: checked on the training thread, so that a mistake shows where it was made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_gradtrace.store.schema import OCCURRENCE_SPECS, PARAM_SPECS, STEP_SPECS, ArraySpec


class StepRows:
    """Turns what is known of a step into one row or n rows of every array.

    Args:
        records: arrays of the records.
        n_groups: number of parameter groups of the optimizer.

    Raises:
        ValueError: if two arrays have the same path or one doesn't grow along "occurrence" or "step".
    """

    def __init__(self, records: Sequence[ArraySpec], n_groups: int) -> None:
        _check_specs(records, ())
        steps = [replace(s, shape_tail=(n_groups,)) if s.dims[1:] == ("group",) else s for s in STEP_SPECS]
        self._steps = {spec.name: spec for spec in steps}
        self._padding = {s.name: np.full((1, *s.shape_tail), s.fill_value, s.dtype) for s in steps}
        self._records = {spec.path: spec for spec in records}
        self._resumed: dict[str, ArraySpec] = {}
        self._last = -1

    @property
    def specs(self) -> list[ArraySpec]:
        """Arrays that steps add rows to."""
        return [*self._steps.values(), *OCCURRENCE_SPECS, *self._records.values()]

    def declare(self, records: Sequence[ArraySpec]) -> list[ArraySpec]:
        """Add arrays that only the data of a step could declare; they have rows of their own.

        Returns:
            Those that are new; others are known from the trace that is resumed.

        Raises:
            ValueError: if one is declared already, in another form if by a trace that is resumed, or has no rows of
                its own.
        """
        known = {spec.path: self._resumed.pop(spec.path) for spec in records if spec.path in self._resumed}
        for spec in records:
            before = known.get(spec.path)
            if before is not None and _form(before) != _form(spec):
                raise ValueError(f"`{spec.path}` was {_form(before)} before the trace was resumed, is {_form(spec)}")
        records = [spec for spec in records if spec.path not in known]
        _check_specs(records, self._records)
        shared = [spec.path for spec in records if not spec.own_rows]
        if shared:
            raise ValueError(f"{shared} were declared after the first step; expected arrays with rows of their own")
        self._records |= {spec.path: spec for spec in records}
        return records

    def continue_after(self, step: int, records: dict[str, ArraySpec]) -> None:
        """Expect steps after this one, the last of a trace that is resumed, and rows of arrays declared before it."""
        self._last = step
        self._resumed = dict(records)
        self._records |= records

    def of(
        self, step: dict[str, Any], occurrences: dict[str, np.ndarray], records: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], int]:
        """Check the parts of a step and put them together.

        Args:
            step: scalars by name.
            occurrences: arrays of n rows by name.
            records: rows by path.

        Returns:
            Rows by path, and the number of occurrences n.

        Raises:
            ValueError: if names, types or shapes don't fit.
        """
        if "step" not in step:
            raise ValueError(f"`step` has {list(step)}; expected at least `step`, the number of the optimizer step")
        number = int(step["step"])
        if number <= self._last:
            raise ValueError(f"step {number} was appended after step {self._last}; expected rising numbers")
        rows = self._occurrence_rows(number, occurrences)
        n = len(rows["occurrences/step"])
        rows |= self._step_rows(step, n)
        rows |= self._record_rows(records, n, number)
        self._last = number
        return rows, n

    def _occurrence_rows(self, number: int, occurrences: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in OCCURRENCE_SPECS]
        if not {"step", *occurrences} == set(names):
            raise ValueError(f"`occurrences` of step {number} has {list(occurrences)}; expected {names[1:]}")
        n = len(occurrences["sample_id"])
        rows = {}
        for spec in OCCURRENCE_SPECS:
            column = occurrences[spec.name] if spec.name in occurrences else np.full(n, number)
            column = np.asarray(column, spec.dtype)
            if column.shape != (n,):
                raise ValueError(f"`{spec.path}` of step {number} has shape {column.shape}; expected ({n},)")
            rows[spec.path] = column
        return rows

    def _step_rows(self, step: dict[str, Any], n: int) -> dict[str, np.ndarray]:
        unknown = [name for name in step if name not in self._steps]
        if unknown:
            raise ValueError(f"`step` has {unknown}; expected names out of {list(self._steps)}")
        rows = {spec.path: self._padding[name].copy() for name, spec in self._steps.items()}
        usual = {"half_precision": False, "nonfinite": 0, "skipped": False, "n_occurrences": n}
        for name, value in {**usual, **step}.items():
            spec = self._steps[name]
            if np.shape(value) not in ((), spec.shape_tail):
                raise ValueError(f"`{spec.path}` got shape {np.shape(value)}; expected {spec.shape_tail}")
            rows[spec.path][0] = value
        return rows

    def _record_rows(self, records: dict[str, np.ndarray], n: int, number: int) -> dict[str, np.ndarray]:
        # A group with rows of its own has all of its arrays at a step, or none.
        groups = {spec.group for path, spec in self._records.items() if spec.own_rows and path in records}
        wanted = [path for path, spec in self._records.items() if not spec.own_rows or spec.group in groups]
        if records.keys() != set(wanted):
            raise ValueError(f"`records` of step {number} has {sorted(records)}; expected {sorted(wanted)}")
        rows = {}
        for path in wanted:
            spec, array = self._records[path], np.asarray(records[path])
            rows_of_axis = n if spec.axis == "occurrence" else 1
            first = len(records[f"{spec.group}/{spec.axis}"]) if spec.own_rows else rows_of_axis
            expected = (first, *spec.shape_tail)
            found = (*array.shape[:1], spec.shape_tail[0], *array.shape[2:]) if spec.grows else array.shape
            if found != expected or array.dtype != spec.dtype or first > rows_of_axis:
                raise ValueError(
                    f"`{path}` of step {number} has shape {array.shape} and dtype {array.dtype}; "
                    f"expected {expected} and {spec.dtype}"
                )
            rows[path] = array
        return rows


def _form(spec: ArraySpec) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Return what must not change of an array that is declared again; the width of its chunks may."""
    return spec.dtype, spec.dims, spec.shape_tail[1:] if spec.grows else spec.shape_tail


def _check_specs(records: Sequence[ArraySpec], before: Iterable[str]) -> None:
    taken = {spec.path for spec in (*PARAM_SPECS, *STEP_SPECS, *OCCURRENCE_SPECS)} | set(before)
    listed = {spec.path for spec in records if spec.own_rows}
    for spec in records:
        if spec.axis not in ("occurrence", "step"):
            raise ValueError(f"`{spec.path}` grows along `{spec.axis}`; expected `occurrence` or `step`")
        if spec.path in taken:
            raise ValueError(f"`{spec.path}` is declared twice; expected one record for each array")
        if "/" not in spec.path or math.prod(spec.shape_tail) < 0:
            raise ValueError(
                f"`{spec.path}` of shape_tail {spec.shape_tail}; expected a path `group/name` and known lengths"
            )
        if spec.own_rows and f"{spec.group}/{spec.axis}" not in listed:
            raise ValueError(
                f"`{spec.path}` has rows of its own; expected `{spec.group}/{spec.axis}`, which lists them"
            )
        taken.add(spec.path)
