"""What a pass does with its random numbers, call by call: the same line of code may draw them for another purpose."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of, tensors_among
from lightning_gradtrace.capture.placing.batch_axis import candidates
from lightning_gradtrace.capture.probing.draws import DrawSite

Way = tuple[Any, ...]
"""A function and how it was called, apart from sizes that change from batch to batch."""

# Functions whose whole numbers are axes; those of others are sizes, counts and places, which change.
_WITH_AXES = names_of(
    "unsqueeze squeeze transpose permute movedim moveaxis swapaxes swapdims flatten cat concat concatenate stack sum "
    "mean amax amin max min prod logsumexp softmax log_softmax norm vector_norm cumsum cumprod std var index_select "
    "gather take_along_dim tensordot argmax argmin sort diagonal"
)


@dataclass(frozen=True)
class Call:
    """A call with random numbers among its arguments.

    Attributes:
        sites: where they were drawn, but for those that no gradient passes any more.
        way: the function and how it was called.
        passes: whether gradients pass these arguments.
    """

    sites: frozenset[DrawSite]
    way: Way
    passes: bool


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
        self._aside: dict[int, Callable[[], Tensor | None]] = {}  # what no gradient passes

    def before(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Look at a call that comes; None if there are no random numbers among its arguments."""
        drawn = [t for t in tensors_among((*args, *kwargs.values())) if self._draws(t)]
        if not drawn:
            return None
        sites = frozenset[DrawSite]().union(*(self._draws(t) for t in drawn if not self._is_aside(t)))
        way = (name, self._shape(name, args), *((key, self._shape(name, kwargs[key])) for key in sorted(kwargs)))
        return Call(sites, way, any(t.requires_grad for t in drawn))

    def after(self, call: Call, made: Any) -> None:
        """Take note of a call, unless it is one that nothing comes of, as what is logged.

        Args:
            call: from `before`.
            made: what it returned, or wrote into.
        """
        tensors = list(tensors_among((made,)))
        ends = call.passes and not any(t.requires_grad or not t.is_floating_point() for t in tensors)
        if ends or not call.sites:
            self._aside.update((id(t), weakref.ref(t)) for t in tensors)
        elif any(candidates(t.shape, self._n_samples or 1) for t in tensors):
            for site in call.sites:
                self._of.setdefault(site, set()).add(call.way)

    def _is_aside(self, tensor: Tensor) -> bool:
        found = self._aside.get(id(tensor))
        return found is not None and found() is tensor

    def of(self, site: DrawSite) -> frozenset[Way]:
        """Return the ways in which the random numbers of a place were used."""
        return frozenset(self._of.get(site, ()))

    def _shape(self, name: str, value: Any) -> Any:
        """Return what stays the same of an argument from batch to batch."""
        if isinstance(value, Tensor):
            sizes = tuple(-1 if size == self._n_samples else min(size, 2) for size in value.shape)
            return sizes, len(self._draws(value)) > 0
        if isinstance(value, (list, tuple)):
            is_long = isinstance(value, list) or any(isinstance(item, Tensor) for item in value)
            found = [self._shape(name, item) for item in value]
            return frozenset(found) if is_long else tuple(found)
        if isinstance(value, (bool, str)) or value is None:
            return value
        if isinstance(value, int):
            if value == self._n_samples:
                return "n"
            return value if value in (-1, 1) or name in _WITH_AXES else "int"
        return type(value).__name__
