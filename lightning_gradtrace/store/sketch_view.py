"""The Sketch record: inner products of the shifts of any two occurrences, estimated."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from lightning_gradtrace.store.record_view import ByParameter, Rows, array_of, read_rows

_BLOCK = 2**24
"""Numbers of one parameter's sketches that are read at a time."""


class SketchView(ByParameter[np.ndarray]):
    """What a Sketch record kept: ``trace.sketch[name]`` is the array (row, dim) of one parameter.

    ``inner`` and ``similarity`` run over all tracked parameters, or over those that are named.
    """

    group = "sketch"

    @property
    def occurrence(self) -> np.ndarray:
        """Occurrence of every row, shape (rows,)."""
        return self._rows(next(iter(self))).labels if len(self) else np.empty(0, np.int64)

    @property
    def relative_error(self) -> float:
        """Bound of the standard deviation of ``inner(i, j)``, relative to ``|s[i]| |s[j]|`` (docs/concepts.md, 4)."""
        return max((float(self._attrs(name)["relative_error"]) for name in self), default=0.0)

    def vectors(self, occurrences: Any, params: Any = None) -> np.ndarray:
        """Return the sketches of occurrences, all parameters one after the other.

        Args:
            occurrences: numbers of occurrences.
            params: names of parameters; None for all.

        Returns:
            Shape (n, sum of the parameters' dims): inner products of its rows estimate those of the shifts.

        Raises:
            KeyError: if the record holds no such occurrence or parameter.
        """
        parts = [self._read(name, occurrences) for name in self._names(params)]
        return np.concatenate(parts, axis=1)

    def inner(self, a: Any, b: Any, params: Any = None) -> np.ndarray:
        """Estimate the inner products ``<s[i], s[j]>``, without bias.

        Args:
            a: number of an occurrence, or several.
            b: likewise.
            params: names of parameters; None for all.

        Returns:
            Shape (len(a), len(b)); axes of a single occurrence are left out. An estimate of ``<s[i], s[i]>`` is the
            squared norm.

        Raises:
            KeyError: if the record holds no such occurrence or parameter.
        """
        first, second = (np.atleast_1d(np.asarray(x, np.int64)) for x in (a, b))
        out = np.zeros((len(first), len(second)))
        for name in self._names(params):
            right = self._read(name, second).astype(np.float64)
            size = max(1, _BLOCK // max(1, right.shape[1]))
            for start in range(0, len(first), size):
                out[start : start + size] += self._read(name, first[start : start + size]).astype(np.float64) @ right.T
        return out.reshape(np.shape(a) + np.shape(b))

    def similarity(self, a: Any, b: Any, params: Any = None) -> np.ndarray:
        """Estimate the cosines between shifts; NaN where a sketch vanishes.

        Args:
            a: number of an occurrence, or several.
            b: likewise.
            params: names of parameters; None for all.

        Returns:
            Shape (len(a), len(b)); axes of a single occurrence are left out.

        Raises:
            KeyError: if the record holds no such occurrence or parameter.
        """
        lengths = [
            np.linalg.norm(self.vectors(x, params).astype(np.float64), axis=1).reshape(np.shape(x)) for x in (a, b)
        ]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.inner(a, b, params) / np.multiply.outer(*lengths))

    def _names(self, params: Any) -> list[str]:
        names = list(self) if params is None else [params] if isinstance(params, str) else list(params)
        for name in names:
            self._trace.param(name)
        return names

    def _read(self, name: str, occurrences: Any) -> np.ndarray:
        return read_rows(array_of(self._trace, f"{self._path(name)}/shift"), self._rows(name).of(occurrences))

    def _rows(self, name: str) -> Rows:
        return Rows(self._trace, self._path(name))

    def _attrs(self, name: str) -> dict[str, Any]:
        return dict(array_of(self._trace, f"{self._path(name)}/shift").attrs)

    @override
    def _of(self, name: str) -> np.ndarray:
        return self._read(name, self._rows(name).labels)
