"""Follows the rows of samples that are strung together: what is gathered by pointers, added up, joined and padded.

Owners (`rows.py`) move with the rows wherever these are picked. What is new here is that rows are made: messages are
added up in zeros with a row for each node. Pointers tell which kind of rows they lead to, also where none leads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.intake.packed import owners_of, packed_in
from lightning_gradtrace.capture.intake.strung import Strung
from lightning_gradtrace.capture.routes.apart import MOVES
from lightning_gradtrace.capture.routes.picking import PICKS, Call
from lightning_gradtrace.capture.routes.rows import Fate, Owners, belonging_to, constant, sole_owner
from lightning_gradtrace.capture.routes.writing import WRITES, index_of, value_of

_COPIES = names_of("clone contiguous detach to long int type")


class StrungRows:
    """Knows the rows of strung samples in one forward pass.

    Args:
        batch: the batch.
        n_samples: its number of samples.
    """

    def __init__(self, batch: Any, n_samples: int) -> None:
        self._strung = Strung(batch, n_samples)
        self._packed = list(packed_in(batch))
        self._by_size: dict[int, Tensor | None] = dict(self._strung.by_size)
        self._met: dict[int, Callable[[], Tensor | None]] = {}
        # For pointers, the number of the layout that each leads to.
        self._leads: dict[int, tuple[Callable[[], Tensor | None], Tensor]] = {}
        for tensor, kinds in self._strung.pointers():
            self._leads[id(tensor)] = weakref.ref(tensor), kinds

    def __bool__(self) -> bool:
        return bool(self._strung)

    def given(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tensors of the batch that hold rows, each with the owners of its entries."""
        yield from self._strung.owners()
        yield from ((packed.data, owners_of(packed)) for packed in self._packed)

    @property
    def orders(self) -> list[Tensor]:
        """Tensors of packed texts that hold no samples: how many texts there are at every position, and their order."""
        return [numbers for packed in self._packed for numbers in packed[1:] if numbers is not None]

    @property
    def doubtful(self) -> list[Tensor]:
        """Tensors of the batch of which nobody knows what their rows are."""
        return self._strung.doubtful

    def take_note(self, call: Call, owners: Sequence[Owners | None]) -> None:
        """Take note of a call, and of what owners are certain in its outputs."""
        with suppress(RuntimeError, TypeError, ValueError, IndexError, KeyError):  # then it isn't known where they lead
            self._follow_pointers(call)
        for output in call.outputs:
            self._met[id(output)] = weakref.ref(output)
        for own in owners:
            rows = _varying(own) if isinstance(own, Tensor) and call.name in PICKS | {"cat", "concat"} else None
            if rows is not None:  # constants may come to be as many
                known = self._by_size.setdefault(len(rows), rows)
                if known is not None and not torch.equal(known.to(rows), rows):
                    self._by_size[len(rows)] = None

    def made(self, call: Call, owners_of: Callable[[Tensor], Owners | None]) -> Owners | None:
        """Return the owners of rows that a call made: that it wrote to a constant, or gathered by pointers.

        Args:
            call: a call.
            owners_of: returns the owners of a tensor if they are certain.

        Returns:
            None if it made none, if rows of several samples met, or if it isn't known whose they are.
        """
        return self._written(call, owners_of) if call.name in WRITES else self._gathered(call, owners_of)

    def _gathered(self, call: Call, owners_of: Callable[[Tensor], Owners | None]) -> Tensor | None:
        """Return the owners of what pointers lead to in a tensor of which only the size is known."""
        if call.name not in ("__getitem__", "index_select"):
            return None
        first, by_brackets = call.args[0], call.name == "__getitem__"
        index = call.argument(1 if by_brackets else 2, "index")
        if not isinstance(index, Tensor) or index.dim() != 1:
            return None
        axis = 0 if by_brackets else call.argument(1, "dim") % max(first.dim(), 1)
        owners = owners_of(index)
        if owners_of(first) is not None or not isinstance(owners, Tensor) or self._kinds(index) is None:
            return None
        if self._led_to(index, first.shape[axis]) is None:
            return None
        return _along(owners, axis, first.dim()).expand(call.outputs[0].shape)

    def _written(self, call: Call, owners_of: Callable[[Tensor], Owners | None]) -> Owners | None:
        target, where = call.args[0], index_of(call.name, call.args, call.kwargs)
        met = self._met.get(id(target))
        if where is None or (met is not None and met() is target):
            return None
        axis, index = where
        value = value_of(call.name, call.args, call.kwargs)
        owners = owners_of(value if any(t is value for t in call.batched) else index)
        layout = self._led_to(index, target.shape[axis])
        if not isinstance(owners, Tensor):
            return None
        if not owners.numel() and layout is None:
            return Fate.NOBODY
        sole, size = sole_owner(owners), target.shape[axis]
        if sole is None and layout is None:
            layout = self._by_size.get(size)
        if sole is not None and layout is None and size not in self._by_size:  # all of it is made of one sample
            return belonging_to(sole, target)
        return _laid_down(target, axis, index, owners, layout)

    def appended(self, call: Call, tensor: Tensor, known: Sequence[Tensor]) -> Tensor | Fate:
        """Return the owners of a constant that is joined to rows.

        Beside them, as features of zeros, it is theirs. After them it may have a row for each of the rows of all
        samples, as loops of all nodes have.

        Args:
            call: the call that joins.
            tensor: the constant.
            known: owners of the other parts.
        """
        if call.name == "stack" or not tensor.dim():
            return Fate.LOST
        axis = call.argument(1, "dim", 0) % tensor.dim()
        soles = {sole_owner(owners) for owners in known}
        if None in soles and all(constant(owners, axis) for owners in known):
            first, *others = (owners.narrow(axis, 0, 1) for owners in known)
            return first.expand(tensor.shape) if all(torch.equal(first, one) for one in others) else Fate.LOST
        leads = [self._led_to(t, tensor.shape[axis]) for t in call.batched]
        layout = leads[0] if leads and leads[0] is not None else self._by_size.get(tensor.shape[axis])
        if layout is None:
            alone = len(soles) == 1 and None not in soles and tensor.shape[axis] not in self._by_size
            return known[0].flatten()[0].expand(tensor.shape) if alone else Fate.LOST
        if not tensor.is_floating_point() or None in soles:
            return _along(layout.to(tensor.device, torch.int16), axis, tensor.dim()).expand(tensor.shape)
        return Fate.LOST

    def _follow_pointers(self, call: Call) -> None:
        first = call.args[0] if call.args else None
        if isinstance(first, Tensor) and call.name in MOVES | PICKS | _COPIES:
            kinds = self._kinds(first)
            if kinds is not None:
                moved = [kinds] * len(call.outputs) if call.name in _COPIES else call.on(kinds)
                for output, own in zip(call.outputs, moved, strict=True):
                    if isinstance(own, Tensor) and own.shape == output.shape:
                        self._leads[id(output)] = weakref.ref(output), own
        elif call.name in ("cat", "concat") and call.batched:
            each = [self._kinds(t) for t in call.batched]
            numbers = {int(kinds.flatten()[0]) if kinds.numel() else -1 for kinds in each if kinds is not None}
            whole = all(kinds is not None and bool((kinds == kinds.flatten()[:1]).all()) for kinds in each)
            if whole and len(numbers - {-1}) == 1:
                (output,) = call.outputs
                all_alike = torch.full((), max(numbers), dtype=torch.int16, device=output.device)
                self._leads[id(output)] = weakref.ref(output), all_alike.expand(output.shape)

    def _kinds(self, tensor: Tensor) -> Tensor | None:
        known = self._leads.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _led_to(self, index: Tensor, size: int) -> Tensor | None:
        """Return the owners of the rows that pointers lead to, if there are so many; None if it isn't known."""
        kinds = self._kinds(index)
        if kinds is None or not kinds.numel():
            return self._strung.by_size.get(size) if kinds is not None or not index.numel() else None
        first = kinds.flatten()[0]
        layout = self._strung.layouts[int(first)]
        return layout if len(layout) == size and bool((kinds == first).all()) else None


