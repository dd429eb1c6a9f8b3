"""A local directory whose files survive a power loss: many are on their way to the disk at once, and a mark waits."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from zarr.storage import LocalStore

from lightning_gradtrace.store.direct import DirectFiles, Part

THREADS = 8
"""Files that are written at once. Waiting for the disk is what takes long, and it can wait for many together."""

UNDER_WAY_BYTES = 64 * 2**20
"""Bytes of files that may be on their way to the disk; one file always fits."""


class DurableLocalStore(LocalStore):
    """A directory whose files are on the disk, not only in the page cache, before they take their name.

    After a power loss each file is therefore either the old or the new one. `submit` returns before a file is there;
    `settle` waits for all of them and makes their names durable too, before the writer moves the commit mark.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        """Use the directory `root`; it is made if it doesn't exist."""
        super().__init__(root, read_only=read_only)
        self._touched: set[Path] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._files = DirectFiles()
        self._make(self.root)

    def write(self, key: str, parts: list[Part]) -> None:
        """Write one file and wait until it is on the disk."""
        path = self.root / key
        self._make(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            self._files.write(temporary, parts)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._touched.add(path.parent)

    def submit(self, key: str, parts: list[Part]) -> None:
        """Begin to write one file; waits only while `UNDER_WAY_BYTES` are on their way.

        Raises:
            OSError: if a file that was submitted before could not be written.
        """
        size = sum(map(len, parts))
        self._wait(UNDER_WAY_BYTES - size)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "gradtrace-disk")
        self._under_way.append((self._pool.submit(self.write, key, parts), size))
        self._bytes += size

    def settle(self) -> None:
        """Wait until all submitted files are on the disk, and their names as well, where the system can tell.

        Raises:
            OSError: if one of them could not be written.
        """
        self._wait(-1)
        touched, self._touched = self._touched, set()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "gradtrace-disk")
        pool, self._pool = self._pool, None
        with pool:
            list(pool.map(_sync_directory, touched))

    def _wait(self, most_bytes: int) -> None:
        """Wait for the oldest files until at most so many bytes are on their way, none of them if negative."""
        try:
            while self._under_way and self._bytes > most_bytes:
                future, size = self._under_way.popleft()
                self._bytes -= size
                future.result()
        except BaseException:
            wait([future for future, _ in self._under_way])
            self._under_way.clear()
            self._bytes = 0
            raise

    def _make(self, directory: Path) -> None:
        """Make a directory; the names of all that are new become durable with the next `settle`."""
        new = list(_missing(directory))
        if new:
            directory.mkdir(parents=True, exist_ok=True)
            self._touched.update(path.parent for path in new)


def _missing(directory: Path) -> Iterator[Path]:
    """Yield a directory and those that hold it, as long as they don't exist."""
    while not directory.is_dir():
        yield directory
        directory = directory.parent


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
