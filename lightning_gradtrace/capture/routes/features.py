"""Which axes of activations hold features alone: those that weights made, however views have cut them.

Three projections that are stacked, (3, position, sample, feature), come from one axis of features. Whoever picks the
first of three projections picks no sample, also of a batch of three.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.forward.use import Use

_VIEWS = names_of(
    "view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze t"
)
_COPIES = names_of("contiguous clone detach")


@dataclass(frozen=True)
class _Made:
    """How an activation came from the output of a use, of which its shape is kept."""

    tensor: Callable[[], Tensor | None]
    use: Callable[[], Use | None]
    shape: torch.Size
    views: tuple[Callable[[Tensor], Tensor], ...] = ()


class Features:
    """Follows the axes of features through the views of one forward pass."""

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}

    def after(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        use: Use | None,
    ) -> None:
        """Take note of the result of a function.

        Args:
            name: name of the function.
            function: the function.
            args: its positional arguments.
            kwargs: its named arguments.
            result: what it returned.
            use: the use that the call was, None if it was none.
        """
        if not isinstance(result, Tensor) or result.is_nested:
            return
        if use is not None:
            if use.rule is not None:
                self._made[id(result)] = _Made(weakref.ref(result), weakref.ref(use), result.shape)
        elif args and (name in _VIEWS or name in _COPIES) and (before := self._of(args[0])) is not None:
            views = before.views
            if name in _VIEWS:
                views = (*views, lambda marks: function(marks, *args[1:], **kwargs))
            self._made[id(result)] = _Made(weakref.ref(result), before.use, before.shape, views)

    def _of(self, tensor: Any) -> _Made | None:
        found = self._made.get(id(tensor))
        return found if found is not None and found.tensor() is tensor else None

    def axes(self, tensor: Tensor, n_samples: int) -> frozenset[int]:
        """Return the axes of a tensor in which features leave no room for the samples; none if nothing is known.

        Args:
            tensor: a tensor of the pass.
            n_samples: number of samples.
        """
        made = self._of(tensor)
        use = None if made is None else made.use()
        bound = None if use is None else use.bound()
        if made is None or bound is None:
            return frozenset()
        own = [axis for axis in range(len(made.shape)) if axis not in bound.axes.values()]
        marks = torch.zeros((), dtype=torch.int64, device="cpu")
        for axis in own:  # every feature has a number, the same for all samples and positions
            sizes = [1] * len(made.shape)
            sizes[axis] = made.shape[axis]
            marks = marks * made.shape[axis] + torch.arange(made.shape[axis], device="cpu").view(sizes)
        marks = marks.expand(made.shape)
        try:
            for view in made.views:
                marks = view(marks)
        except RuntimeError:  # of numbers in another format
            return frozenset()
        if marks.shape != tensor.shape:
            return frozenset()
        return frozenset(axis for axis in range(marks.dim()) if _n_along(marks, axis) * n_samples > marks.shape[axis])


def _n_along(marks: Tensor, axis: int) -> int:
    """Return how many features lie along an axis."""
    row = marks.movedim(axis, -1)
    return len(row[(0,) * (row.dim() - 1)].unique()) if marks.numel() else 1
