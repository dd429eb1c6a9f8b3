"""How the chunks of an array are named in a store."""

from __future__ import annotations

from typing import Any

CHUNK_KEYS: dict[str, Any] = {"name": "default", "configuration": {"separator": "."}}
"""What is written: `c.0.0`, side by side. With `/` every chunk has directories, which have to be made durable."""

READABLE_CHUNK_KEYS = (CHUNK_KEYS, {"name": "default", "configuration": {"separator": "/"}})
"""What is read; `/` is that of format 1.1."""

Place = tuple[int, ...]


def chunk_key(path: str, place: Place) -> str:
    """Name a chunk that is written.

    Args:
        path: of the array.
        place: number of the chunk along every axis.

    Returns:
        Its key in the store.

    Example::

        >>> chunk_key("topk/shift", (2, 0))
        'topk/shift/c.2.0'
    """
    return f"{path}/{'.'.join(map(str, ('c', *place)))}"


def place_of(path: str, key: str) -> Place | None:
    """Return the place of the chunk with a key below an array, None if the key is that of something else.

    Example::

        >>> place_of("topk/shift", "topk/shift/c.2.0"), place_of("topk/shift", "topk/shift/zarr.json")
        ((2, 0), None)
    """
    prefix, *numbers = key.removeprefix(f"{path}/").split(".")
    return tuple(map(int, numbers)) if prefix == "c" and all(map(str.isdecimal, numbers)) else None
