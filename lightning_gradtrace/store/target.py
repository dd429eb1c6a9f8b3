"""Where a trace lives: path, URL or zarr Store; whole-file writes that survive a crash."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

Target = str | os.PathLike[str] | Store

ROOT = "zarr.json"

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Pauses after which an object is put again into a remote store; putting the same object twice does no harm."""

_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_log = logging.getLogger(__name__)

Put = tuple[str, bytes]
"""Key and content of an object of a store."""


class StoreError(RuntimeError):
    """A trace can't be written or read."""


class DurableLocalStore(LocalStore):
    """A directory whose files are on the disk, not only in the page cache, before they take their name.

    After a power loss each file is therefore either the old or the new one. Names of new files are made durable by
    `sync_directories`, which the writer calls before it moves the commit mark.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        """Use the directory `root`."""
        super().__init__(root, read_only=read_only)
        self._touched: set[Path] = set()

    def write(self, key: str, data: bytes) -> None:
        """Write one file and wait until it is on the disk."""
        path = self.root / key
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._touched.update([path.parent.parent, path.parent.parent.parent])
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._touched.add(path.parent)

    def sync_directories(self) -> None:
        """Make the names of all files written since the last call durable, where the system can."""
        touched, self._touched = self._touched, set()
        for directory in touched:
            with contextlib.suppress(OSError):
                descriptor = os.open(directory, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


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
    """Put objects, each of them atomically and in no order; returns when all are in the store."""
    remote = isinstance(store, FsspecStore)

    async def put(key: str, data: bytes) -> None:
        buffer = default_buffer_prototype().buffer.from_bytes(data)
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

    async def gather(tasks: list[Put]) -> None:
        await asyncio.gather(*(put(key, data) for key, data in tasks))

    tasks = list(puts)
    if not tasks:
        return
    if not isinstance(store, DurableLocalStore):
        sync(gather(tasks))
    elif len(tasks) == 1:
        store.write(*tasks[0])
    else:
        # Waiting for the disk is what takes long, and the system can wait for many files at once.
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda put: store.write(*put), tasks))


def json_put(key: str, document: dict[str, Any]) -> Put:
    """Make a JSON document an object to put."""
    return key, json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def key_exists(store: Store, key: str) -> bool:
    """Tell whether an object exists in a store."""
    return sync(store.exists(key))
