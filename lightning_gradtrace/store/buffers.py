"""Rows of one array on their way to the disk: whole chunks go out as they fill, the tail waits in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_gradtrace.store.chunk_keys import Place, chunk_key
from lightning_gradtrace.store.codecs import ChunkEncoder, array_document
from lightning_gradtrace.store.direct import Part
from lightning_gradtrace.store.schema import ArraySpec
from lightning_gradtrace.store.sharding import join_shard
from lightning_gradtrace.store.target import Put


class ArrayBuffer:
    """Append-only array of a trace, with the chunk that is being filled.

    Chunks are handed out as objects to put. What the store says about the array's length is `document`, which the
    commit puts after them. A chunk that was committed half full is replaced by the same rows and more. Chunks of
    padding are written like others: a chunk that is missing is then one that was lost.

    Of a sharded array inner chunks are encoded as they fill, and wait for their shard; one that is committed half full
    holds only those that have rows.

    Args:
        spec: declaration, with all lengths known; the second axis of a growing array counts as the chunk's width.
    """

    def __init__(self, spec: ArraySpec) -> None:
        self.spec = spec
        self.n_rows = 0
        self._tail = (0, *spec.shape_tail[1:]) if spec.grows else spec.shape_tail
        self._chunk_shape = spec.chunk_shape
        self._unit = spec.inner_rows or self._chunk_shape[0]
        self._dtype = np.dtype(object if spec.dtype == "str" else spec.dtype)
        self._encoder = ChunkEncoder(spec)
        self._shards: dict[Place, list[list[Part]]] = {}
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
        self.n_rows, self._tail = n_rows - len(last), tail
        list(self.append(last))  # which are too few to fill the chunk

    def append(self, rows: np.ndarray) -> Iterator[Put]:
        """Add rows.

        Args:
            rows: shape (n, *tail); a growing array takes any width.

        Yields:
            The chunks that got full.
        """
        if self.spec.grows:
            rows = self._widen(rows)
        at, waiting = 0, (self.n_rows + len(rows)) % self._chunk_shape[0]
        while at < len(rows):
            n = min(self._unit - self._in_buffer, len(rows) - at)
            part = rows[at : at + n]
            at += n
            self.n_rows += n
            self._dirty = self.n_rows % self._chunk_shape[0] != 0
            # Many rows at once pass without being copied.
            if n == self._unit:
                # Those that wait for the rest of their shard would keep the others in memory.
                keeps = self._encoder.borrows and at > len(rows) - waiting
                yield from self._encoded(part.copy() if keeps else part)
            elif self._collect(part) == self._unit:
                assert self._buffer is not None
                yield from self._encoded(self._buffer)
                self._in_buffer = 0
                if self._encoder.borrows:
                    self._buffer = None

    def tail(self) -> Iterator[Put]:
        """Hand out the chunk that is being filled, if it has rows that were not handed out before.

        Yields:
            The chunk; several where one row is split.
        """
        if not self._dirty:
            return
        self._dirty = False
        rest: dict[Place, list[Part]] = {}
        if self._buffer is not None and self._in_buffer:
            self._buffer[self._in_buffer :] = self.spec.fill_value
            rest = {place: self._encoder.encode(part) for place, part in self._parts(self._buffer)}
        if self.spec.inner_rows is None:
            yield from ((self._key(place), chunk) for place, chunk in rest.items())
            return
        for place in rest or self._shards:
            chunks = [*self._shards.get(place, ()), *([rest[place]] if rest else ())]
            yield self._key(place), join_shard(chunks, self._chunk_shape[0] // self._unit)

    def _collect(self, rows: np.ndarray) -> int:
        """Copy rows into the buffer; returns how many it holds now."""
        if self._buffer is None:
            self._buffer = np.empty((self._unit, *rows.shape[1:]), self._dtype)
        self._buffer[self._in_buffer : self._in_buffer + len(rows)] = rows
        self._in_buffer += len(rows)
        return self._in_buffer

    def _encoded(self, rows: np.ndarray) -> Iterator[Put]:
        """Encode what is encoded together, and hand out the chunks that are whole."""
        for place, part in self._parts(rows):
            encoded = self._encoder.encode(part)
            if self.spec.inner_rows is None:
                yield self._key(place), encoded
                continue
            shard = self._shards.setdefault(place, [])
            shard.append(encoded)
            if len(shard) * self._unit == self._chunk_shape[0]:
                yield self._key(place), join_shard(self._shards.pop(place), len(shard))

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[Place, np.ndarray]]:
        """Split rows along the other axes as chunks are, and pad what sticks out."""
        width = self._chunk_shape[1:]
        if rows.shape[1:] == width:
            yield (0,) * len(width), rows
            return
        counts = [-(-length // size) for length, size in zip(rows.shape[1:], width, strict=True)]
        for place in itertools.product(*(range(n) for n in counts)):
            part = rows[(slice(None), *(slice(i * n, (i + 1) * n) for i, n in zip(place, width, strict=True)))]
            if part.shape[1:] != width:
                whole = np.full((len(rows), *width), self.spec.fill_value, self._dtype)
                whole[tuple(slice(0, n) for n in part.shape)] = part
                part = whole
            yield place, part

    def _key(self, place: Place) -> str:
        """Key of the chunk that holds the last row."""
        number = (self.n_rows - 1) // self._chunk_shape[0]
        return chunk_key(self.spec.path, (number, *place))

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
