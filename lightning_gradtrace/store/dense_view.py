"""The Dense record: every shift of every occurrence, as lazy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from lightning_gradtrace.store.record_view import ByParameter, Rows, array_of, read_rows

if TYPE_CHECKING:
    import xarray as xr

    from lightning_gradtrace.store.reader import Trace


class DenseArray:
    """Shifts of one parameter, shape (occurrence, *shape); nothing is read before it is indexed.

    It has what dask and xarray ask of an array: ``shape``, ``dtype``, ``ndim``, basic indexing and conversion to NumPy.
    Row r belongs to occurrence ``occurrence[r]``.

    Args:
        trace: the trace.
        group: group of the parameter.
    """

    def __init__(self, trace: Trace, group: str) -> None:
        self._trace, self._group = trace, group
        self._array = array_of(trace, f"{group}/shift")
        self._rows = Rows(trace, group)

    def __repr__(self) -> str:
        """Name the array, its shape and its type."""
        return f"<DenseArray {self._group}: {self.shape} {self.dtype}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """Committed rows, and the shape of the parameter."""
        return (len(self._rows.labels), *self._array.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""
        return np.dtype(self._array.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes."""
        return self._array.dims

    @property
    def occurrence(self) -> np.ndarray:
        """Occurrence of every row, shape (rows,)."""
        return self._rows.labels

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read a part of the array: numbers, slices and an ellipsis, as in zarr's basic indexing."""
        return np.asarray(self._array[key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        return np.asarray(self[: len(self)], dtype)

    def shifts(self, occurrence: Any) -> np.ndarray:
        """Return the shifts of occurrences.

        Args:
            occurrence: number of one, or several.

        Returns:
            Shape of the parameter for one; (n, *shape) for several.

        Raises:
            KeyError: if the record holds no such occurrence.
        """
        found = read_rows(self._array, self._rows.of(occurrence))
        return found[0] if np.ndim(occurrence) == 0 else found

    def to_xarray(self) -> xr.DataArray:
        """Return the array as a DataArray with the coordinates of its occurrences; with dask it is read lazily."""
        node: Any = self._trace.to_xarray()[self._group]
        return node["shift"]


class DenseView(ByParameter[DenseArray]):
    """What a Dense record kept: ``trace.dense[name]`` is a `DenseArray`."""

    group = "dense"

    @override
    def _of(self, name: str) -> DenseArray:
        return DenseArray(self._trace, self._path(name))
