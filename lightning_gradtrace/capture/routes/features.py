"""Which axes of activations hold features alone: those that weights or classes made, as views and entry by entry go on.

Three projections that are stacked, (3, position, sample, feature), come from one axis of features. Whoever picks the
first of three projections picks no sample, also of a batch of three; nor does who picks one of three experts.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import Facts, names_of, tensors_among
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.routes.orders import SORTS

_VIEWS = names_of(
    "view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze t"
)
_COPIES = names_of(
    "contiguous clone detach type to float double half bfloat16 dropout softmax log_softmax layer_norm rms_norm "
    "normalize"
)
_REDUCES = names_of("sum mean amax amin logsumexp std var")
_WITH_ROWS = names_of("matmul __matmul__ mm cdist")


@dataclass(frozen=True)
class _Made:
    """How an activation came from the output of a call, of which its shape and axes of features are kept."""

    tensor: Callable[[], Tensor | None]
    features: Callable[[], Collection[int]]
    shape: torch.Size
    views: tuple[Callable[[Tensor], Tensor], ...] = ()


class Features:
    """Follows the axes of features through one forward pass.

    Args:
        n_samples: number of samples.
    """

    def __init__(self, n_samples: int) -> None:
        self._n = n_samples
        self._made: dict[int, _Made] = {}

    def after(
        self,
        name: str,
        known: Facts,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        use: Use | None,
        is_batched: Callable[[Tensor], bool],
    ) -> None:
        """Take note of the result of a function.

        Args:
            name: name of the function.
            known: facts about it.
            function: the function.
            args: its positional arguments.
            kwargs: its named arguments.
            result: what it returned.
            use: the use that the call was, None if it was none.
            is_batched: says whether a tensor comes from the batch.
        """
        if name in SORTS and args and isinstance(args[0], Tensor):
            self._sorted(SORTS[name], args, kwargs, result)
        if not isinstance(result, Tensor) or result.is_nested:
            return
        alike = known.pointwise or name in _COPIES
        if alike and (before := self._like(result, args)) is not None:
            self._made[id(result)] = replace(before, tensor=weakref.ref(result))
        elif known.pointwise and (axes := self._stretched(result, args, is_batched)):
            self._mark(result, *axes)
        elif use is not None and use.rule is not None:
            own = functools.partial(_made_by, weakref.ref(use), result.dim())
            self._made[id(result)] = _Made(weakref.ref(result), own, result.shape)
        elif name == "one_hot" or (name in _WITH_ROWS and _is_matrix(args[1:2]) and not is_batched(args[1])):
            self._mark(result, -1)  # classes, columns of a constant, distances from its rows
        elif name in _VIEWS | _REDUCES and args and (before := self._of(args[0])) is not None:
            call = _largest if name in _REDUCES else function
            views = (*before.views, lambda marks: call(marks, *args[1:], **kwargs))
            self._made[id(result)] = replace(before, tensor=weakref.ref(result), views=views)

    def _sorted(self, where: tuple[int, int], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Take note of what was sorted along an axis of features: such an axis it is still, however long."""
        place, default = where
        axis, n_axes = args[place] if len(args) > place else kwargs.get("dim", default), args[0].dim()
        if isinstance(axis, int) and n_axes and axis % n_axes in self.axes(args[0]):
            for one in tensors_among((result,)):
                self._mark(one, axis)

    def _like(self, result: Tensor, args: Sequence[Any]) -> _Made | None:
        """Return what is known of an argument of the shape of the result, None if nothing is."""
        alike = (self._of(one) for one in args if isinstance(one, Tensor) and one.shape == result.shape)
        return next(filter(None, alike), None)

    def _stretched(self, result: Tensor, args: Sequence[Any], is_batched: Callable[[Tensor], bool]) -> list[int]:
        """Return the axes of features after arguments were stretched to each other.

        They are those of the arguments, and those that only constants have: what is compared with the numbers of all
        experts has an axis of experts.
        """
        if all(t.shape == result.shape for t in tensors_among(args)):  # nearly always
            return []
        sizes = [(t, (1,) * (result.dim() - t.dim()) + tuple(t.shape)) for t in tensors_among(args)]
        batched = [(t, size) for t, size in sizes if is_batched(t)]
        if not batched:
            return []
        found = {
            axis for axis, size in enumerate(result.shape) if size > 1 and all(own[axis] == 1 for _, own in batched)
        }
        for t, own in batched:
            ahead = result.dim() - t.dim()
            found |= {axis + ahead for axis in self.axes(t) if own[axis + ahead] == result.shape[axis + ahead]}
        return sorted(found)

    def _mark(self, tensor: Tensor, *axes: int) -> None:
        own = tuple(axis % tensor.dim() for axis in axes)
        self._made[id(tensor)] = _Made(weakref.ref(tensor), lambda: own, tensor.shape)

    def _of(self, tensor: Any) -> _Made | None:
        found = self._made.get(id(tensor))
        return found if found is not None and found.tensor() is tensor else None

    def axes(self, tensor: Tensor) -> frozenset[int]:
        """Return the axes of a tensor in which features leave no room for the samples; none if nothing is known."""
        made = self._of(tensor)
        if made is None:
            return frozenset()
        marks = torch.zeros((), dtype=torch.int64, device="cpu")
        for axis in made.features():  # every feature has a number, the same for all samples and positions
            sizes = [1] * len(made.shape)
            sizes[axis] = made.shape[axis]
            marks = marks * made.shape[axis] + torch.arange(made.shape[axis], device="cpu").view(sizes)
        marks = marks.expand(made.shape)
        try:
            for view in made.views:
                marks = view(marks)
        except (RuntimeError, TypeError):  # of numbers in another format, or with arguments in another order
            return frozenset()
        if marks.shape != tensor.shape:
            return frozenset()
        return frozenset(axis for axis in range(marks.dim()) if _n_along(marks, axis) * self._n > marks.shape[axis])


def _largest(marks: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return marks.amax(() if dim is None else dim, keepdim)


def _made_by(use: Callable[[], Use | None], n_axes: int) -> Collection[int]:
    """Return the axes of the output of a use that hold features alone."""
    alive = use()
    bound = None if alive is None else alive.bound()
    return () if bound is None else [axis for axis in range(n_axes) if axis not in bound.axes.values()]


def _is_matrix(found: Sequence[Any]) -> bool:
    return any(isinstance(one, Tensor) and one.dim() > 1 for one in found)


def _n_along(marks: Tensor, axis: int) -> int:
    """Return how many features lie along an axis."""
    row = marks.movedim(axis, -1)
    return len(row[(0,) * (row.dim() - 1)].unique()) if marks.numel() else 1
