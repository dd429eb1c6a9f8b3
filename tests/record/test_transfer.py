"""Copies to the host on a side stream, on streams that are played on the CPU: what is queued runs when waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradtrace.record.transfer import Copy, HostCopies, SideStreams


class Stream:
    """Work in the order in which it was queued; nothing of it is done before somebody waits."""

    def __init__(self, device: Any = None) -> None:
        self.work: list[Callable[[], Any]] = []
        self.done = 0

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def wait_stream(self, other: Stream) -> None:
        until = len(other.work)
        self.work.append(lambda: other.run(until))


class Cuda:
    """Stands in for ``torch.cuda``."""

    Stream = Stream

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.sides: set[Stream] = set()
        self.n_waits = 0

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, side: Stream) -> Iterator[None]:
        self.sides.add(side)
        self.current, before = side, self.current
        yield
        self.current = before

    def Event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self, stream: Stream) -> None:
        self.stream, self.until = stream, len(stream.work)

    def synchronize(self) -> None:
        self.cuda.n_waits += 1
        self.stream.run(self.until)


class OnDevice(Tensor):
    """A tensor that says it is on a device, and whose copies are queued on the current stream."""

    cuda: Cuda

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            found = super().__torch_function__(func, types, args, kwargs)
            if isinstance(found, OnDevice):
                found.cuda = next(a.cuda for a in args if isinstance(a, OnDevice))
            return found
        target, source = args
        assert kwargs == {"non_blocking": True}
        source.cuda.current.work.append(lambda: target.copy_(plain(source)))
        return target


def plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def on_device(cuda: Cuda, values: Tensor) -> Tensor:
    """A tensor that the main stream is going to fill with values; zeros until then."""
    memory = torch.zeros_like(values)
    cuda.main.work.append(lambda: memory.copy_(values))
    tensor = memory.as_subclass(OnDevice)
    tensor.cuda = cuda
    return tensor


def copies(cuda: Cuda, under_way: int = 1 << 20) -> HostCopies:
    return HostCopies(under_way, SideStreams(cuda, pinned=False))


def test_all_tensors_arrive_in_order_after_what_makes_them() -> None:
    cuda, wanted, found = Cuda(), [torch.randn(3, 2) for _ in range(4)], []
    with copies(cuda) as host:
        for values in wanted:
            host.put(on_device(cuda, values), lambda array: found.append(array.copy()))
        assert not found and cuda.n_waits == 0 and cuda.main.done == 0  # the host has waited for nothing
    assert len(cuda.sides) == 1 and cuda.main not in cuda.sides
    for array, values in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(array, values.numpy())


def test_no_more_than_a_bound_is_under_way() -> None:
    cuda, found = Cuda(), []
    with copies(cuda, under_way=2 * 80) as host:
        for i in range(5):
            host.put(on_device(cuda, torch.full((10,), i, dtype=torch.float64)), found.append)
            assert len(found) == max(0, i - 1)
    assert [array[0] for array in found] == list(range(5))
    with copies(cuda, under_way=1) as host:  # one tensor always may be
        host.put(on_device(cuda, torch.ones(10)), found.append)
        assert len(found) == 5
    assert len(found) == 6


def test_what_is_on_the_host_keeps_its_turn() -> None:
    cuda, found, here = Cuda(), [], torch.full((2,), 2.0)
    with copies(cuda) as host:
        host.put(on_device(cuda, torch.ones(2)), found.append)
        host.put(here, found.append)
        assert [array[0] for array in found] == [1, 2]
    assert np.shares_memory(found[1], here.numpy())


def test_columns_are_copied_as_they_are_seen() -> None:
    cuda, values, found = Cuda(), torch.randn(4, 6), []
    source = on_device(cuda, values)
    cuda.main.run(1)
    with copies(cuda) as host:
        host.put(source.mT[1:3], found.append)
    np.testing.assert_array_equal(found[0], values.mT[1:3].numpy())


@pytest.mark.parametrize("where", ["block", "use"])
def test_after_an_error_nothing_is_under_way_any_more(where: str) -> None:
    cuda, found = Cuda(), []

    def use(array: np.ndarray) -> None:
        if where == "use":
            raise ValueError("no room")
        found.append(array)

    with pytest.raises(ValueError, match="no room"), copies(cuda) as host:
        for _ in range(3):
            host.put(on_device(cuda, torch.ones(2)), use)
        if where == "block":
            raise ValueError("no room")
    assert not found and cuda.n_waits == 3


def test_other_devices_copy_at_once() -> None:
    cuda = Cuda()
    copy = SideStreams(cuda)(torch.ones(2))
    assert isinstance(copy, Copy) and copy.event is None and copy.target.tolist() == [1, 1]
