"""The processes of one training: what they have to tell each other to record it together.

Every rank records its own samples and writes its own part of the trace. They meet when a run begins, once in every
recorded step, and when a checkpoint is made; where parameters are spread, also for passes that take all ranks. A rank
on which something failed can't just leave: the others would wait for it forever. So with several ranks an error is
held back until they meet; then all end their parts at the same step, and `on_error` decides about the training on all
of them alike.

The ranks meet in a group of processes of their own (gloo, on the CPU). Nothing of theirs can be taken for a message of
the training, and no device is waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")


class RankError(RuntimeError):
    """Another rank can't go on recording."""


@dataclass
class Ranks:
    """This process among those that record together; a single process by default, which meets nobody.

    Attributes:
        rank: number of this process.
        size: number of processes.
        group: their group.
        over: whether they have parted, because one of them failed.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)
    over: bool = False

    @classmethod
    def join(cls) -> Ranks:
        """Make the group; every process of the training must call it."""
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def agree(self, failure: Exception | None = None, numbers: Sequence[float] = ()) -> list[float]:
        """Meet the others: all go on, or none does.

        Args:
            failure: what went wrong on this rank since they last met.
            numbers: what this rank has to add; as many on all ranks.

        Returns:
            The sums of the numbers over all ranks.

        Raises:
            RankError: another rank failed; the message holds its error. On a rank that failed, its own error.
        """
        message = torch.tensor([float(failure is not None), *numbers], dtype=torch.float64, device="cpu")
        dist.all_reduce(message, group=self.group)
        failed, *sums = message.tolist()
        if failed:
            self._part(failure)
        return sums

    def together(self, work: Callable[[], T], failure: Exception | None = None) -> list[T]:
        """Do something on every rank that may fail on some.

        Args:
            work: what to do; its result must be plain data.
            failure: what went wrong on this rank since they last met; then there is nothing to do.

        Returns:
            The results of all ranks.

        Raises:
            RankError: as in `agree`.
        """
        if self.size == 1:
            return [work()]
        result: Any = None
        if failure is None:
            try:
                result = work()
            except Exception as error:
                failure = error
        self.agree(failure)
        return self._exchange(result)

    def sums(
        self,
        names: Iterable[str],
        shape: Callable[[str], tuple[torch.Size, torch.dtype]],
        part: Callable[[str], Tensor | None],
        use: Callable[[str, Tensor], None],
    ) -> None:
        """Add up one tensor after the other over the ranks; each is handed on before the next one is formed.

        A rank on which something fails in between takes part to the end of the tensor under way.

        Args:
            names: of the tensors, the same on all ranks.
            shape: gives shape and dtype of a tensor.
            part: gives this rank's part of a tensor, None for nothing.
            use: receives the sum, on the device of the part or the CPU.

        Raises:
            RankError: as in `agree`.
        """
        failure: Exception | None = None
        for name in names:
            size, dtype = shape(name)
            mine: Tensor | None = None
            if failure is None:
                try:
                    mine = part(name)
                except Exception as error:
                    failure = error
            # The last number says whether the rank that sent it has failed.
            message = torch.zeros(size.numel() + 1, dtype=dtype, device="cpu")
            if mine is not None:
                message[:-1] = mine.detach().flatten()
            message[-1] = float(failure is not None)
            dist.all_reduce(message, group=self.group)
            if message[-1]:
                self._part(failure)
            try:
                use(name, message[:-1].view(size))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure

    def _part(self, failure: Exception | None) -> None:
        """End the recording on all ranks, each of which knows that one has failed."""
        self.over = True
        reasons = self._exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [f"rank {rank} ({reason})" for rank, reason in enumerate(reasons) if reason is not None]
        raise RankError(f"{', '.join(failed)} can't go on recording, so that rank {self.rank} stops too")

    def _exchange(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


class Recorder(Protocol):
    """Something that records on one rank among others."""

    failure: Exception | None

    @property
    def ranks(self) -> Ranks:
        """The ranks."""

    def fail(self, error: Exception) -> None:
        """Take note of an error that waits until the ranks meet."""


R = TypeVar("R", bound=Recorder)


def held_back(method: Callable[Concatenate[R, P], None]) -> Callable[Concatenate[R, P], None]:
    """Hold back an error of a method until the ranks meet, and do nothing from then on; a single process raises it."""

    @functools.wraps(method)
    def run(self: R, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.ranks.size == 1:
            method(self, *args, **kwargs)
        elif self.failure is None:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                if self.ranks.over:
                    raise
                self.fail(error)

    return run
