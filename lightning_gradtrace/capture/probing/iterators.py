"""Iterators that a training step takes from, such as a second dataloader's: a run for the probe takes nothing of them.

An iterator can't be set back. So while a model is run another one stands in its place: a copy, where it is one of
Python's own over something that does not change; else one that gives nothing and says why, and the run fails.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

_SOURCES: tuple[Iterable[Any], ...] = ([], (), range(0), "", b"")
_COPIED = (*(type(iter(source)) for source in _SOURCES), itertools.count, itertools.repeat)


@dataclass(frozen=True)
class Place:
    """Where an object hangs: an attribute, an entry of a container, a variable of a function.

    Attributes:
        get: returns what hangs there now.
        put: hangs something else there.
    """

    get: Callable[[], Any]
    put: Callable[[Any], Any]


class Spare(Iterator[Any]):
    """Stands in the place of an iterator for one run, and leaves it as it is.

    Args:
        source: the iterator.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._copy = _copy(source) if type(source) in _COPIED else None

    @override
    def __next__(self) -> Any:
        if self._copy is None:
            raise RuntimeError(
                f"`training_step` takes from an iterator (`{type(self._source).__name__}`), which can't be set back"
            )
        return copy.deepcopy(next(self._copy))  # the training gets it again

    def __bool__(self) -> bool:
        return bool(self._source)


class Iterators:
    """The iterators that were met while a module was looked at, and the places where they hang."""

    def __init__(self) -> None:
        self._met: list[tuple[Place, Any]] = []

    def add(self, places: Iterable[Place]) -> None:
        """Take note of iterators."""
        self._met += [(place, place.get()) for place in places]

    def replace(self) -> None:
        """Let others stand in the places of the iterators, for one run."""
        spares: dict[int, Spare] = {}
        for place, source in self._met:
            place.put(spares.setdefault(id(source), Spare(source)))

    def put_back(self) -> None:
        """Hang every iterator where it hung, unless something else than another one hangs there."""
        for place, source in self._met:
            if isinstance(place.get(), Spare):
                place.put(source)


def is_iterator(value: Any) -> bool:
    """Say whether a value is an iterator; one that stands in for another, and a file, are none."""
    if getattr(type(value), "__next__", None) is None or isinstance(value, (Spare, io.IOBase)):
        return False
    return isinstance(value, Iterator)


def _copy(source: Iterator[Any]) -> Iterator[Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return copy.copy(source)
        except TypeError:  # those of itertools can't be copied in all versions of Python
            return None
