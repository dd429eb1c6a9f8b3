"""One writer for each directory: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lightning_gradtrace.store.target import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked process, such as a dataloader's worker, must not hold the lock after the run was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class DirectoryLock:
    """Exclusive lock on a directory.

    The lock is on the directory itself (flock), so it leaves no file behind, and a run that is killed frees it. File
    systems that know no such locks (some network mounts) and Windows go without.

    Args:
        directory: what to lock; it exists.

    Raises:
        StoreError: if another run holds the lock.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreError(
                    f"`{directory}` is being written by another run; expected one run for each path: wait for its end, "
                    "or choose another path"
                ) from error
            return
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)
