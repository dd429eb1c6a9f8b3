"""Rows of one array on their way to the disk: whole chunks go out as they fill, the tail waits in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.core.array_spec import ArrayConfig
from zarr.storage import StorePath

from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.schema import ArraySpec

_CAPACITY = 2**40


class ArrayBuffer:
    """Append-only array of a trace, with the chunk that is being filled.

    What the store says about the array's length is `document`, and the commit decides when it is written: chunks are put
    first. A chunk that was committed half full is replaced by the same rows and more.

    Args:
        store: where the chunks go.
        spec: declaration, with all lengths known; the second axis of a growing array counts as the chunk's width.
        grows: whether the second axis grows with the widest row.
    """

    def __init__(self, store: Store, spec: ArraySpec, *, grows: bool = False) -> None:
        self.spec = spec
        self.n_rows = 0
        self._grows = grows
        self._tail = (0,) if grows else spec.shape_tail
        self._chunk_rows = spec.chunk_shape[0]
        self._dtype = np.dtypes.StringDType() if spec.dtype == "str" else np.dtype(spec.dtype)
        self._buffer: np.ndarray | None = None
        self._in_buffer = 0
        self._dirty = False
        # zarr checks selections against the shape, so chunks are written through an array of boundless length that is
        # never itself written down. Chunks that hold padding only are written too: a missing chunk is then a lost one.
        capacity = array_document(spec, _CAPACITY, (_CAPACITY,) if grows else spec.shape_tail)
        self._array: AsyncArray[Any] = AsyncArray(
            metadata=capacity,
            store_path=StorePath(store, spec.path),
            config=ArrayConfig(order="C", write_empty_chunks=True),
        )

    @property
    def document(self) -> dict[str, Any]:
        """The array's ``zarr.json`` for the rows appended so far."""
        return array_document(self.spec, self.n_rows, self._tail)

    @property
    def nbytes(self) -> int:
        """Memory that the buffer holds."""
        return 0 if self._buffer is None else self._buffer.nbytes

    async def append(self, rows: np.ndarray) -> None:
        """Add rows; every chunk that gets full is written."""
        if self._grows:
            rows = self._widen(rows)
        at = 0
        while at < len(rows):
            if self._in_buffer == 0 and len(rows) - at >= self._chunk_rows:
                await self._put(self.n_rows, rows[at : at + self._chunk_rows])
                self.n_rows += self._chunk_rows
                at += self._chunk_rows
                continue
            if self._buffer is None:
                self._buffer = np.full((self._chunk_rows, *rows.shape[1:]), self.spec.fill_value, self._dtype)
            n = min(self._chunk_rows - self._in_buffer, len(rows) - at)
            self._buffer[self._in_buffer : self._in_buffer + n] = rows[at : at + n]
            self._in_buffer += n
            self.n_rows += n
            at += n
            self._dirty = True
            if self._in_buffer == self._chunk_rows:
                await self.put_tail()
                self._buffer.fill(self.spec.fill_value)
                self._in_buffer = 0

    async def put_tail(self) -> None:
        """Write the chunk that is being filled, if it has rows that are not in the store."""
        if self._dirty and self._buffer is not None:
            await self._put(self.n_rows - self._in_buffer, self._buffer)
            self._dirty = False

    async def _put(self, first: int, chunk: np.ndarray) -> None:
        selection = (slice(first, first + len(chunk)), *(slice(0, n) for n in chunk.shape[1:]))
        await self._array.setitem(selection, chunk)

    def _widen(self, rows: np.ndarray) -> np.ndarray:
        self._tail = (max(self._tail[0], rows.shape[1]),)
        width = self.spec.chunk_shape[1]
        wanted = max(width * math.ceil(rows.shape[1] / width), 0 if self._buffer is None else self._buffer.shape[1])
        if self._buffer is not None and self._buffer.shape[1] < wanted:
            self._buffer = _pad(self._buffer, wanted, self.spec.fill_value)
        return _pad(rows, wanted, self.spec.fill_value)


def _pad(rows: np.ndarray, width: int, fill: Any) -> np.ndarray:
    if rows.shape[1] == width:
        return rows
    padded = np.full((len(rows), width), fill, rows.dtype)
    padded[:, : rows.shape[1]] = rows
    return padded
