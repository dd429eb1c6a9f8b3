"""How views, cuts, repetitions and other functions of one tensor change what its axes hold (`layouts.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.routes import layouts
from lightning_gradtrace.capture.routes.layouts import Holds, Layout
from lightning_gradtrace.capture.routes.orders import SORTS
from lightning_gradtrace.capture.routes.picking import AXES

_CUTS = names_of("narrow split chunk tensor_split split_with_sizes index_select flip roll glu") | SORTS.keys()
"""Functions that leave some entries along axes, or in another order."""
_SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)},
    **{"pixel_shuffle": 3, "pixel_unshuffle": 3},
}
"""Functions that change the last axes alone, and how many."""


@dataclass(frozen=True)
class OneCall:
    """A call of a function that makes its result of its first argument.

    Attributes:
        name: name of the function.
        function: the function.
        args: its positional arguments; tensors among them, but for the first, may be without values.
        kwargs: its named arguments.
        shape: shape of the result.
        number: which result it is.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...]
    number: int

    def argument(self, place: int, key: str = "dim", default: Any = None) -> Any:
        """Return an argument, wherever it stands."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(key, default)


def carried(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shape: tuple[int, ...],
    number: int = 0,
) -> Callable[[Layout | None], Layout | None] | None:
    """Return what gives the layout of a result for that of the first argument; None for functions that tell nothing.

    Args:
        name: name of the function.
        function: the function.
        args: its positional arguments.
        kwargs: its named arguments.
        shape: shape of the result.
        number: which result it is, if there are several.
    """
    change = _CHANGES.get(name)
    if change is None:
        return None
    call = OneCall(
        name, function, tuple(map(_light, args)), {key: _light(kwargs[key]) for key in kwargs}, shape, number
    )
    return lambda layout: None if layout is None else change(layout, call)


def _light(value: Any) -> Any:
    """Return an argument without the values of its tensors, which a note is not to keep alive."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    return type(value)(map(_light, value)) if type(value) in (tuple, list) else value


def _viewed(layout: Layout, call: OneCall) -> Layout | None:
    return layouts.reshaped(layout, call.shape)


def _turned(layout: Layout, call: OneCall) -> Layout:
    sizes = tuple(range(2, len(layout) + 2))  # another one for each axis
    turned = call.function(torch.empty(sizes, device="meta"), *call.args[1:], **call.kwargs)
    return tuple(layout[size - 2] for size in turned.shape)


def _cut(layout: Layout, call: OneCall) -> Layout | None:
    key = "dims" if call.name in ("flip", "roll") else "dim"
    place, usual = (1, -1) if call.name == "glu" else AXES[call.name]
    dims = call.argument(place, key, usual)
    if call.name == "flip" and isinstance(dims, int):  # they may stand one by one
        dims = call.args[1:]
    axes = [dims] if isinstance(dims, int) else dims
    if not isinstance(axes, (list, tuple)):
        return None
    along = {axis % len(layout) for axis in axes}
    sizes = enumerate(zip(layout, call.shape, strict=True))
    return tuple(layouts.cut(axis, size) if i in along else axis for i, (axis, size) in sizes)


def _picked(layout: Layout, call: OneCall) -> Layout | None:
    """Return the layout of one entry along an axis, None if it may be that of one sample."""
    axis = 0 if call.name == "__iter__" else call.argument(1, default=0) % len(layout)
    return (*layout[:axis], *layout[axis + 1 :]) if layouts.is_free(layout[axis]) else None


def _in_classes(layout: Layout, call: OneCall) -> Layout:
    return (*layout, layouts.one(call.shape[-1], Holds.OTHER))


