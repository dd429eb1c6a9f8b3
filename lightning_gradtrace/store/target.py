"""Where a trace lives: path, URL or zarr Store; reading and putting whole objects."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from lightning_gradtrace.store.direct import Part
from lightning_gradtrace.store.durable import DurableLocalStore

Target = str | os.PathLike[str] | Store

ROOT = "zarr.json"

MOST_DOCUMENT_BYTES = 2**27
"""Size over which a metadata document is not read; one array takes about a kilobyte."""

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Pauses after which an object is put again into a remote store; putting the same object twice does no harm."""

_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_log = logging.getLogger(__name__)

Put = tuple[str, list[Part]]
"""Key of an object of a store, and its content in parts, which must stay as they are until the store is settled."""


class StoreError(RuntimeError):
    """A trace can't be written or read."""


def describe(target: Target) -> str:
    """Name a target in a message."""
    return str(target) if isinstance(target, Store) else os.fspath(target)


def is_url(target: Target) -> bool:
    """Tell a URL such as ``s3://bucket/a.zarr`` from a path."""
    return isinstance(target, str) and re.match(r"^[A-Za-z][A-Za-z0-9+.-]+(://|::)", target) is not None


def free_bytes(target: Target) -> int | None:
    """Return the free space where a trace is to be written; None where that can't be known."""
    if isinstance(target, Store) or (is_url(target) and not describe(target).startswith("file://")):
        return None
    path = Path(describe(target).removeprefix("file://")).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def read_key(store: Store, key: str, most_bytes: int = MOST_DOCUMENT_BYTES) -> bytes | None:
    """Read one whole object of a store, None if it doesn't exist.

    Raises:
        StoreError: if it can't be read, or is larger than `most_bytes`.
    """
    return fetch(store, [key], most_bytes)[0]


def fetch(store: Store, keys: Sequence[str], most_bytes: int) -> list[bytes | None]:
    """Read objects, together where the store is far away; None for those that are missing.

    Raises:
        StoreError: if one of them can't be read, or is larger than `most_bytes`.
    """
    if isinstance(store, LocalStore):
        return [_read_file(store, key, most_bytes) for key in keys]
    # Asking for a part keeps a zip file from unpacking more than anybody wants; a remote store may not know parts.
    part = None if isinstance(store, FsspecStore) else RangeByteRequest(0, most_bytes + 1)

    async def gather() -> list[Any]:
        return await asyncio.gather(*(store.get(key, default_buffer_prototype(), part) for key in keys))

    try:
        found = [None if buffer is None else buffer.to_bytes() for buffer in sync(gather())]
    except Exception as error:  # whatever the store's library raises
        raise StoreError(_unreadable(store, error)) from error
    for key, data in zip(keys, found, strict=True):
        _check_size(store, key, 0 if data is None else len(data), most_bytes)
    return found


def _read_file(store: LocalStore, key: str, most_bytes: int) -> bytes | None:
    path = store.root / key
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            # Reading from a pipe or a device may never end.
            raise StoreError(f"`{key}` of `{store}` can't be read: it is no file")
        _check_size(store, key, state.st_size, most_bytes)
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"`{key}` of `{store}` can't be read: {type(error).__name__}: {error}") from error


def _unreadable(store: Store, error: Exception) -> str:
    return f"`{store}` can't be read: {type(error).__name__}: {error}"


def _check_size(store: Store, key: str, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise StoreError(f"`{key}` of `{store}` is too large: expected at most {most_bytes} bytes")


def put_all(store: Store, puts: Iterable[Put]) -> None:
    """Put objects, each of them atomically and in no order; they are in the store for sure after `settle`.

    Files of a local directory are on their way to the disk when this returns, so that the next ones can be encoded
    meanwhile. Objects of other stores are there.
    """
    if isinstance(store, DurableLocalStore):
        for key, parts in puts:
            store.submit(key, parts)
        return
    remote = isinstance(store, FsspecStore)

    async def put(key: str, parts: list[Part]) -> None:
        buffer = default_buffer_prototype().buffer.from_bytes(b"".join(parts))
        for seconds in RETRY_SECONDS if remote else ():
            try:
                return await store.set(key, buffer)
            except Exception as error:
                if getattr(error, "errno", None) in _LASTING or isinstance(error, ImportError):
                    raise
                _log.warning(
                    "putting `%s` failed (%s: %s); trying again in %g s", key, type(error).__name__, error, seconds
                )
                await asyncio.sleep(seconds)
        await store.set(key, buffer)

    async def gather() -> None:
        await asyncio.gather(*(put(key, parts) for key, parts in tasks))

    tasks = list(puts)
    if tasks:
        sync(gather())


def settle(store: Store) -> None:
    """Wait until everything that was put is in the store: in a local directory on the disk, names included."""
    if isinstance(store, DurableLocalStore):
        store.settle()


def json_put(key: str, document: dict[str, Any]) -> Put:
    """Make a JSON document an object to put."""
    return key, [json.dumps(document, separators=(",", ":"), allow_nan=False).encode()]


def key_exists(store: Store, key: str) -> bool:
    """Tell whether an object exists in a store.

    Raises:
        StoreError: if the store can't be asked.
    """
    try:
        return sync(store.exists(key))
    except Exception as error:  # whatever the store's library raises
        raise StoreError(_unreadable(store, error)) from error
