"""The Factored record: shifts rebuilt from inputs, cotangents and the scale of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from lightning_gradtrace.store.checked import CheckedArray
from lightning_gradtrace.store.record_view import ByParameter, Rows, array_of
from lightning_gradtrace.store.schema import escape
from lightning_gradtrace.store.target import StoreError

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


class FactoredParameter:
    """What a Factored record kept of one parameter (docs/store-format.md, "Factored shifts").

    Args:
        trace: the trace.
        name: the parameter.
    """

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace, self._name = trace, name
        self.shape = tuple(trace.param(name)["shape"])

    @property
    def occurrence(self) -> np.ndarray:
        """Occurrences of the record, shape (n,), whether or not they moved this parameter."""
        kept = Rows(self._trace, "factored_steps", "step").labels
        return np.flatnonzero(np.isin(self._trace.occurrences["step"].to_numpy(), kept))

    def shifts(self, occurrence: Any) -> np.ndarray:
        """Rebuild the shifts of occurrences, exactly: equal to what was computed in the training up to rounding.

        Args:
            occurrence: number of one, or several.

        Returns:
            Shape of the parameter for one; (n, *shape) for several. Zero where the loss did not reach the parameter.

        Raises:
            KeyError: if the record holds no such occurrence.
        """
        wanted = np.atleast_1d(np.asarray(occurrence, np.int64))
        steps = self._steps(wanted)
        parts = [*self._products(wanted), *self._look_ups(wanted)]
        place, rows = self._find("factored_dense", wanted)
        written = [(place, self._read("factored_dense", "shift", rows))] if len(place) else []
        kinds = [values.dtype for _, values in (*parts, *written)]
        found = np.zeros((len(wanted), *self.shape), np.result_type(*kinds) if kinds else np.float32)
        for place, values in parts:
            found[place] += values
        if parts:
            self._scale(found, steps, np.unique(np.concatenate([place for place, _ in parts])))
        for place, values in written:
            found[place] += values
        return found[0] if np.ndim(occurrence) == 0 else found

    def inner(self, occurrence: Any, directions: np.ndarray) -> np.ndarray:
        """Return the inner products of shifts with directions, without writing the shifts out where they have factors.

        Args:
            occurrence: numbers of occurrences.
            directions: shape (m, *shape of the parameter).

        Returns:
            ``<s[i], D>``, shape (n, m), float64.

        Raises:
            KeyError: if the record holds no such occurrence.
        """
        wanted = np.atleast_1d(np.asarray(occurrence, np.int64))
        steps, aims = self._steps(wanted), np.asarray(directions, np.float64)
        found = np.zeros((len(wanted), len(aims)))
        place, rows = self._find("factored_dense", wanted)
        if len(place):
            written = self._read("factored_dense", "shift", rows)
            found[place] += written.reshape(len(place), -1) @ aims.reshape(len(aims), -1).T
        for step in np.unique(steps):
            here = np.flatnonzero(steps == step)
            outer, looked_up = (self._find(part, wanted[here]) for part in ("factored", "factored_rows"))
            if not len(outer[0]) and not len(looked_up[0]):
                continue
            scaled = aims.copy()  # <scale * g, D> = <g, scale * D>
            self._scale(scaled, np.full(len(scaled), step), np.arange(len(scaled)))
            if len(outer[0]):
                left, right = (self._read("factored", name, outer[1]) for name in ("cotangent", "input"))
                for number, matrix in enumerate(self._as_matrices(scaled)):
                    found[here[outer[0]], number] += ((left @ matrix) * right).sum((1, 2))
            if len(looked_up[0]):
                row, value = (self._read("factored_rows", name, looked_up[1]) for name in ("row", "value"))
                for number, aim in enumerate(scaled):
                    found[here[looked_up[0]], number] += (aim[row] * value).sum((1, 2))
        return found

    def by_position(self, occurrence: int) -> np.ndarray:
        """Split the shift of one occurrence by the position of use; the parts add up to `shifts`.

        Where a parameter is used several times, the positions of its uses follow each other; those of look-ups come
        last. This is the part of the shift that flows through a position, not the gradient of the loss of a token
        (docs/concepts.md, 4).

        Args:
            occurrence: its number.

        Returns:
            Shape (position, *shape).

        Raises:
            KeyError: if the record holds no such occurrence.
            ValueError: if this occurrence was kept as a written-out shift, which has no positions.
        """
        wanted = np.array([occurrence])
        step = self._steps(wanted)
        if len(self._find("factored_dense", wanted)[0]):
            raise ValueError(
                f"the shift of `{self._name}` by occurrence {occurrence} was kept written out, where positions can't "
                "be told apart: it was smaller than its factors, or has none. Record with Factored(form='factors')"
            )
        parts = [np.empty((0, *self.shape), np.float32)]
        _, rows = self._find("factored", wanted)
        if len(rows):
            length = int(self._read("factored", "length", rows)[0])
            left, right = (self._read("factored", name, rows)[0, :length] for name in ("cotangent", "input"))
            parts.append(self._in_order(left[:, :, None] * right[:, None, :]))
        _, rows = self._find("factored_rows", wanted)
        if len(rows):
            length = int(self._read("factored_rows", "length", rows)[0])
            row, value = (self._read("factored_rows", name, rows)[0, :length] for name in ("row", "value"))
            part = np.zeros((len(row), *self.shape), value.dtype)
            part[np.arange(len(row)), row] = value
            parts.append(part)
        found = np.concatenate(parts)
        self._scale(found, np.repeat(step, len(found)), np.arange(len(found)))
        return found

    def _products(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield which of the wanted occurrences have factors, and their products (n, *shape)."""
        place, rows = self._find("factored", wanted)
        if len(place):  # padding is zero in both factors
            left, right = (self._read("factored", name, rows) for name in ("cotangent", "input"))
            yield place, self._in_order(np.swapaxes(left, 1, 2) @ right)

    def _look_ups(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield which of the wanted occurrences looked rows up, and what that moved, (n, *shape)."""
        place, rows = self._find("factored_rows", wanted)
        if len(place):
            row, value = (self._read("factored_rows", name, rows) for name in ("row", "value"))
            part = np.zeros((len(place), *self.shape), value.dtype)
            np.add.at(part, (np.arange(len(place))[:, None], row), value)
            yield place, part

    def _in_order(self, matrices: np.ndarray) -> np.ndarray:
        """See matrices (n, rows, columns) in the shape of the parameter, (n, *shape)."""
        attrs = self._array("factored", "input").attrs
        if "order" not in attrs:
            return matrices.reshape(-1, *self.shape)
        split = matrices.reshape(-1, *attrs["sizes"])
        return split.transpose(0, *(axis + 1 for axis in attrs["order"]))

    def _as_matrices(self, values: np.ndarray) -> np.ndarray:
        """See values in the shape of the parameter (n, *shape) as the matrices of `_in_order`."""
        attrs = self._array("factored", "input").attrs
        if "order" not in attrs:
            return values.reshape(len(values), self.shape[0], -1)
        split = values.transpose(0, *(1 + axis for axis in np.argsort(attrs["order"])))
        size = self._array("factored", "cotangent").shape[-1]
        return split.reshape(len(values), size, -1)

    def _steps(self, wanted: np.ndarray) -> np.ndarray:
        """Return the steps of occurrences that the record holds."""
        steps = self._trace.occurrences["step"].to_numpy()
        known = Rows(self._trace, "factored_steps", "step")
        inside = (wanted >= 0) & (wanted < len(steps))
        inside[inside] = known.find(steps[wanted[inside]]) >= 0
        if not inside.all():
            raise KeyError(
                f"occurrence {wanted[~inside][0]} is not in the Factored record, which holds {len(known.labels)} steps "
                f"of the {len(steps)} occurrences' trace"
            )
        return steps[wanted]

    def _scale(self, gradient: np.ndarray, steps: np.ndarray, place: np.ndarray) -> None:
        """Turn gradients (n, *shape) at some places into shifts."""
        for step in np.unique(steps[place]):
            here = place[steps[place] == step]
            label = np.array([step])
            _, row = self._find("factored_scale", label, "step")
            if not len(row):
                raise StoreError(
                    f"`factored_scale` holds no scale of `{self._name}` at step {step}: the trace is damaged"
                )
            number = self._read("factored_scale", "scale", row)[0]
            gradient[here] *= gradient.dtype.type(number)
            _, row = self._find("factored_gain", label, "step")
            if len(row):
                gradient[here] *= self._read("factored_gain", "gain", row)[0]

    def _find(self, part: str, labels: np.ndarray, axis: str = "occurrence") -> tuple[np.ndarray, np.ndarray]:
        """Return which of some occurrences or steps have a row in a part, and these rows."""
        if not self._trace.has(f"{part}/{escape(self._name)}"):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rows = self._rows(part, axis).find(labels)
        place = np.flatnonzero(rows >= 0)
        return place, rows[place]

    def _read(self, part: str, name: str, rows: np.ndarray) -> np.ndarray:
        return _wide(self._array(part, name)[rows])

    def _rows(self, part: str, axis: str = "occurrence") -> Rows:
        key = f"_rows_{part}"
        if key not in self.__dict__:
            self.__dict__[key] = Rows(self._trace, f"{part}/{escape(self._name)}", axis)
        rows: Rows = self.__dict__[key]
        return rows

    def _array(self, part: str, name: str) -> CheckedArray:
        return array_of(self._trace, f"{part}/{escape(self._name)}/{name}")


def _wide(values: Any) -> np.ndarray:
    """Return factors in the type in which products are formed: float32 or wider."""
    found = np.asarray(values)
    return found.astype(np.float32) if found.dtype == np.float16 else found


class FactoredView(ByParameter[FactoredParameter]):
    """What a Factored record kept: ``trace.factored[name]`` is a `FactoredParameter`."""

    group = "factored"

    @override
    def _of(self, name: str) -> FactoredParameter:
        return FactoredParameter(self._trace, name)
