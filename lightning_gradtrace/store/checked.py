"""A lazy array whose every read compares checksums and names what is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from lightning_gradtrace.store.reading import find_array, read_rows


class CheckedArray:
    """Committed rows of one array of a trace; nothing is read until it is indexed.

    It is indexed as NumPy indexes. Chunks of whole rows are read, then the other axes are cut.

    Args:
        group: root of the trace.
        path: path of the array.
        n_rows: number of committed rows; None for all.
    """

    def __init__(self, group: zarr.Group, path: str, n_rows: int | None = None) -> None:
        self._group, self._path = group, path
        array = find_array(group, path)
        self.shape: tuple[int, ...] = (array.shape[0] if n_rows is None else n_rows, *array.shape[1:])
        self.ndim = array.ndim
        self.dtype = np.dtype(array.dtype)
        self.chunks: tuple[int, ...] = array.shards or array.chunks
        self.dims: tuple[str, ...] = tuple(array.metadata.dimension_names or ())  # type: ignore[union-attr, arg-type]
        self.attrs: dict[str, Any] = dict(array.attrs)
        self.fill_value: Any = array.fill_value

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read rows.

        Raises:
            IndexError: if a row is beyond the committed ones.
            StoreError: if a chunk is missing or damaged; the message names it and its steps.
        """
        parts = key if isinstance(key, tuple) else (key,)
        if not parts or parts[0] is Ellipsis:
            parts = (slice(None), *parts)
        rows, rest = parts[0], parts[1:]
        chosen = np.arange(len(self))[rows]
        if not chosen.size:
            return np.empty((*chosen.shape, *self.shape[1:]), self.dtype)[(slice(None), *rest)]
        order = np.unique(chosen)
        runs = np.split(order, np.flatnonzero(np.diff(order) > 1) + 1)
        found = [self.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        joined = found[0] if len(found) == 1 else np.concatenate(found)
        if isinstance(rows, slice) and len(order) == len(joined) and (rows.step or 1) > 0:
            return joined[(slice(None), *rest)]
        at = np.searchsorted(order, chosen)
        return joined[at][rest] if not chosen.ndim else joined[at][(slice(None), *rest)]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read neighbouring rows, shape (stop - start, ...)."""
        return read_rows(self._group, self._path, start, stop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        return np.asarray(self[:], dtype)
