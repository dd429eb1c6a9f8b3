"""Rows of one array on their way to the disk: whole chunks go out as they fill, the tail waits in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_gradtrace.store.codecs import ChunkEncoder, array_document
from lightning_gradtrace.store.schema import ArraySpec
from lightning_gradtrace.store.target import Put


class ArrayBuffer:
    """Append-only array of a trace, with the chunk that is being filled.

    Chunks are handed out as objects to put. What the store says about the array's length is `document`, which the
    commit puts after them. A chunk that was committed half full is replaced by the same rows and more. Chunks of
    padding are written like others: a chunk that is missing is then one that was lost.

    Args:
        spec: declaration, with all lengths known; the second axis of a growing array counts as the chunk's width.
    """

    def __init__(self, spec: ArraySpec) -> None:
        self.spec = spec
        self.n_rows = 0
        self._tail = (0, *spec.shape_tail[1:]) if spec.grows else spec.shape_tail
        self._chunk_shape = spec.chunk_shape
        self._dtype = np.dtype(object if spec.dtype == "str" else spec.dtype)
        self._encoder = ChunkEncoder(spec)
        self._buffer: np.ndarray | None = None
        self._in_buffer = 0
        self._dirty = False

    @property
    def document(self) -> dict[str, Any]:
        """The array's ``zarr.json`` for the rows appended so far."""
        return array_document(self.spec, self.n_rows, self._tail)

    @property
    def width(self) -> int | None:
        """Number of columns so far, None if it doesn't grow."""
        return self._tail[0] if self.spec.grows else None

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """Number of chunks along every axis that hold rows appended so far."""
        shape = (self.n_rows, *self._tail)
        return tuple(-(-n // size) for n, size in zip(shape, self._chunk_shape, strict=True))

    def restore(self, n_rows: int, tail: tuple[int, ...], last: np.ndarray) -> None:
        """Go on where an earlier writer stood; nothing was appended so far.

        The chunk that was being filled counts as changed: the next commit puts it anew, without the rows after
        `n_rows` that the earlier writer may have put into it.

        Args:
            n_rows: rows of the array.
            tail: lengths of the other axes.
            last: rows of the chunk that is being filled, shape (m, *tail); none if the last chunk is full.
        """
        self.n_rows, self._tail = n_rows, tail
        if len(last):
            rows = self._widen(last) if self.spec.grows else last
            self._buffer = np.full((self._chunk_shape[0], *rows.shape[1:]), self.spec.fill_value, self._dtype)
            self._buffer[: len(rows)] = rows
            self._in_buffer = len(rows)
            self._dirty = True

    def append(self, rows: np.ndarray) -> Iterator[Put]:
        """Add rows.

        Args:
            rows: shape (n, *tail); a growing array takes any width.

        Yields:
            The chunks that got full.
        """
        if self.spec.grows:
            rows = self._widen(rows)
        chunk_rows = self._chunk_shape[0]
        at = 0
        while at < len(rows):
            if self._in_buffer == 0 and len(rows) - at >= chunk_rows:
                # Records of large rows pass without being copied.
                yield from self._chunks(self.n_rows, rows[at : at + chunk_rows])
                self.n_rows += chunk_rows
                at += chunk_rows
                continue
            if self._buffer is None:
                self._buffer = np.full((chunk_rows, *rows.shape[1:]), self.spec.fill_value, self._dtype)
            n = min(chunk_rows - self._in_buffer, len(rows) - at)
            self._buffer[self._in_buffer : self._in_buffer + n] = rows[at : at + n]
            self._in_buffer += n
            self.n_rows += n
            at += n
            self._dirty = True
            if self._in_buffer == chunk_rows:
                yield from self.tail()
                self._buffer.fill(self.spec.fill_value)
                self._in_buffer = 0

    def tail(self) -> Iterator[Put]:
        """Hand out the chunk that is being filled, if it has rows that were not handed out before.

        Yields:
            The chunk; several where one row is split.
        """
        if self._dirty and self._buffer is not None:
            yield from self._chunks(self.n_rows - self._in_buffer, self._buffer)
            self._dirty = False

    def _chunks(self, first: int, rows: np.ndarray) -> Iterator[Put]:
        """Split whole chunk rows along the other axes, pad what sticks out, and encode."""
        number = first // self._chunk_shape[0]
        width = self._chunk_shape[1:]
        counts = [-(-length // size) for length, size in zip(rows.shape[1:], width, strict=True)]
        for place in itertools.product(*(range(n) for n in counts)):
            part = rows[(slice(None), *(slice(i * n, (i + 1) * n) for i, n in zip(place, width, strict=True)))]
            if part.shape[1:] != width:
                whole = np.full(self._chunk_shape, self.spec.fill_value, self._dtype)
                whole[tuple(slice(0, n) for n in part.shape)] = part
                part = whole
            key = "/".join([self.spec.path, "c", str(number), *map(str, place)])
            yield key, self._encoder.encode(part)

    def _widen(self, rows: np.ndarray) -> np.ndarray:
        """Pad rows and buffer to the same number of whole chunks along the second axis."""
        self._tail = (max(self._tail[0], rows.shape[1]), *self._tail[1:])
        width = self._chunk_shape[1]
        wanted = max(width * math.ceil(rows.shape[1] / width), 0 if self._buffer is None else self._buffer.shape[1])
        if self._buffer is not None:
            self._buffer = _pad(self._buffer, wanted, self.spec.fill_value)
        return _pad(rows, wanted, self.spec.fill_value)


def _pad(rows: np.ndarray, width: int, fill: Any) -> np.ndarray:
    if rows.shape[1] == width:
        return rows
    padded = np.full((len(rows), width, *rows.shape[2:]), fill, rows.dtype)
    padded[:, : rows.shape[1]] = rows
    return padded
