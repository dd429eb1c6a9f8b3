"""How many bytes an array is going to take on disk, as far as that doesn't depend on its numbers."""

from __future__ import annotations

import math

import numpy as np

from lightning_gradtrace.store.codecs import ChunkEncoder
from lightning_gradtrace.store.schema import ArraySpec

_CHECKSUM_BYTES = 4
_INDEX_BYTES = 16


def uncompressed_bytes(spec: ArraySpec, n_rows: int) -> int:
    """Return the size of the chunks of an array of numbers that isn't compressed, padding and checksums included.

    Example:
        >>> uncompressed_bytes(ArraySpec("a/x", ("occurrence", "dim"), (10,), "float32", "", codec="none"), 100_000)
        4000004

    Args:
        spec: its declaration, all lengths known.
        n_rows: number of rows.
    """
    rows, *tail = spec.chunk_shape
    unit = spec.inner_rows or rows
    n_columns = math.prod(-(-n // size) for n, size in zip(spec.shape_tail, tail, strict=True))
    chunk = unit * math.prod(tail) * np.dtype(spec.dtype).itemsize + _CHECKSUM_BYTES
    index = 0 if spec.inner_rows is None else _INDEX_BYTES * (rows // unit) + _CHECKSUM_BYTES
    return n_columns * (-(-n_rows // unit) * chunk + -(-n_rows // rows) * index)


def padding_bytes(spec: ArraySpec, n_rows: int) -> int:
    """Return what the padding of the last chunk takes, compressed.

    Args:
        spec: declaration of an array, all lengths known.
        n_rows: number of rows.
    """
    unit = spec.inner_rows or spec.chunk_shape[0]
    missing = -n_rows % unit
    if not missing:
        return 0
    fill = np.full((unit, *spec.chunk_shape[1:]), spec.fill_value, object if spec.dtype == "str" else spec.dtype)
    return sum(map(len, ChunkEncoder(spec).encode(fill))) * missing // unit
