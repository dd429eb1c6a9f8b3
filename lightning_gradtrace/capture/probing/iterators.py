"""Iterators that a training step takes from, such as a second dataloader's: what a run takes is given back.

An iterator can't be set back. So another one stands in its place while a model is run for the probe: it keeps what it
takes, begins anew with every run, and gives the training what was kept before it takes more.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from typing_extensions import override

from lightning_gradtrace.capture.probing.random_state import RandomState


@dataclass(frozen=True)
class Place:
    """Where an object hangs: an attribute, an entry of a container, a variable of a function.

    Attributes:
        get: returns what hangs there now.
        put: hangs something else there.
    """

    get: Callable[[], Any]
    put: Callable[[Any], Any]


_END = object()


class Peeked(Iterator[Any]):
    """Stands in the place of an iterator, and leaves it when all that was kept has been taken.

    Args:
        source: the iterator.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._kept: deque[Any] = deque()
        self._taken: int | None = 0  # of those that are kept, by the run under way; None while no model is run
        self._places: list[Place] = []

    @override
    def __next__(self) -> Any:
        if self._taken is None:
            item = self._kept.popleft() if self._kept else next(self._source, _END)
            if not self._kept:
                self.give_way()
        else:
            if self._taken == len(self._kept):
                before = RandomState.now()
                self._kept.append(next(self._source, _END))
                if not before.is_same(RandomState.now()):
                    _warn(self._source)
            item = next(islice(self._kept, self._taken, None))
            self._taken += 1
        if item is _END:
            raise StopIteration
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __bool__(self) -> bool:
        return bool(self._source)

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def stand_in(self, place: Place) -> None:
        """Take the place of the iterator."""
        place.put(self)
        self._places.append(place)

    def rewind(self) -> None:
        """Begin anew, for another run."""
        self._taken = 0

    def end(self) -> None:
        """Give what was kept to the training, which goes on."""
        self._taken = None
        if not self._kept:
            self.give_way()

    def give_way(self) -> None:
        """Put the iterator back in its place."""
        for place in self._places:
            if place.get() is self:
                place.put(self._source)
        self._places.clear()


class Iterators:
    """The iterators that were met while a module was looked at."""

    def __init__(self) -> None:
        self._peeked: dict[int, Peeked] = {}

    def look(self, places: Iterable[Place]) -> bool:
        """Let others stand in the places of iterators, and say whether there were any."""
        found = False
        for place in places:
            value = place.get()
            if isinstance(value, Peeked):
                self._peeked[id(value)] = value
                value.rewind()
            elif _is_plain(value):
                peeked = self._peeked.setdefault(id(value), Peeked(value))
                peeked.stand_in(place)
                found = True
        return found

    def rewind(self) -> None:
        """Begin anew, for another run."""
        for peeked in self._peeked.values():
            peeked.rewind()

    def end(self) -> None:
        """Give what was kept to the training, which goes on."""
        for peeked in self._peeked.values():
            peeked.end()


def _is_plain(value: Any) -> bool:
    """Say whether a value is an iterator whose state does not lie in attributes; a file may be set back by itself."""
    of_python = type(value).__module__.partition(".")[0] in ("builtins", "itertools", "torch", "_collections_abc")
    return isinstance(value, Iterator) and of_python and not isinstance(value, (io.IOBase, torch.nn.Module))


def _warn(source: Any) -> None:
    warnings.warn(
        f"GradTrace: `training_step` took from an iterator (`{type(source).__name__}`) that draws random numbers as it "
        "goes on. To find out where the samples are the step was run again, which drew earlier than the training would "
        "have: from here on the training is not the same as without GradTrace. Let the iterator draw from a "
        "`torch.Generator` of its own.",
        stacklevel=3,
    )
