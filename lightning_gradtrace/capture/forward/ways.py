"""What a pass does with its random numbers, call by call: the same line of code may draw them for another purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.functions import tensors_among
from lightning_gradtrace.capture.probing.draws import DrawSite

Way = tuple[Any, ...]
"""A function and how it was called, apart from sizes that change from batch to batch."""

# Larger numbers are sizes or counts, and places in an index belong to loops; smaller ones are axes and choices.
_LARGEST = 8
_INDEXES = frozenset(("__getitem__", "select", "narrow", "unbind"))


class Ways:
    """Collects the ways in which random numbers were used, by the place where they were drawn.

    Args:
        n_samples: number of samples of the batch.
        draws: says where the random numbers were drawn that a tensor is made of.
    """

    def __init__(self, n_samples: int | None, draws: Callable[[Tensor], frozenset[DrawSite]]) -> None:
        self._n_samples = n_samples
        self._draws = draws
        self._of: dict[DrawSite, set[Way]] = {}

    def note(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of a call, if there are random numbers among its arguments."""
        sites = frozenset[DrawSite]().union(*map(self._draws, tensors_among((*args, *kwargs.values()))))
        if sites:
            way = (name, self._shape(name, args), *((key, self._shape(name, kwargs[key])) for key in sorted(kwargs)))
            for site in sites:
                self._of.setdefault(site, set()).add(way)

    def of(self, site: DrawSite) -> frozenset[Way]:
        """Return the ways in which the random numbers of a place were used."""
        return frozenset(self._of.get(site, ()))

    def _shape(self, name: str, value: Any) -> Any:
        """Return what stays the same of an argument from batch to batch."""
        if isinstance(value, Tensor):
            sizes = tuple(-1 if size == self._n_samples else min(size, 2) for size in value.shape)
            return sizes, len(self._draws(value)) > 0
        if isinstance(value, (list, tuple)):
            found = [self._shape(name, item) for item in value]
            return tuple(found) if not any(isinstance(item, Tensor) for item in value) else frozenset(found)
        if isinstance(value, (bool, str)) or value is None:
            return value
        if isinstance(value, int) and name not in _INDEXES:
            return "n" if value == self._n_samples else value if abs(value) <= _LARGEST else "many"
        return type(value).__name__
