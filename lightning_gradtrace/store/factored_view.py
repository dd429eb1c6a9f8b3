"""The Factored record: shifts rebuilt from inputs, cotangents and the scale of the step."""

from __future__ import annotations

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
        found = np.stack([self._shift(int(i)) for i in wanted]) if len(wanted) else np.empty((0, *self.shape))
        return found[0] if np.ndim(occurrence) == 0 else found

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
        step = self._step(occurrence)
        if self._row("factored_dense", occurrence) is not None:
            raise ValueError(
                f"the shift of `{self._name}` by occurrence {occurrence} was kept written out, where positions can't "
                "be told apart: it was smaller than its factors, or has none. Record with Factored(form='factors')"
            )
        parts = [np.empty((0, *self.shape), np.float32)]
        outer = self._outer(occurrence)
        if outer is not None:
            parts.append(self._in_order(outer[0][:, :, None] * outer[1][:, None, :]))
        looked_up = self._looked_up(occurrence)
        if looked_up is not None:
            row, value = looked_up
            part = np.zeros((len(row), *self.shape), value.dtype)
            part[np.arange(len(row)), row] = value
            parts.append(part)
        return self._scaled(np.concatenate(parts), step)

    def _shift(self, occurrence: int) -> np.ndarray:
        step = self._step(occurrence)
        written = self._row("factored_dense", occurrence)
        outer, looked_up = self._outer(occurrence), self._looked_up(occurrence)
        total = None if written is None else np.asarray(self._array("factored_dense", "shift")[written])
        if outer is not None or looked_up is not None:
            gradient: Any = 0
            if outer is not None:
                gradient = self._in_order((outer[0].T @ outer[1])[None])[0]
            if looked_up is not None:
                row, value = looked_up
                gradient = np.broadcast_to(gradient, self.shape).astype(value.dtype)
                np.add.at(gradient, row, value)
            shift = self._scaled(gradient, step)
            total = shift if total is None else total + shift
        return np.zeros(self.shape, np.float32) if total is None else total

    def _in_order(self, matrices: np.ndarray) -> np.ndarray:
        """See matrices (n, rows, columns) in the shape of the parameter, (n, *shape)."""
        attrs = self._array("factored", "input").attrs
        if "order" not in attrs:
            return matrices.reshape(-1, *self.shape)
        split = matrices.reshape(-1, *attrs["sizes"])
        return split.transpose(0, *(axis + 1 for axis in attrs["order"]))

    def _step(self, occurrence: int) -> int:
        """Return the step of an occurrence that the record holds."""
        steps = self._trace.occurrences["step"].to_numpy()
        known = Rows(self._trace, "factored_steps", "step")
        if not 0 <= occurrence < len(steps) or known.find(steps[[occurrence]])[0] < 0:
            raise KeyError(
                f"occurrence {occurrence} is not in the Factored record, which holds {len(known.labels)} steps of the "
                f"{len(steps)} occurrences' trace"
            )
        return int(steps[occurrence])

    def _outer(self, occurrence: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Cotangents (position, out) and inputs (position, in) of an occurrence."""
        row = self._row("factored", occurrence)
        if row is None:
            return None
        length = int(self._array("factored", "length")[row])
        left, right = (_wide(self._array("factored", name)[row])[:length] for name in ("cotangent", "input"))
        return left, right

    def _looked_up(self, occurrence: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows (position) and their cotangents (position, features) of an occurrence."""
        row = self._row("factored_rows", occurrence)
        if row is None:
            return None
        length = int(self._array("factored_rows", "length")[row])
        values = _wide(self._array("factored_rows", "value")[row])[:length]
        return np.asarray(self._array("factored_rows", "row")[row])[:length], values

    def _scaled(self, gradient: np.ndarray, step: int) -> np.ndarray:
        row = self._row("factored_scale", step, "step")
        if row is None:
            raise StoreError(f"`factored_scale` holds no scale of `{self._name}` at step {step}: the trace is damaged")
        number = self._array("factored_scale", "scale")[row]
        scaled = gradient * gradient.dtype.type(number)
        gain = self._row("factored_gain", step, "step")
        return scaled if gain is None else scaled * np.asarray(self._array("factored_gain", "gain")[gain])

    def _row(self, part: str, label: int, axis: str = "occurrence") -> int | None:
        """Return the row of a part, None if it has none."""
        if f"{part}/{escape(self._name)}" not in self._trace.group:
            return None
        row = int(self._rows(part, axis).find(np.array([label]))[0])
        return None if row < 0 else row

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
