"""Checks of a root document before anything acts on it: a damaged or hostile one ends here, in a clear error."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from lightning_gradtrace.store.chunk_keys import READABLE_CHUNK_KEYS
from lightning_gradtrace.store.schema import AXES, CORE_SPECS

DATA_TYPES = frozenset(
    ["bool", "string", "float16", "float32", "float64"]
    + [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
)
"""Types that an array may have; none of them can hold Python objects."""

CODECS = frozenset({"bytes", "blosc", "zstd", "gzip", "crc32c", "vlen-utf8", "transpose", "sharding_indexed"})
"""Codecs that an array may use; zarr would look any other name up among the installed packages."""

MAX_RAW_CHUNK_BYTES = 2**30
"""Raw size over which a chunk is refused; chunks of this package hold at most 64 MB."""

MAX_ARRAYS = 100_000
MAX_RANKS = 10_000
_LARGEST = 2**62
_MOST_AXES = 32


def check_root(document: dict[str, Any]) -> None:
    """Check the root document of a trace.

    Args:
        document: the parsed ``zarr.json`` of the root.

    Raises:
        ValueError: if something in it can't be; the message names it.
    """
    committed = document["attributes"].get("committed")
    if not isinstance(committed, dict) or not all(map(_is_length, [*committed.values(), *map(committed.get, AXES)])):
        raise ValueError(f"`committed` is {_short(committed)}, expected a number of rows for each of {', '.join(AXES)}")
    ranks = document["attributes"].get("ranks", 1)
    if not _is_length(ranks) or not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"`ranks` is {_short(ranks)}, expected a number of processes from 1 to {MAX_RANKS}")
    consolidated = document.get("consolidated_metadata")
    members = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(members, dict) or len(members) > MAX_ARRAYS:
        raise ValueError(f"the root holds no consolidated metadata of at most {MAX_ARRAYS} arrays")
    core = {spec.path: spec for spec in CORE_SPECS}
    for path, member in members.items():
        _check_path(path)
        if not isinstance(member, dict) or member.get("node_type") not in ("array", "group"):
            raise ValueError(f"`{path}` is neither an array nor a group")
        if member["node_type"] == "array":
            _check_array(path, member)
            spec = core.get(path)
            if spec is None:
                continue
            expected = ("string" if spec.dtype == "str" else spec.dtype, list(spec.dims))
            if (member["data_type"], member["dimension_names"]) != expected:
                found = (member["data_type"], member["dimension_names"])
                raise ValueError(f"`{path}` has type and axes {_short(found)}, expected {expected}")
        elif path in core:
            raise ValueError(f"`{path}` is a group, expected an array")
    parents = {path.rpartition("/")[0] for path in members} - {""}
    strange = sorted(path for path in parents if members.get(path, {}).get("node_type") != "group")
    if strange:
        raise ValueError(f"`{_short(strange[0])}` holds arrays, but is no group of the trace")


def _check_path(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.startswith("__") for part in parts) or re.search(r"[\\\x00-\x1f]", path):
        raise ValueError(f"{_short(path)} is no name of an array: expected plain names joined by `/`")


def _check_array(path: str, document: dict[str, Any]) -> None:
    shape = document.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= _MOST_AXES or not all(map(_is_length, shape)):
        raise ValueError(f"`{path}` has shape {_short(shape)}, expected a list of lengths")
    dtype = document.get("data_type")
    if not isinstance(dtype, str) or dtype not in DATA_TYPES:
        raise ValueError(f"`{path}` has data_type {_short(dtype)}, expected one of {', '.join(sorted(DATA_TYPES))}")
    grid = document.get("chunk_grid")
    configuration = grid.get("configuration") if isinstance(grid, dict) and grid.get("name") == "regular" else None
    chunks = configuration.get("chunk_shape") if isinstance(configuration, dict) else None
    if not isinstance(chunks, list) or len(chunks) != len(shape) or not all(_is_length(n) and n for n in chunks):
        raise ValueError(f"`{path}` has chunks {_short(chunks)}, expected {len(shape)} lengths of at least 1")
    itemsize = 8 if dtype == "string" else np.dtype(dtype).itemsize
    if math.prod(chunks) * itemsize > MAX_RAW_CHUNK_BYTES:
        raise ValueError(f"`{path}` has chunks of {_short(chunks)}, expected at most {MAX_RAW_CHUNK_BYTES} bytes")
    encoding = document.get("chunk_key_encoding")
    if encoding not in READABLE_CHUNK_KEYS:
        raise ValueError(f"`{path}` has chunk_key_encoding {_short(encoding)}, expected `default` with `.` or `/`")
    names = document.get("dimension_names")
    if not isinstance(names, list) or len(names) != len(shape) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{path}` has dimension_names {_short(names)}, expected {len(shape)} names")
    fill = document.get("fill_value")
    if not isinstance(fill, (bool, int, float, str)):
        raise ValueError(f"`{path}` has fill_value {_short(fill)}, expected a number or text")
    if document.get("storage_transformers"):
        raise ValueError(f"`{path}` has storage_transformers, expected none")
    if not isinstance(document.get("attributes", {}), dict):
        raise ValueError(f"`{path}` has attributes {_short(document['attributes'])}, expected a mapping")
    _check_codecs(path, document.get("codecs"), chunks, itemsize)


def _check_codecs(path: str, codecs: Any, chunks: list[int], itemsize: int, depth: int = 0) -> None:
    if not isinstance(codecs, list) or not 1 <= len(codecs) <= 8 or depth > 2:
        raise ValueError(f"`{path}` has codecs {_short(codecs)}, expected a short list")
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else None
        if not isinstance(name, str) or name not in CODECS:
            raise ValueError(f"`{path}` has the codec {_short(name)}, expected one of {', '.join(sorted(CODECS))}")
        configuration = codec.get("configuration", {})
        if not isinstance(configuration, dict):
            raise ValueError(f"`{path}` has the codec {name} with {_short(configuration)}, expected a mapping")
        if name == "sharding_indexed":
            inner = configuration.get("chunk_shape")
            if not isinstance(inner, list) or len(inner) != len(chunks) or not all(_is_length(n) and n for n in inner):
                raise ValueError(f"`{path}` has inner chunks {_short(inner)}, expected {len(chunks)} lengths")
            if any(n % m for n, m in zip(chunks, inner, strict=True)):
                raise ValueError(f"`{path}` has inner chunks {_short(inner)} that don't divide its chunks {chunks}")
            if math.prod(n // m for n, m in zip(chunks, inner, strict=True)) > 2**20:
                raise ValueError(f"`{path}` has over a million inner chunks in a chunk")
            for key in ("codecs", "index_codecs"):
                _check_codecs(path, configuration.get(key), inner, itemsize, depth + 1)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