def _repeated(layout: Layout, call: OneCall) -> Layout:
    ahead: Layout = ((),) * (len(call.shape) - len(layout))
    sizes = zip((*ahead, *layout), call.shape, strict=True)
    return tuple(layouts.beside(axis, size // max(layouts.size_of(axis), 1), outside=True) for axis, size in sizes)


def _repeated_one_by_one(layout: Layout, call: OneCall) -> Layout | None:
    times, axis = call.argument(1, "repeats"), call.argument(2)
    if not isinstance(times, int) or axis is None:
        return None
    axis %= len(layout)
    return (*layout[:axis], layouts.beside(layout[axis], times, outside=False), *layout[axis + 1 :])


def _at_the_end(layout: Layout, call: OneCall) -> Layout:
    """Return the layout after a function that changes the last axes."""
    n_last = len(layout) - 2 if call.name == "interpolate" else _SPATIAL.get(call.name)
    n_last = len(call.argument(1, "pad")) // 2 if n_last is None else n_last
    kept = len(layout) - n_last
    holds = Holds.OTHER if all(map(layouts.is_free, layout[kept:])) else Holds.UNKNOWN
    return (*layout[:kept], *(layouts.one(size, holds) for size in call.shape[kept:]))


def _recurred(layout: Layout, call: OneCall) -> Layout | None:
    """Return the layout of the outputs of a recurrent layer, (position, sample, feature) or with the samples first."""
    if len(layout) != 3 or len(call.args) < 9:  # packed, or a single sequence
        return None
    features = layouts.one(call.shape[-1], Holds.OTHER)
    if call.number == 0:
        return (*layout[:2], features)
    return (layouts.one(call.shape[0], Holds.OTHER), layout[0 if call.args[8] else 1], features)


def overwritten(layout: Layout | None, index: Any, written: Layout | None, sizes: tuple[int, ...]) -> Layout | None:
    """Return the layout of a tensor after something of the batch was written into it, None if that may lie otherwise.

    Args:
        layout: its layout before.
        index: what stood in the brackets.
        written: layout of what was written.
        sizes: its shape.
    """
    part = None if layout is None else in_brackets(layout, index)
    if layout is None or part is None:
        return None
    shape = tuple(map(layouts.size_of, part))
    here = layouts.stretched(shape, [(part, shape)])
    return layout if layouts.stretched(shape, [(part, shape), (written, sizes)]) == here else None


def _indexed(layout: Layout, call: OneCall) -> Layout | None:
    return in_brackets(layout, call.args[1]) if math.prod(call.shape) else None


def in_brackets(layout: Layout, index: Any) -> Layout | None:
    """Return the layout after an index in brackets, None where a mask or several lists of numbers pick entries."""
    parts = index if isinstance(index, tuple) else (index,)
    n_used = sum(part is not None and part is not Ellipsis for part in parts)
    found, axis, lists = list[layouts.Axis](), 0, 0
    for part in parts:
        if part is None:
            found.append(())
        elif part is Ellipsis:
            ahead = len(layout) - n_used
            found += layout[axis : axis + ahead]
            axis += ahead
        elif isinstance(part, slice):
            size = len(range(*part.indices(layouts.size_of(layout[axis]))))
            is_whole = size == layouts.size_of(layout[axis]) and part.step in (None, 1)
            found.append(layout[axis] if is_whole else layouts.cut(layout[axis], size))
            axis += 1
        elif isinstance(part, bool) or (isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)):
            return None
        elif isinstance(part, int) or (isinstance(part, Tensor) and part.dim() == 0):
            if not layouts.is_free(layout[axis]):
                return None
            axis += 1
        elif isinstance(part, (Tensor, list)) and lists == 0:
            size = len(part)
            if isinstance(part, Tensor) and part.dim() > 1:
                return None
            found.append(layouts.cut(layout[axis], size))
            axis, lists = axis + 1, 1
        else:
            return None
    has_numbers = any(isinstance(part, int) or (isinstance(part, Tensor) and not part.dim()) for part in parts)
    return None if lists and has_numbers else (*found, *layout[axis:])


_CHANGES: dict[str, Callable[[Layout, OneCall], Layout | None]] = {
    **dict.fromkeys(names_of("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"), _viewed),
    **dict.fromkeys(names_of("transpose permute movedim moveaxis swapaxes swapdims t T mT"), _turned),
    **dict.fromkeys(_CUTS, _cut),
    **dict.fromkeys(names_of("select unbind __iter__"), _picked),
    **dict.fromkeys(names_of("repeat tile"), _repeated),
    **dict.fromkeys((*_SPATIAL, "pad", "interpolate"), _at_the_end),
    **dict.fromkeys(names_of("lstm gru rnn_tanh rnn_relu"), _recurred),
    **{"__getitem__": _indexed, "one_hot": _in_classes, "repeat_interleave": _repeated_one_by_one},
}
