"""Shards: many small chunks, each of which can be read alone, in one object (Zarr 3, codec ``sharding_indexed``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np

from lightning_gradtrace.store.direct import Part

ABSENT = 2**64 - 1
"""Offset and length of an inner chunk that a shard doesn't hold."""

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


def join_shard(chunks: Sequence[list[Part]], n_chunks: int) -> list[Part]:
    """Append the index to encoded inner chunks: offset and length of each, and a checksum of them.

    Args:
        chunks: the first inner chunks of a shard, in parts.
        n_chunks: how many there are in a whole shard; the last ones are absent, which stands for padding.

    Returns:
        The shard in parts.
    """
    index = np.full((n_chunks, 2), ABSENT, "<u8")
    offset = 0
    for number, chunk in enumerate(chunks):
        length = sum(map(len, chunk))
        index[number] = offset, length
        offset += length
    return [*(part for chunk in chunks for part in chunk), *with_checksum(index.tobytes())]


def with_checksum(data: bytes | np.ndarray) -> list[Part]:
    """Append the crc32c of some bytes, given as such or as a uint8 array, as the codec ``crc32c`` does."""
    return [data if isinstance(data, bytes) else data.data, int(google_crc32c.value(data)).to_bytes(4, "little")]
