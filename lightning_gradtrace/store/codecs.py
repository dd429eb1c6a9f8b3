"""Codecs and metadata documents of the arrays: lossless, checksummed, all of them in the Zarr 3 specification.

Codecs outside the specification (numcodecs' delta, shuffle, pcodec) make zarr warn every reader, so none is used. The
defaults are chosen from the table in docs/performance.md, which `python -m benchmarks.store` measures on real shifts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd

from lightning_gradtrace.store.chunk_keys import CHUNK_KEYS
from lightning_gradtrace.store.direct import Part
from lightning_gradtrace.store.schema import ON_OPEN, ArraySpec
from lightning_gradtrace.store.sharding import shard_document, with_checksum

BLOCK_BYTES = 2**20
"""Shuffling acts on blocks of this size: large ones give the compressor long planes of similar bits or bytes."""

_BLOSC = {
    "index": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOCK_BYTES},
    "float": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "blocksize": BLOCK_BYTES},
    "fast": {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": BLOCK_BYTES},
    "small": {"cname": "zstd", "clevel": 5, "shuffle": "shuffle", "blocksize": BLOCK_BYTES},
    "plain": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0},
}
_ITEM_BYTES = {
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def codec_documents(spec: ArraySpec) -> list[dict[str, Any]]:
    """List the codecs of an array as they stand in its ``zarr.json``; the last one is the checksum.

    In a sharded array every inner chunk and the index have a checksum of their own.
    """
    inner = _inner_documents(spec)
    return inner if spec.inner_shape is None else [shard_document(spec.inner_shape, inner)]


def _inner_documents(spec: ArraySpec) -> list[dict[str, Any]]:
    if spec.dtype == "str":
        compressor: dict[str, Any] = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
        return [{"name": "vlen-utf8", "configuration": {}}, compressor, {"name": "crc32c"}]
    numbers = {"name": "bytes", "configuration": {"endian": "little"}}
    if spec.codec == "none":
        return [numbers, {"name": "crc32c"}]
    blosc = {"typesize": _ITEM_BYTES.get(spec.dtype, 8), **_BLOSC[spec.codec]}
    return [numbers, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]


def array_document(spec: ArraySpec, n_rows: int, tail: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Build the ``zarr.json`` of an array.

    Args:
        spec: its declaration.
        n_rows: length of the first axis.
        tail: lengths of the other axes; None takes those of the declaration.

    Returns:
        The document, of Zarr format 3.
    """
    tail = spec.shape_tail if tail is None else tail
    fill = spec.fill_value
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_rows, *(0 if n == ON_OPEN else n for n in tail)],
        "data_type": "string" if spec.dtype == "str" else spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk_shape)}},
        "chunk_key_encoding": CHUNK_KEYS,
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codec_documents(spec),
        "attributes": {"long_name": spec.long_name, "units": spec.units, **spec.attrs},
        "dimension_names": list(spec.dims),
        "storage_transformers": [],
    }


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build the ``zarr.json`` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


class ChunkEncoder:
    """Encodes whole chunks as `codec_documents` says; decoding is zarr's.

    It calls the libraries that zarr calls. Going through zarr's own asynchronous machinery costs about a millisecond
    more for every chunk, which a commit, that rewrites the tail of some twenty small arrays, can't afford.

    Args:
        spec: declaration of the array.
    """

    def __init__(self, spec: ArraySpec) -> None:
        self._text = spec.dtype == "str"
        self._dtype = np.dtype(object) if self._text else np.dtype(spec.dtype).newbyteorder("<")
        configurations = {document["name"]: document.get("configuration", {}) for document in _inner_documents(spec)}
        self._compressor: Any = None
        if self._text:
            self._compressor = Zstd(level=configurations["zstd"]["level"])
        elif "blosc" in configurations:
            blosc = configurations["blosc"]
            shuffle = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}[blosc["shuffle"]]
            self._compressor = Blosc(blosc["cname"], blosc["clevel"], shuffle, blosc["blocksize"])

    @property
    def borrows(self) -> bool:
        """Whether what is encoded is the memory of the chunk itself, which must not change then."""
        return self._compressor is None

    def encode(self, chunk: np.ndarray) -> list[Part]:
        """Encode one chunk, of full shape, with its checksum; of a sharded array one inner chunk.

        Returns:
            Parts of the object, which are never joined: copying them takes longer than adding up their checksums.
        """
        plain: Any = np.ascontiguousarray(chunk, self._dtype)
        if self._compressor is None:
            return with_checksum(plain.reshape(-1).view(np.uint8))
        return with_checksum(bytes(self._compressor.encode(VLenUTF8().encode(plain.ravel()) if self._text else plain)))
