"""Files that go to the disk past the page cache, where the system can do that (``O_DIRECT``).

A trace is not read while it is written. The page cache would copy its bytes once more, push out what the training
reads, and take, on a virtual machine, more time to find room for them than the disk takes to store them.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

BLOCK = 4096
"""Addresses, offsets and lengths of direct writes are multiples of it; no common disk asks for a larger unit."""

BUFFER_BYTES = 2**20
"""What is handed to the disk at once; more no longer fits into the cache of a processor."""

LEAST_BYTES = 2**18
"""Smaller files go through the page cache, which puts many of them together."""

Part = bytes | memoryview
"""A piece of a file's content."""

_FLAG = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOMEM)


class DirectFiles:
    """Writes files from memory that is lined up as disks need it, and keeps that memory for the next ones.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DirectFiles().write(Path(folder) / "a.bin", [b"any number", b" of parts"])
        ...     (Path(folder) / "a.bin").read_bytes()
        b'any number of parts'
    """

    def __init__(self) -> None:
        self._possible = bool(_FLAG)
        self._free: deque[memoryview] = deque()

    def write(self, path: Path, parts: Sequence[Part]) -> None:
        """Write one file and wait until it is on the disk. May be called from several threads.

        Args:
            path: of the file.
            parts: its content.

        Raises:
            OSError: what the system says.
        """
        if self._possible and sum(map(len, parts)) >= LEAST_BYTES:
            try:
                return self._write_direct(path, parts)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                # No direct writes here, or in other units, or no memory for them: nothing is lost but time.
                self._possible = False
        with path.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    def _write_direct(self, path: Path, parts: Sequence[Part]) -> None:
        with self._memory() as memory:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAG, 0o666)
            try:
                size = 0
                for length in _fill(memory, parts):
                    _write_at(descriptor, memory[: -(-length // BLOCK) * BLOCK], size)
                    size += length
                os.ftruncate(descriptor, size)  # what filled up the last block
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _memory(self) -> Iterator[memoryview]:
        try:
            memory = self._free.pop()
        except IndexError:
            memory = memoryview(_private_memory(BUFFER_BYTES))
        try:
            yield memory
        finally:
            self._free.append(memory)


def _private_memory(size: int) -> mmap.mmap:
    """Return memory that begins at a page and that a forked process does not share."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)  # Windows, which does not fork


def _fill(memory: memoryview, parts: Sequence[Part]) -> Iterator[int]:
    """Copy parts one after the other; yields the number of bytes whenever the memory is full, and at the end."""
    used = 0
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            n = min(len(rest), len(memory) - used)
            memory[used : used + n] = rest[:n]
            used, rest = used + n, rest[n:]
            if used == len(memory):
                yield used
                used = 0
    if used:
        yield used


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        n = os.pwrite(descriptor, data, offset)
        if not n:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        data, offset = data[n:], offset + n
