"""Where a trace lives: path, URL or zarr Store; reading and putting whole objects."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from lightning_gradtrace.store.durable import DurableLocalStore

Target = str | os.PathLike[str] | Store

ROOT = "zarr.json"

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Pauses after which an object is put again into a remote store; putting the same object twice does no harm."""

_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_log = logging.getLogger(__name__)

Put = tuple[str, list[bytes]]
"""Key of an object of a store, and its content in parts."""


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


def read_key(store: Store, key: str) -> bytes | None:
    """Read one whole object of a store, None if it doesn't exist."""
    buffer = sync(store.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


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

    async def put(key: str, parts: list[bytes]) -> None:
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
    """Tell whether an object exists in a store."""
    return sync(store.exists(key))
