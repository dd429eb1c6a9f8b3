"""One thread that does the writing, behind a queue whose bytes are bounded."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

Task = Callable[[], None]


class BackgroundThread:
    """Runs tasks one after the other in a thread.

    Putting a task blocks while the queue holds more than `max_bytes` (back-pressure); one task always fits. The first
    exception of a task stops the thread, drops what is queued and is raised by the next call.

    Example:
        >>> done = []
        >>> thread = BackgroundThread(max_bytes=100)
        >>> thread.put(lambda: done.append(1), nbytes=10)
        >>> thread.join()
        >>> thread.stop()
        >>> done
        [1]

    Args:
        max_bytes: bytes that queued tasks may hold.
        idle: called when nothing was queued for a while.
        idle_seconds: that while.
    """

    def __init__(self, max_bytes: int, idle: Task | None = None, idle_seconds: float | None = None) -> None:
        self._max_bytes = max_bytes
        self._idle, self._idle_seconds = idle, idle_seconds
        self._tasks: deque[tuple[Task, int]] = deque()
        self._bytes = 0
        self._busy = False
        self._stopping = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.blocked_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="gradtrace-writer", daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """The exception that stopped the thread."""
        return self._error

    @property
    def queued_bytes(self) -> int:
        """Bytes of the tasks that are waiting or running."""
        return self._bytes

    def put(self, task: Task, nbytes: int) -> None:
        """Queue a task, waiting for room.

        Args:
            task: what to run.
            nbytes: bytes it keeps alive.

        Raises:
            BaseException: what stopped the thread.
        """
        with self._changed:
            if self._bytes + nbytes > self._max_bytes and self._bytes:
                if not self.blocked_seconds:
                    _log.warning(
                        "the training waits for the trace: over %.0f MB are queued, and the store takes them more "
                        "slowly than they come; memory stays bounded (said once)",
                        self._max_bytes / 1e6,
                    )
                since = time.monotonic()
                self._changed.wait_for(
                    lambda: self._error or not self._bytes or self._bytes + nbytes <= self._max_bytes
                )
                self.blocked_seconds += time.monotonic() - since
            self._check()
            self._tasks.append((task, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until all queued tasks are done.

        Raises:
            BaseException: what stopped the thread.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._tasks or self._busy))
            self._check()

    def stop(self) -> None:
        """End the thread after the queued tasks; never raises what a task raised."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopping, self._idle_seconds)
                if self._stopping and not self._tasks:
                    return
                task, nbytes = self._tasks.popleft() if self._tasks else (self._idle, 0)
                self._busy = True
            try:
                if task is not None:
                    task()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._tasks.clear()
                    self._bytes = 0
                    self._busy = False
                    self._changed.notify_all()
                return
            finally:
                del task
            with self._changed:
                self._bytes -= nbytes
                self._busy = False
                self._changed.notify_all()
