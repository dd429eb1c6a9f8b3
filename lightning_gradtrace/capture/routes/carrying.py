"""Which functions carry on what the axes of activations hold (`layouts.py`), and how."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import Facts, names_of, tensors_among
from lightning_gradtrace.capture.forward.taint import Taint
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.intake.batch import sample_axis_of, tensors
from lightning_gradtrace.capture.routes import layouts
from lightning_gradtrace.capture.routes.layouts import Holds, Layout, Note
from lightning_gradtrace.capture.routes.mixing import LAYERS, PRODUCTS, REDUCTIONS, TRANSFORMS, Terms, terms_of
from lightning_gradtrace.capture.routes.orders import SORTS

_COPIES = names_of(
    "contiguous clone detach data type to float double half bfloat16 dropout softmax log_softmax layer_norm rms_norm "
    "normalize batch_norm instance_norm group_norm requires_grad_ type_as alpha_dropout feature_dropout "
    "cumsum"
)
_CHOICES = names_of("where masked_fill masked_fill_ clamp __and__ __or__ __xor__ __invert__")
_SHAPES = names_of("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as")
_TURNS = names_of("transpose permute movedim moveaxis swapaxes swapdims t T mT")
_STRETCHES = names_of("expand expand_as broadcast_to")
_BY_LETTERS = {*PRODUCTS, *REDUCTIONS, *TRANSFORMS, *LAYERS} | names_of(
    "embedding baddbmm grid_sample grid_sampler cdist scaled_dot_product_attention"
)
_CUTS = {
    **{"narrow": 1, "split": 2, "chunk": 2, "tensor_split": 2, "split_with_sizes": 2, "index_select": 1},
    **{"flip": 1, "roll": 2, "glu": 1, **{name: at for name, (at, _) in SORTS.items()}},
}
"""Functions that leave some entries along an axis, and its place among the arguments."""
_USUALLY = {name: usual for name, (_, usual) in SORTS.items()} | {"glu": -1}
_UNPACKS = {"select": 1, "unbind": 1, "__iter__": 1}
_JOINS = names_of("cat concat concatenate stack")
_SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)},
    **{"pixel_shuffle": 3, "pixel_unshuffle": 3},
}
"""Functions that change the last axes alone, and how many."""


class Layouts:
    """Follows what the axes of activations hold through one forward pass.

    Args:
        batch: the batch, without what its samples share.
        n_samples: its number of samples.
        batch_axis: axis of the samples in its tensors.
        has_place: says of a tensor of the batch whether it holds samples in the ordinary way.
    """

    def __init__(self, batch: Any, n_samples: int, batch_axis: int, has_place: Callable[[Tensor], bool]) -> None:
        self._notes: dict[int, Note] = {}
        self._is_needed = n_samples > 1
        for tensor in tensors(batch) if self._is_needed else ():
            axis = None
            if tensor.layout is torch.strided and not tensor.is_nested and has_place(tensor):
                axis = sample_axis_of(tensor, n_samples, batch_axis)
            if axis is not None:
                kinds = [Holds.SAMPLES if i == axis else Holds.OTHER for i in range(tensor.dim())]
                given = tuple(layouts.one(size, holds) for size, holds in zip(tensor.shape, kinds, strict=True))
                self._notes[id(tensor)] = Note.of(tensor, given)

    def __call__(self, tensor: Tensor) -> Note | None:
        """Return the note on a tensor, None if nothing is known of it, or it was written to since."""
        found = self._notes.get(id(tensor))
        return found if found is not None and found.tensor() is tensor and found.version == tensor._version else None

    def axes(self, tensor: Tensor) -> frozenset[int]:
        """Return the axes of a tensor that leave no room for the samples; none if nothing is known."""
        return layouts.free_axes(self(tensor))

    def after(
        self,
        name: str,
        known: Facts,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        use: Use | None,
        taint: Taint,
    ) -> None:
        """Take note of the results of a function.

        Args:
            name: name of the function.
            known: facts about it.
            function: the function.
            args: its positional arguments.
            kwargs: its named arguments.
            result: what it returned.
            use: the use that the call was, None if it was none.
            taint: says which tensors come from the batch, and which were drawn.
        """
        if not self._is_needed:
            return
        first = args[0] if args and isinstance(args[0], Tensor) else None
        alike = known.pointwise or name in _CHOICES
        for number, output in enumerate(tensors_among((result,))):
            if output.is_nested:
                continue
            if alike or name in _COPIES or name in _STRETCHES:
                met = [t for t in tensors_among((*args, *kwargs.values()) if alike else args[:1]) if taint(t)]
                if self._stretched(output, met, taint, is_written=known.in_place):
                    continue
            if use is not None and use.rule is not None:
                self._through_rule(output, use)
            elif name in _BY_LETTERS:
                self._by_letters(name, output, args, kwargs, taint)
            elif name in _JOINS:
                self._joined(name, output, args, kwargs, taint)
            elif first is not None and not known.in_place and (note := self(first)) is not None:
                carry = _carried(name, function, first.dim(), tuple(output.shape), args, kwargs)
                if carry is not None:
                    self._notes[id(output)] = Note(output, [note], carry)

    def _stretched(self, output: Tensor, batched: Sequence[Tensor], taint: Taint, *, is_written: bool) -> bool:
        """Take note of tensors that met entry by entry, unless nothing is known of any.

        Random numbers fit themselves to the samples that they meet.
        """
        met = [t for t in batched if not taint.draws(t)]
        notes = [self._before(t) if is_written and t is output else self(t) for t in met]
        if not any(notes):
            return False
        shape, sizes = tuple(output.shape), [tuple(t.shape) for t in met]

        def carry(*found: Layout | None) -> Layout:
            return layouts.stretched(shape, zip(found, sizes, strict=True))

        self._notes[id(output)] = Note(output, notes, carry)
        return True

    def _before(self, tensor: Tensor) -> Note | None:
        """Return the note on a tensor before it was written to once."""
        found = self._notes.get(id(tensor))
        is_it = found is not None and found.tensor() is tensor and found.version == tensor._version - 1
        return found if is_it else None

    def _through_rule(self, output: Tensor, use: Use) -> None:
        operands = use.operands
        alive, shape = weakref.ref(use), tuple(output.shape)
        places = [i for i, operand in operands.items() if operand.note is not None]

        def carry(*found: Layout | None) -> Layout | None:
            owner = alive()
            bound = None if owner is None else owner.bound()
            if bound is None:
                return None
            source = dict(zip(places, found, strict=True)).get(-1 if bound.place is None else bound.place)
            from_input = {to: axis for axis, to in bound.axes.items()}
            axes = []
            for axis, size in enumerate(shape):
                if axis not in from_input:
                    axes.append(layouts.one(size, Holds.OTHER))
                elif source is None or layouts.size_of(source[from_input[axis]]) != size:
                    axes.append(layouts.one(size, Holds.UNKNOWN))
                else:
                    axes.append(source[from_input[axis]])
            return tuple(axes)

        self._notes[id(output)] = Note(output, [operands[i].note for i in places], carry)

    def _by_letters(
        self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], taint: Taint
    ) -> None:
        read = _read(name, args, kwargs, output)
        if read is not None:
            terms, kept = read
            self._take(output, kept, [(t, term) for t, term in terms if taint(t)])

    def _take(self, output: Tensor, kept: str, terms: Sequence[tuple[Tensor, str]]) -> None:
        notes = [self(t) for t, _ in terms]
        if not any(notes):
            return
        shape, sizes = tuple(output.shape), [(tuple(t.shape), term) for t, term in terms]

        def carry(*found: Layout | None) -> Layout | None:
            return layouts.by_letters(shape, kept, [(f, *size) for f, size in zip(found, sizes, strict=True)])

        self._notes[id(output)] = Note(output, notes, carry)

    def _joined(
        self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], taint: Taint
    ) -> None:
        parts = list(tensors_among((args[0] if args else kwargs.get("tensors", ()),)))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        batched = [t for t in parts if taint(t)]
        notes = [self(t) for t in batched]
        if not isinstance(dim, int) or not notes or None in notes or (len(batched) < len(parts) and dim == 0):
            return
        axis, shape, n_parts = dim % output.dim(), tuple(output.shape), len(parts)

        def carry(*found: Layout | None) -> Layout | None:
            known = [layout for layout in found if layout is not None]
            if len(known) < len(found) or not all(map(_holds_samples, known)):
                return None
            if name == "stack":
                known = [(*layout[:axis], (), *layout[axis:]) for layout in known]
            met = [
                layouts.one(size, Holds.OTHER) if i == axis else layouts.together([own[i] for own in known], size)
                for i, size in enumerate(shape)
            ]
            along = [layout[axis] for layout in known]
            if name != "stack" and not all(map(layouts.is_free, along)):
                alike = len(known) == n_parts and len(set(along)) == 1
                met[axis] = (
                    layouts.beside(along[0], n_parts, outside=True)
                    if alike
                    else layouts.one(shape[axis], Holds.UNKNOWN)
                )
            return tuple(met)

        self._notes[id(output)] = Note(output, notes, carry)


def _holds_samples(layout: Layout) -> bool:
    return any(holds is Holds.SAMPLES for axis in layout for _, holds in axis)


def _read(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> tuple[Terms, str] | None:
    """Return the operands of a function with their letters, and the letters of its result."""
    ahead = "abcdefghijk"[: max(output.dim() - 2, 0)]
    if name == "scaled_dot_product_attention" and len(args) > 2 and {t.dim() for t in args[:3]} == {output.dim()}:
        return [(args[0], f"{ahead}xy"), (args[1], f"{ahead}zy"), (args[2], f"{ahead}zw")], f"{ahead}xw"
    if name == "cdist" and len(args) > 1 and args[0].dim() == args[1].dim() == output.dim():
        return [(args[0], f"{ahead}xz"), (args[1], f"{ahead}yz")], f"{ahead}xy"
    if name == "embedding":  # rows of a table
        index = next((t for t in args[:2] if not t.is_floating_point()), None)
        return None if index is None else ([(index, own := "abcdefghijk"[: index.dim()])], f"{own}Z")
    read = terms_of(name, args, kwargs)
    if read is None or len(read[1]) == output.dim() or name not in REDUCTIONS or "quantile" in name:
        return read
    terms, kept = read
    return terms, "".join(letter if letter in kept else "." for letter in terms[0][1])  # axes of size 1 are left


def _carried(
    name: str,
    function: Callable[..., Any],
    n_axes: int,
    shape: tuple[int, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Callable[[Layout | None], Layout | None] | None:
    """Return what gives the layout of a result for that of the first argument, None for other functions."""
    rest = tuple(None if isinstance(value, Tensor) else value for value in args[1:])

    def argument(place: int, key: str = "dim", default: Any = None) -> Any:
        return args[place] if len(args) > place else kwargs.get(key, default)

    def each(change: Callable[[Layout], Layout | None]) -> Callable[[Layout | None], Layout | None]:
        return lambda layout: None if layout is None else change(layout)

    if name in _SHAPES:
        return each(lambda layout: layouts.reshaped(layout, shape))
    if name in _TURNS:
        return each(lambda layout: tuple(layout[axis] for axis in _turned(function, n_axes, rest, kwargs)))
    if name in _CUTS:
        dims = argument(_CUTS[name], "dims" if name in ("flip", "roll") else "dim", _USUALLY.get(name, 0))
        if name == "flip" and isinstance(dims, int):
            dims = args[1:]
        axes = [dims] if isinstance(dims, int) else dims
        if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, int) for axis in axes):
            return None
        along = {axis % n_axes for axis in axes}
        return each(
            lambda layout: tuple(
                layouts.cut(axis, size) if i in along else axis
                for i, (axis, size) in enumerate(zip(layout, shape, strict=True))
            )
        )
    if name in _UNPACKS:
        axis = argument(1, default=0) if name != "__iter__" else 0
        return each(lambda layout: _without(layout, axis % n_axes)) if isinstance(axis, int) else None
    if name == "__getitem__":
        return each(lambda layout: _indexed(layout, args[1], shape))
    if name == "one_hot":
        return each(lambda layout: (*layout, layouts.one(shape[-1], Holds.OTHER)))
    if name in ("repeat", "tile"):
        ahead = (layouts.one(1, Holds.OTHER),) * (len(shape) - n_axes)
        return each(
            lambda layout: tuple(
                layouts.beside(axis, size // max(layouts.size_of(axis), 1), outside=True)
                for axis, size in zip((*ahead, *layout), shape, strict=True)
            )
        )
    if name == "repeat_interleave" and isinstance(argument(1, "repeats"), int) and isinstance(argument(2), int):
        along_one, times = argument(2) % n_axes, argument(1, "repeats")
        return each(
            lambda layout: tuple(
                layouts.beside(axis, times, outside=False) if i == along_one else axis
                for i, axis in enumerate(layout)
            )
        )
    n_last = len(argument(1, "pad", ())) // 2 if name == "pad" else 2 if name == "interpolate" else _SPATIAL.get(name)
    if name == "interpolate":
        n_last = n_axes - 2
    if n_last:
        return each(lambda layout: _with_other_end(layout, n_last, shape))
    return None


def _turned(
    function: Callable[..., Any], n_axes: int, rest: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Sequence[int]:
    """Return which axes of its argument the axes of the result of a function are that turns them."""
    turned = function(torch.empty(tuple(range(2, n_axes + 2)), device="meta"), *rest, **kwargs)
    return [size - 2 for size in turned.shape]


def _without(layout: Layout, axis: int) -> Layout | None:
    """Return the layout of one entry along an axis, None if it may be that of one sample."""
    return (*layout[:axis], *layout[axis + 1 :]) if layouts.is_free(layout[axis]) else None


def _with_other_end(layout: Layout, n_last: int, shape: Sequence[int]) -> Layout:
    """Return the layout after a function that changes the last axes."""
    kept = len(layout) - n_last
    holds = Holds.OTHER if all(map(layouts.is_free, layout[kept:])) else Holds.UNKNOWN
    return (*layout[:kept], *(layouts.one(size, holds) for size in shape[kept:]))


def _indexed(layout: Layout, index: Any, shape: Sequence[int]) -> Layout | None:
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
    return None if (lists and has_numbers) or not math.prod(shape) else (*found, *layout[axis:])
