"""The arrays of a trace, as zarr reads them and as this package does."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import numpy as np
import zarr
from zarr.abc.store import Store

from lightning_gradtrace.store.checked import CheckedArray
from lightning_gradtrace.store.opening import damaged, open_store
from lightning_gradtrace.store.reading import read_rows
from lightning_gradtrace.store.schema import AXES, WEIGHT_STEP_SPEC
from lightning_gradtrace.store.target import StoreError, Target, describe


class TraceArrays:
    """A trace without its meaning: attributes and arrays.

    Args:
        target: path, URL (fsspec) or zarr Store.

    Raises:
        StoreError: if there is no trace, one of a newer format, or one with damaged metadata.
    """

    def __init__(self, target: Target) -> None:
        self._name = describe(target)
        self._store, _ = open_store(target)
        try:
            self._group = zarr.open_group(self._store, mode="r", zarr_format=3)
        except Exception as error:  # whatever zarr makes of it
            raise StoreError(damaged(self._name, error)) from error
        # Of the same document as the arrays: a writer may have replaced the one that was looked at first.
        self._attrs: dict[str, Any] = dict(self._group.attrs)

    @cached_property
    def _committed(self) -> dict[str, int]:
        return {str(name): int(n) for name, n in self._attrs["committed"].items()}

    @property
    def attrs(self) -> dict[str, Any]:
        """Root attributes: versions, model, optimizer, config, complete, ..."""
        return dict(self._attrs)

    @property
    def committed(self) -> dict[str, int]:
        """Committed rows of every axis."""
        return dict(self._committed)

    @property
    def store(self) -> Store:
        """The zarr store that holds the trace."""
        return self._store

    @property
    def group(self) -> zarr.Group:
        """The root group, for reading with zarr."""
        return self._group

    def has(self, path: str) -> bool:
        """Say whether the trace holds an array or a group."""
        return path in self._group

    def groups(self) -> list[str]:
        """Return the names of the groups below the root."""
        return sorted(self._group.group_keys())

    def array(self, path: str) -> zarr.Array:
        """Give access to any array, lazily, as zarr reads it.

        Args:
            path: such as "topk/shift".

        Returns:
            The array; rows that aren't committed are not part of it.

        Raises:
            KeyError: if the trace has no such array.
            StoreError: if it must have it: rows of its group are committed.
        """
        if not self.has(path):
            if self._says_where(path):
                raise StoreError(
                    f"`{self._name}` is damaged: `{path}` is missing, although rows of its group are committed"
                )
            raise KeyError(f"`{self._name}` holds no array `{path}`; it holds: {', '.join(self.groups())}")
        return cast(zarr.Array, self._group[path])

    def _says_where(self, path: str) -> bool:
        """Say whether an array lists the steps or occurrences of committed rows, so that nobody can do without it."""
        group, _, name = path.rpartition("/")
        if path == WEIGHT_STEP_SPEC.path:
            return self._committed["snapshot"] > 0
        return name in AXES and group not in AXES and self._committed.get(group, 0) > 0

    def checked(self, path: str) -> CheckedArray:
        """Give access to the committed rows of any array, lazily; every read compares checksums and names lost chunks.

        Args:
            path: such as "topk/shift".

        Returns:
            The array.

        Raises:
            KeyError: if the trace has no such array.
        """
        self.array(path)
        return CheckedArray(self._group, path, self.committed_rows(path))

    def read(self, path: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read committed rows of any array into memory; every checksum is compared.

        Args:
            path: such as "topk/shift".
            start: first row.
            stop: row after the last one; None reads to the last committed one.

        Returns:
            Shape (stop - start, ...).

        Raises:
            KeyError: if the trace has no such array.
            StoreError: if a chunk is missing or damaged; the message names it and its steps.
        """
        return read_rows(self._group, path, start, self.committed_rows(path) if stop is None else stop)

    def committed_rows(self, path: str) -> int | None:
        """Return the number of committed rows of an array, None for tables that are written once, such as params."""
        group = path.rpartition("/")[0]
        if group in self._committed and group not in AXES:
            return self._committed[group]
        names = self.array(path).metadata.dimension_names or (None,)  # type: ignore[union-attr]
        return self._committed.get(str(names[0])) if names[0] in AXES else None
