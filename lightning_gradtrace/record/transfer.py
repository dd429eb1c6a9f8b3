"""Copies from a GPU to the host on a side stream, so that a record waits for the device once and not for every tensor.

A plain ``tensor.cpu()`` stops the host until the device has done all that was queued before. Here the copy is queued
on a stream of its own, behind the work that makes the tensor, and the host goes on queueing work; it waits when a
record has put everything, or when too much is under way. Records that read a result to decide what to do next (the
search of `TopK`) have nothing to gain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Use = Callable[[np.ndarray], Any]

UNDER_WAY = 64 << 20
"""Bytes that may be under way before the host waits for the oldest copy; one tensor always may."""


class HostCopies:
    """Hands tensors on as NumPy arrays, in the order in which they were put; all of them when the block is left.

    What is on the host already is handed on at once, without a copy. A tensor must not be changed in place between
    `put` and the end of the block. It is kept until its copy has arrived, so that no other tensor takes its memory.

    Args:
        under_way: see `UNDER_WAY`.
        begin: begins the copy of a tensor that is not on the host.

    Example:
        >>> found = []
        >>> with HostCopies() as host:
        ...     host.put(torch.arange(3), found.append)
        >>> found
        [array([0, 1, 2])]
    """

    def __init__(self, under_way: int = UNDER_WAY, begin: Callable[[Tensor], Copy] | None = None) -> None:
        self._most = under_way
        self._begin = begin or SideStreams()
        self._queue: deque[tuple[Copy, Use]] = deque()
        self._bytes = 0

    def put(self, tensor: Tensor, use: Use) -> None:
        """Copy a tensor to the host and hand it on, now or later.

        Args:
            tensor: the tensor.
            use: receives the array, which may share memory with the tensor.
        """
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            self._finish_all()
            use(tensor.numpy())
            return
        self._bytes += tensor.nbytes
        self._queue.append((self._begin(tensor), use))
        while self._bytes > self._most and len(self._queue) > 1:
            self._finish()

    def __enter__(self) -> HostCopies:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is None:
                self._finish_all()
        finally:
            for copy, _ in self._queue:  # after an error; nothing may be freed that is still being copied
                copy.wait()
            self._queue.clear()

    def _finish_all(self) -> None:
        while self._queue:
            self._finish()

    def _finish(self) -> None:
        copy, use = self._queue[0]
        copy.wait()
        self._queue.popleft()
        self._bytes -= copy.source.nbytes
        use(copy.target.numpy())


@dataclass(frozen=True)
class Copy:
    """A copy that is under way.

    Attributes:
        source: what is copied.
        target: where to, on the host.
        event: recorded behind the copy on its stream; None if it has arrived.
    """

    source: Tensor
    target: Tensor
    event: Any = None

    def wait(self) -> None:
        """Wait until it has arrived."""
        if self.event is not None:
            self.event.synchronize()


class SideStreams:
    """Begins copies, on one side stream of every CUDA device; those of other devices arrive at once.

    Args:
        cuda: ``torch.cuda``, or what stands in for it.
        pinned: whether host memory is pinned; a copy into other memory is not asynchronous.
    """

    def __init__(self, cuda: Any = torch.cuda, pinned: bool = True) -> None:
        self._cuda, self._pinned = cuda, pinned
        self._streams: dict[torch.device, Any] = {}

    def __call__(self, tensor: Tensor) -> Copy:
        """Begin the copy of a tensor."""
        device = tensor.device
        if device.type != "cuda":
            return Copy(tensor, tensor.cpu())
        if device not in self._streams:
            self._streams[device] = self._cuda.Stream(device)
        side = self._streams[device]
        source = tensor.contiguous()  # on the current stream, as all that makes it
        target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=self._pinned)
        side.wait_stream(self._cuda.current_stream(device))
        with self._cuda.stream(side):
            target.copy_(source, non_blocking=True)
            event = self._cuda.Event()
            event.record(side)
        return Copy(source, target, event)
