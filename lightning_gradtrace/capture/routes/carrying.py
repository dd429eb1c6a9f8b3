"""Which functions carry on what the axes of activations hold (`layouts.py`), and how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import Facts, names_of, tensors_among
from lightning_gradtrace.capture.forward.taint import Taint
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.intake.batch import sample_axis_of, tensors
from lightning_gradtrace.capture.routes import layouts
from lightning_gradtrace.capture.routes.apart import ALONG, KEEPS
from lightning_gradtrace.capture.routes.layouts import Holds, Layout, Note
from lightning_gradtrace.capture.routes.mixing import LAYERS, PRODUCTS, REDUCTIONS, TRANSFORMS, Terms, terms_of
from lightning_gradtrace.capture.routes.reshaping import carried, overwritten

_COPIES = KEEPS | ALONG | names_of("data int long short bool byte")
_CHOICES = names_of("where masked_fill masked_fill_ clamp __and__ __or__ __xor__ __invert__")
_STRETCHES = names_of("expand expand_as broadcast_to")
_BAGS = names_of("embedding_bag")
_BY_LETTERS = (
    {*PRODUCTS, *REDUCTIONS, *TRANSFORMS, *LAYERS}
    | names_of("embedding baddbmm grid_sample grid_sampler cdist scaled_dot_product_attention")
    | _BAGS
)
_JOINS = names_of("cat concat concatenate stack")


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
        self._unversioned: dict[int, Callable[[], Tensor | None]] = {}  # writing to them leaves versions as they are
        self._is_needed = n_samples > 1
        for tensor in tensors(batch) if self._is_needed else ():
            is_plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_inference()
            axis = sample_axis_of(tensor, n_samples, batch_axis) if is_plain and has_place(tensor) else None
            if axis is not None:
                kinds = [Holds.SAMPLES if i == axis else Holds.OTHER for i in range(tensor.dim())]
                given = tuple(layouts.one(size, holds) for size, holds in zip(tensor.shape, kinds, strict=True))
                self._notes[id(tensor)] = Note.of(tensor, given)

    def __call__(self, tensor: Tensor) -> Note | None:
        """Return the note on a tensor, None if nothing is known of it, or it was written to since."""
        found = self._notes.get(id(tensor))
        return found if found is not None and found.is_of(tensor) else None

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
        call = (name, known, function, args, kwargs)
        outputs = args[0] if name == "__setitem__" else result
        for number, output in enumerate(tensors_among((outputs,))):
            if not output.is_nested:
                with suppress(Exception):  # what can't be read is no reason to stop the user's forward pass
                    self._take(call, output, number, use, taint)

    def _take(self, call: tuple[Any, ...], output: Tensor, number: int, use: Use | None, taint: Taint) -> None:
        name, known, function, args, kwargs = call
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if known.in_place and self._unversioned.get(id(first), lambda: None)() is first is not None:
            self._notes.clear()  # nothing tells whose values these were
        if name == "__setitem__":
            self._overwritten(args, taint)
        if name == "data":
            self._unversioned[id(output)] = weakref.ref(output)
        alike = known.pointwise or name in _CHOICES
        if alike or name in _COPIES or name in _STRETCHES:
            met = [t for t in tensors_among((*args, *kwargs.values()) if alike else args[:1]) if taint(t)]
            holds = Holds.ALIKE if name in _STRETCHES else Holds.OTHER
            if self._stretched(output, met, taint, holds, is_written=known.in_place):
                return
        if use is not None and use.rule is not None and name not in _BAGS:
            self._through_rule(output, use)
        elif name in _BY_LETTERS:
            self._by_letters(name, output, args, kwargs, taint)
        elif name in _JOINS:
            self._joined(name, output, args, kwargs, taint)
        elif first is not None and not known.in_place and (note := self(first)) is not None:
            carry = carried(name, function, args, kwargs, tuple(output.shape), number)
            if carry is not None:
                self._notes[id(output)] = Note(output, [note], carry)

    def _stretched(
        self, output: Tensor, batched: Sequence[Tensor], taint: Taint, holds: Holds, *, is_written: bool
    ) -> bool:
        """Take note of tensors that met entry by entry, unless nothing is known of any."""
        met = [t for t in batched if not taint.draws(t)]
        written = self._notes.get(id(output)) if is_written else None
        notes = [written if written and t is output and written.is_of(t, n_writes=1) else self(t) for t in met]
        if not any(notes):
            return False
        shape, sizes = tuple(output.shape), [tuple(t.shape) for t in met]
        drawn = [tuple(t.shape) for t in batched if taint.draws(t)]

        def carry(*found: Layout | None) -> Layout:
            return layouts.stretched(shape, zip(found, sizes, strict=True), holds, drawn)

        self._notes[id(output)] = Note(output, notes, carry)
        return True

    def _overwritten(self, args: tuple[Any, ...], taint: Taint) -> None:
        """Keep the note on a tensor into which numbers were written, or rows of samples where theirs are."""
        target, index, value = args
        note = self._notes.get(id(target))
        if note is None or not note.is_of(target, n_writes=1):
            return
        is_rows = isinstance(value, Tensor) and value.dim() > 0 and taint(value)
        sizes = tuple(value.shape) if is_rows else ()

        def carry(before: Layout | None, written: Layout | None = None) -> Layout | None:
            return overwritten(before, index, written, sizes) if is_rows else before

        self._notes[id(target)] = Note(target, [note, *([self(value)] if is_rows else [])], carry)

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
            self._lettered(output, kept, [(t, term) for t, term in terms if taint(t)])

    def _lettered(self, output: Tensor, kept: str, terms: Sequence[tuple[Tensor, str]]) -> None:
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
        if (
            not isinstance(dim, int) or not notes or None in notes or len(batched) < len(parts)
        ):  # constants may be shared
            return
        axis, shape = dim % output.dim(), tuple(output.shape)

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
                alike = len(set(along)) == 1
                met[axis] = (
                    layouts.beside(along[0], len(known), outside=True)
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
    if name in _BAGS:  # bags are as many as their offsets
        return [(args[2], "a")], "aZ"
    read = terms_of(name, args, kwargs)
    if read is not None and name in LAYERS:  # weights may come from the batch
        if kwargs.get("groups", args[6] if len(args) > 6 else 1) != 1 or len(args) < 2:
            return None
        (layer,), kept = read
        inside = layer[1][-1 - LAYERS[name]]
        return [layer, (args[1], f"Z{inside}{'0123456789'[: args[1].dim() - 2]}")], kept
    if read is None or len(read[1]) == output.dim() or name not in REDUCTIONS or "quantile" in name:
        return read
    terms, kept = read
    return terms, "".join(letter if letter in kept else "." for letter in terms[0][1])  # axes of size 1 are left
