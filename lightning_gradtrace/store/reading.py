"""Reading rows of an array, chunk by chunk: each checksum is compared, and a lost chunk is an error with its name.

zarr takes a missing chunk for one full of padding, allocates what the metadata asks for, and names neither array nor
chunk when one is damaged. A trace is read here instead. Arrays whose codecs are not those of this package are
decoded by zarr, still one chunk at a time. Of a sharded array a chunk is a whole shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc, VLenUTF8, Zstd

from lightning_gradtrace.store.sharding import ABSENT
from lightning_gradtrace.store.target import StoreError, fetch, key_exists

AT_ONCE = 16
"""Chunks that are fetched together."""

MAX_TEXT_BYTES = 2**28
"""Decoded size over which a chunk of text is refused."""

_NUMBERS = (("bytes", "blosc", "crc32c"), ("bytes", "crc32c"))
_TEXT = ("vlen-utf8", "zstd", "crc32c")

Place = tuple[int, ...]


def chunk_shape(array: zarr.Array) -> tuple[int, ...]:
    """Return the shape of what one object of the store holds: a chunk, or a shard."""
    return array.shards or array.chunks


def most_bytes(array: zarr.Array) -> int:
    """Return what an object that holds a chunk takes at most: no codec makes it much larger than its numbers."""
    raw = MAX_TEXT_BYTES if _is_text(array) else math.prod(chunk_shape(array)) * array.dtype.itemsize
    n_inner = math.prod(n // size for n, size in zip(chunk_shape(array), array.chunks, strict=True))
    return raw + raw // 8 + 64 * n_inner + 2**16


def find_array(group: zarr.Group, path: str) -> zarr.Array:
    """Return an array that a trace must have.

    Raises:
        StoreError: if it is missing.
    """
    node = group.get(path)
    if not isinstance(node, zarr.Array):
        raise StoreError(f"the trace `{group.store}` has no array `{path}`; expected one: the trace is damaged")
    return node


def read_rows(
    group: zarr.Group,
    path: str,
    start: int = 0,
    stop: int | None = None,
    may_be_absent: Callable[[tuple[slice, ...]], bool] | None = None,
) -> np.ndarray:
    """Read neighbouring rows of an array.

    Args:
        group: root of the trace.
        path: path of the array.
        start: first row.
        stop: row after the last one; None reads to the end.
        may_be_absent: tells of a region of whole chunks whether it may have no chunk, which means padding.

    Returns:
        Shape (stop - start, ...).

    Raises:
        StoreError: if rows are beyond the array, or a chunk is missing or damaged; the message names the chunk.
    """
    array = find_array(group, path)
    stop = array.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= array.shape[0]:
        raise StoreError(
            f"`{path}` has {array.shape[0]} rows, rows {start} to {stop - 1} were asked for: the trace is damaged"
        )
    shape = (stop - start, *array.shape[1:])
    dtype = np.dtype(object) if _is_text(array) else np.dtype(array.dtype)
    wanted = _places(array, start, stop)
    if start == stop or not all(shape):
        return np.empty((stop - start, *(0 if n > 2**40 else n for n in array.shape[1:])), dtype)
    # What the metadata claims is only believed, and memory asked for, when chunks at both ends are there.
    ends = tuple(-(-n // size) - 1 for n, size in zip((stop, *array.shape[1:]), chunk_shape(array), strict=True))
    first = tuple(start // chunk_shape(array)[0] if axis == 0 else 0 for axis in range(array.ndim))
    for place in {first, ends}:
        if not key_exists(group.store, _key(array, path, place)) and not _excused(array, place, may_be_absent):
            raise StoreError(missing_chunk(group, path, array, place))
    try:
        out = np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise StoreError(f"`{path}` rows {start} to {stop - 1} of shape {shape} don't fit into memory") from error
    while batch := list(itertools.islice(wanted, AT_ONCE)):
        found = fetch(group.store, [_key(array, path, p) for p in batch], most_bytes(array))
        for place, data in zip(batch, found, strict=True):
            region = chunk_region(array, place)
            if data is None:
                if not _excused(array, place, may_be_absent):
                    raise StoreError(missing_chunk(group, path, array, place))
                chunk = np.full(chunk_shape(array), array.fill_value, dtype)
            else:
                chunk = decode_chunk(group, path, array, place, data)
            low, high = max(region[0].start, start), min(region[0].stop, stop)
            inside = (slice(low - region[0].start, high - region[0].start),)
            inside += tuple(slice(0, part.stop - part.start) for part in region[1:])
            out[(slice(low - start, high - start), *region[1:])] = chunk[inside]
    return out


def _excused(array: zarr.Array, place: Place, may_be_absent: Callable[[tuple[slice, ...]], bool] | None) -> bool:
    return may_be_absent is not None and may_be_absent(chunk_region(array, place))


def chunk_region(array: zarr.Array, place: Place) -> tuple[slice, ...]:
    """Return the rows and columns of an array that one of its chunks holds."""
    return tuple(
        slice(i * size, min((i + 1) * size, n))
        for i, size, n in zip(place, chunk_shape(array), array.shape, strict=True)
    )


def missing_chunk(group: zarr.Group, path: str, array: zarr.Array, place: Place) -> str:
    """Say that a chunk is missing."""
    return f"{name_chunk(group, path, array, place)} is missing"


def name_chunk(group: zarr.Group, path: str, array: zarr.Array, place: Place, stop: int | None = None) -> str:
    """Name a chunk, its rows and the steps they belong to; `stop` ends the rows that count."""
    axis = str((array.metadata.dimension_names or ["row"])[0])  # type: ignore[union-attr]
    rows = chunk_region(array, place)[0]
    last = rows.stop if stop is None else min(stop, rows.stop)
    text = f"{axis} {rows.start} to {last - 1}"
    if axis in ("step", "occurrence") and path != f"{axis}s/step":
        steps = _steps_of(group, path, axis, rows.start, last)
        if len(steps):
            text += f", steps {steps[0]} to {steps[-1]}"
    return f"`{path}` chunk {'/'.join(map(str, place))} ({text})"


def _steps_of(group: zarr.Group, path: str, axis: str, start: int, stop: int) -> np.ndarray:
    """Return the steps that rows belong to, where that can be known."""
    listed = f"{path.rpartition('/')[0]}/{axis}"
    try:
        if listed == path or listed not in group:
            return read_rows(group, f"{axis}s/step", start, stop) if listed != path else np.empty(0)
        own = read_rows(group, listed, start, stop)
        return own if axis == "step" or not len(own) else read_rows(group, "occurrences/step", own[0], own[-1] + 1)
    except StoreError:
        return np.empty(0)


def decode_chunk(group: zarr.Group, path: str, array: zarr.Array, place: Place, data: bytes) -> np.ndarray:
    """Decode a chunk of full shape; what sticks out of the array is padding.

    Raises:
        StoreError: if it is damaged.
    """
    documents = [codec.to_dict() for codec in array.metadata.codecs]  # type: ignore[union-attr]
    names = tuple(str(document["name"]) for document in documents)
    try:
        if names in _NUMBERS and documents[0].get("configuration") == {"endian": "little"}:
            return _decode_numbers(data, array, names)
        if names == ("sharding_indexed",) and (inner := _inner_names(documents[0])) in _NUMBERS:
            return _decode_shard(data, array, inner, place[0] * chunk_shape(array)[0])
        if names == _TEXT and _is_text(array):
            return _decode_text(data, array)
        region = chunk_region(array, place)
        whole = np.empty(chunk_shape(array), np.dtype(object) if _is_text(array) else array.dtype)
        whole[tuple(slice(0, part.stop - part.start) for part in region)] = array[region]
        return whole
    except Exception as error:  # whatever a codec raises about damaged bytes
        where = name_chunk(group, path, array, place)
        raise StoreError(f"{where} can't be read: {type(error).__name__}: {error}") from error


def _decode_numbers(data: bytes, array: zarr.Array, names: tuple[str, ...]) -> np.ndarray:
    content = _checked(data)
    dtype = np.dtype(array.dtype).newbyteorder("<")
    expected = math.prod(array.chunks) * dtype.itemsize
    if "blosc" not in names:
        if len(content) != expected:
            raise ValueError(f"it has {len(content)} bytes, expected {expected}")
        out = np.frombuffer(content, dtype).reshape(array.chunks)
        return out.astype(dtype.newbyteorder("="), copy=False)
    # The header says how much memory decoding takes; it must be that of the chunk.
    nbytes, blocksize, cbytes = (int.from_bytes(content[at : at + 4], "little") for at in (4, 8, 12))
    if len(content) < 16 or nbytes != expected or cbytes != len(content) or blocksize > max(nbytes, 1):
        raise ValueError(f"its header promises {nbytes} bytes, expected {expected}")
    out = np.empty(array.chunks, dtype)
    Blosc().decode(content, out)
    return out.astype(dtype.newbyteorder("="), copy=False)


def _inner_names(document: Any) -> tuple[str, ...]:
    """Name the codecs of a shard's inner chunks, none of them if the shard isn't one of this package."""
    configuration = document["configuration"]
    index = [codec["name"] for codec in configuration["index_codecs"]]
    if index != ["bytes", "crc32c"] or configuration.get("index_location", "end") != "end":
        return ()
    return tuple(codec["name"] for codec in configuration["codecs"])


def _decode_shard(data: bytes, array: zarr.Array, names: tuple[str, ...], first_row: int) -> np.ndarray:
    """Decode a shard whose first row is `first_row`; inner chunks without rows of the array may be absent."""
    out = np.empty(chunk_shape(array), array.dtype)
    counts = [n // size for n, size in zip(out.shape, array.chunks, strict=True)]
    size = 16 * math.prod(counts) + 4
    if len(data) < size:
        raise ValueError(f"the shard has {len(data)} bytes, its index alone takes {size}")
    index = np.frombuffer(_checked(data[-size:]), "<u8").reshape(-1, 2).tolist()
    for place, (offset, nbytes) in zip(places(counts), index, strict=True):
        region = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, array.chunks, strict=True))
        if offset == nbytes == ABSENT and first_row + region[0].start >= array.shape[0]:
            out[region] = array.fill_value
            continue
        if offset + nbytes > len(data) - size:
            raise ValueError(f"the inner chunk {'/'.join(map(str, place))} is not in the shard")
        out[region] = _decode_numbers(data[offset : offset + nbytes], array, names)
    return out


def _decode_text(data: bytes, array: zarr.Array) -> np.ndarray:
    packed = _checked(data)
    size = _zstd_content_size(packed)
    if size is None or size > MAX_TEXT_BYTES:
        raise ValueError(f"its header promises {size} bytes of text, expected at most {MAX_TEXT_BYTES}")
    plain = Zstd().decode(packed)
    count = math.prod(array.chunks)
    if int.from_bytes(bytes(plain[:4]), "little") != count:
        raise ValueError(f"it holds another number of texts than {count}")
    return cast(np.ndarray, VLenUTF8().decode(plain)).reshape(array.chunks)


def _checked(data: bytes) -> bytes:
    """Return the content of a chunk without its checksum."""
    content, stored = data[:-4], int.from_bytes(data[-4:], "little")
    if len(data) < 4 or int(google_crc32c.value(content)) != stored:
        raise ValueError("Stored and computed checksum do not match")
    return content


def _zstd_content_size(frame: bytes) -> int | None:
    """Read the decoded size off the header of a Zstandard frame (RFC 8878, 3.1.1.1); None if it doesn't say."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 6:
        return None
    descriptor = frame[4]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    at = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if single else 0, 2, 4, 8)[flag]
    size = int.from_bytes(frame[at : at + length], "little")
    return None if not length else size + 256 if length == 2 else size


def _is_text(array: zarr.Array) -> bool:
    return array.dtype.kind in "OTU"


def _places(array: zarr.Array, start: int, stop: int) -> Iterator[Place]:
    """Name the chunks that hold rows, one by one: there may be very many."""
    size, *others = chunk_shape(array)
    counts = [-(-n // chunk) for n, chunk in zip(array.shape[1:], others, strict=True)]
    for number in range(start // size, -(-stop // size)):
        for rest in places(counts):
            yield (number, *rest)


def places(counts: Sequence[int]) -> Iterator[Place]:
    """Name the chunks of a grid, one by one: `itertools.product` of ranges, which doesn't hold them in memory."""
    if not counts:
        yield ()
        return
    for i in range(counts[0]):
        for rest in places(counts[1:]):
            yield (i, *rest)


def _key(array: zarr.Array, path: str, place: Place) -> str:
    return f"{path}/{array.metadata.encode_chunk_key(place)}"
