"""Shards: many small chunks, each of which can be read alone, in one object (Zarr 3, codec ``sharding_indexed``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c
import numpy as np

_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def shard_document(inner_shape: tuple[int, ...], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the codec of a sharded array, as it stands in ``zarr.json``.

    Args:
        inner_shape: shape of an inner chunk; divides the shape of a shard.
        codecs: the codecs of the inner chunks.

    Returns:
        The document; the index stands at the end of a shard.
    """
    configuration = {
        "chunk_shape": list(inner_shape),
        "codecs": codecs,
        "index_codecs": _INDEX_CODECS,
        "index_location": "end",
    }
    return {"name": "sharding_indexed", "configuration": configuration}


def inner_chunks(shard: np.ndarray, inner_shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the inner chunks of a shard in the order of its index."""
    counts = [n // size for n, size in zip(shard.shape, inner_shape, strict=True)]
    for place in itertools.product(*(range(n) for n in counts)):
        yield shard[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, inner_shape, strict=True))]


def join_shard(chunks: Iterable[bytes]) -> bytes:
    """Join encoded inner chunks and append the index: offset and length of each, and a checksum of them."""
    parts, index, offset = [], [], 0
    for chunk in chunks:
        index.append((offset, len(chunk)))
        parts.append(chunk)
        offset += len(chunk)
    return b"".join([*parts, with_checksum(np.array(index, "<u8").tobytes())])


def with_checksum(data: bytes) -> bytes:
    """Append the crc32c of some bytes, as the codec ``crc32c`` does."""
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")