def _varying(owners: Tensor) -> Tensor | None:
    """Return the owners along the only axis along which they change, None if there is none or more than one."""
    axes = [axis for axis in range(owners.dim()) if not constant(owners, axis)]
    return owners[tuple(slice(None) if a in axes else 0 for a in range(owners.dim()))] if len(axes) == 1 else None


def _along(rows: Tensor, axis: int, n_axes: int) -> Tensor:
    return rows.view([-1 if one == axis else 1 for one in range(n_axes)])


def _laid_down(target: Tensor, axis: int, index: Tensor, owners: Tensor, layout: Tensor | None) -> Tensor | None:
    """Return the owners of a target, -1 for rows that nothing is written to; None where rows of several samples met."""
    shape = list(target.shape)
    if owners.dim() < len(shape):  # a constant was written
        sizes = [len(index) if one == axis else size for one, size in enumerate(shape)]
        owners = _along(owners, axis, len(shape)).expand(sizes)
    for other in set(range(target.dim())) - {axis}:  # one row tells of all features
        if constant(owners, other) and (index.dim() == 1 or constant(index, other)):
            shape[other] = 1
            owners = owners.narrow(other, 0, min(1, owners.shape[other]))
            index = index if index.dim() == 1 else index.narrow(other, 0, min(1, index.shape[other]))
    index = _along(index, axis, len(shape)).expand(owners.shape) if index.dim() == 1 else index
    found = torch.full(shape, -1, dtype=owners.dtype, device=owners.device).scatter_(axis, index, owners)
    if not torch.equal(found.gather(axis, index), owners):
        return None
    if layout is not None and bool((found < 0).any()):
        whole = _along(layout.to(found), axis, len(shape)).expand(found.shape)
        found = whole if torch.equal(found, whole.where(found >= 0, found)) else found
    return found.expand(target.shape)
