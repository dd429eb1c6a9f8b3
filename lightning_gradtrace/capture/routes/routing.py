"""Follows parts of the batch: loops over samples, experts that get some of the tokens, packed sequences.

Whoever picks from a tensor along an axis that may hold the samples - by an index, a slice, a split, a loop - gets some
of the samples, in an order of his own. From then on every entry has an *owner*, the sample that it belongs to; owners
are moved by the same functions as the entries, so they are right for whatever was picked. Functions that treat rows
apart keep owners; what is computed from one sample alone is that sample's; where parts meet a tensor that holds the
samples in the ordinary way, as in the sum over experts, the result is ordinary again.

Which axis of the source holds the samples is found out later (`placement.py`), so owners are kept for every axis that
may. After any other function, and after one that may have mixed the samples (`mixing.py`), they are *lost*: such a
tensor is attributed only if the permutation probe confirms that it holds the samples in the ordinary way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.elements import LOSSES
from lightning_gradtrace.capture.forward.functions import Facts, names_of, tensors_among
from lightning_gradtrace.capture.forward.taint import Taint
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.intake.batch import pieces, tensors
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates, narrow, shape_before_view
from lightning_gradtrace.capture.routes.apart import MOVES, looked_up, reduces, through, weighing
from lightning_gradtrace.capture.routes.carrying import Layouts
from lightning_gradtrace.capture.routes.layouts import known_place
from lightning_gradtrace.capture.routes.mixing import LAYERS, MIXERS, PRODUCTS, mixes_samples
from lightning_gradtrace.capture.routes.orders import (
    GATHERS,
    PLACES,
    SORTS,
    STRINGS,
    gathered,
    placed,
    sorted_along,
    strings_numbers,
)
from lightning_gradtrace.capture.routes.picking import (
    PICKS,
    Call,
    cuts_out,
    lays_out,
    picker,
    picks_by_batch,
    picks_samples,
    picks_samples_by_batch,
)
from lightning_gradtrace.capture.routes.products import multiplied, sent
from lightning_gradtrace.capture.routes.rows import (
    CERTAIN,
    EMPTY,
    LOST,
    NOBODY,
    Fate,
    Owners,
    Route,
    as_route,
    belonging_to,
    filled,
    has_gaps,
    laid_out,
    of_rows,
    picked_by,
    settled,
    sole_owner,
)
from lightning_gradtrace.capture.routes.strung_rows import StrungRows
from lightning_gradtrace.capture.routes.writing import WRITES, led, value_of, written

_JOINS = names_of("cat concat stack")
_CHOICES = names_of("where masked_fill masked_fill_ clamp __and__ __or__ __xor__") | LOSSES
_FIRST = PICKS | WRITES | GATHERS | STRINGS  # after them there is something to follow


class Routes:
    """Knows the parts of the batch in one forward pass.

    Args:
        batch: the batch.
        n_samples: its number of samples.
        batch_axis: axis of the samples in its tensors.
    """

    def __init__(self, batch: Any, n_samples: int | None, batch_axis: int = 0) -> None:
        self._n = n_samples or 1
        self._known: dict[int, tuple[Callable[[], Tensor | None], Route]] = {}
        self._given = {
            tensor.untyped_storage().data_ptr() for tensor in tensors(batch) if tensor.layout is torch.strided
        }
        self._strung = StrungRows(batch, self._n)
        for sample, tensor in pieces(batch, self._n):
            self._set(tensor, Route(None, {CERTAIN: belonging_to(sample, tensor)}))
        for tensor, owners in self._strung.given():
            self._set(tensor, Route(None, {CERTAIN: owners}))
        self._known |= {id(tensor): (weakref.ref(tensor), NOBODY) for tensor in self._strung.orders}
        self._known |= {id(tensor): (weakref.ref(tensor), LOST) for tensor in self._strung.doubtful}
        self.layouts = Layouts(batch, self._n, batch_axis, lambda tensor: self(tensor) is None)

    def __call__(self, tensor: Tensor) -> Route | None:
        """Return the route of a tensor, None if it holds the samples in the ordinary way."""
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def known(self, tensor: Tensor, taint: Taint) -> Route | None:
        """Return the route of a batched tensor; lost if a function that can't be seen met rows that were picked."""
        if taint.left_torch_function and self._known and taint.is_unseen(tensor) and self(tensor) is None:
            self._set(tensor, LOST)
        return self(tensor)

    def of(self, outputs: Sequence[Any]) -> dict[int, Route]:
        """Return the routes of those outputs of a call that have one."""
        found = {i: self(t) for i, t in enumerate(outputs) if isinstance(t, Tensor)}
        return {i: route for i, route in found.items() if route is not None}

    def after(
        self,
        known: Facts,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        taint: Taint,
        use: Use | None = None,
    ) -> None:
        """Take note of the result of a function with batched arguments, and of the use that it was."""
        name = known.name.removeprefix("_VF.")
        self.layouts.after(name, known, function, args, kwargs, result, use, taint)
        if name == "where" and len(args) + len(kwargs) == 1:
            name = "nonzero"
        mixer = name in MIXERS or (name in LAYERS and use is None)
        if self._n == 1 or not (self._known or mixer or name in _FIRST):
            return

        def holds(tensor: Tensor) -> bool:
            return taint(tensor) and self.known(tensor, taint) is not NOBODY

        values = args[:1] if known.shape_only else (*args, *kwargs.values())
        new = taint.new() if name in WRITES and known.in_place and taint.new is not None else None
        batched = [t for t in tensors_among(values) if t is not new and holds(t)]
        outputs = list(tensors_among(args[:1] if name == "__setitem__" else (result,)))
        is_noise = bool(args) and isinstance(args[0], Tensor) and bool(taint.draws(args[0]))
        call = Call(name, known, function, args, kwargs, outputs, batched, is_noise)
        try:
            if call.picks_from_batch:
                call.features = self.layouts.axes(args[0])
            routes = self._routes(call)
            if name in STRINGS and strings_numbers(args, kwargs, lambda t: holds(t) and not taint.draws(t), self._n):
                routes = [NOBODY]
            features = self.layouts.axes
            if mixer and not any(routes) and mixes_samples(name, args, kwargs, result, holds, self._n, features):
                found = sent(call, self._n) if name in PRODUCTS else None
                routes = [found or self._mixture(output) for output in call.outputs]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            routes = [LOST] * len(call.outputs)  # what can't be followed is no reason to stop the user's forward pass
        for tensor, route in zip(call.outputs, routes, strict=True):
            self._set(tensor, route)
            if known.in_place and tensor._base is not None and (route is LOST or (route and tensor is new)):
                self._set(tensor._base, LOST)
        if self._strung:
            self._strung.take_note(call, [None if route is None else route.owners.get(CERTAIN) for route in routes])

    def _mixture(self, tensor: Tensor) -> Route:
        """Return the route of what may be a mixture of samples: nobody's, if no axis is left that may hold them."""
        return NOBODY if len(self.layouts.axes(tensor)) == tensor.dim() else LOST

    def _set(self, tensor: Tensor, route: Route | None) -> None:
        if route is None:
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = (weakref.ref(tensor), route)

    def _routes(self, call: Call) -> list[Route | None]:
        """Return the route of every output."""
        if not call.batched and any(self(t) is NOBODY for t in tensors_among((*call.args, *call.kwargs.values()))):
            return [NOBODY] * len(call.outputs)
        made = self._strung.made(call, self._certain) if self._strung else None
        if made is not None:
            made = self._settled(made) if isinstance(made, Tensor) else made
            return [as_route(None, {CERTAIN: made})] * len(call.outputs)
        if call.name == "repeat_interleave" and call.argument(1, "repeats") is None:  # numbers of rows, of counts alone
            return [LOST] * len(call.outputs)
        if call.name in GATHERS:
            return gathered(call.name, call.args, call.kwargs, self(call.args[0]), len(call.outputs), self._n)
        first, by_batch = call.args[0] if call.args else None, picks_by_batch(call)
        is_hit = self._is_hit(call, by_batch or picks_samples_by_batch(call, self._n, lambda t: self(t) is NOBODY))
        if isinstance(first, Tensor) and call.picks_from_batch:
            call.batched = [first]  # what is picked tells whose the result is, not the index
        if call.name in WRITES:
            call.batched = [t for t in call.batched if t is first or t is value_of(call.name, call.args, call.kwargs)]
            if not call.batched:
                return [led(call.name, call.args, call.kwargs, self)] * len(call.outputs)
        routed = [route for t in call.batched if (route := self(t)) is not None]
        if routed:
            # Other sources count as laid out like the first one: owners that then disagree are lost.
            leader = next((route for route in routed if CERTAIN not in route.owners), routed[0])
            source, places = leader.source, list(leader.owners)
            arguments = [(t, self(t)) for t in call.batched]
        elif isinstance(first, Tensor) and call.picks_from_batch and picks_samples(call, self._n):
            # The last axis of real numbers holds features; that of words, numbers and masks may be that of the samples.
            source = first.detach()
            rows = max(first.dim() - 1, 1) if first.is_floating_point() and call.name not in PLACES else first.dim()
            options = [o for o in call.places(self._n) if o.axis < rows]
            options = narrow(options, first.shape, shape_before_view(first), self._n)
            if not options and call.name in PLACES:  # there are as many hits as samples by chance
                return [NOBODY] * len(call.outputs)
            places = options
            arguments = [(first, Route(source, {o: laid_out(o, first, self._n) for o in options}))]
        elif not call.picks_from_batch and by_batch:
            by = picker(call)
            return [LOST if by is None else picked_by(by, self(by), call.outputs[0], self._n)] * len(call.outputs)
        elif call.name in WRITES:
            source, places, arguments = None, [CERTAIN], [(t, None) for t in call.batched]
            value = call.batched[-1]
            moved = None if value is first or len(call.batched) > 1 else of_rows(value, self._n)
            if moved is not None and Fate.LOST in self._follow(call, {id(value): Fate.ORDINARY}):
                source, places, arguments = moved.source, list(moved.owners), [(value, moved)]
                is_hit = True  # values of the batch, or of the model, tell where to
        elif call.picks_from_batch and cuts_out(call) and not call.places(self._n):
            # Texts that are strung together have no axis for the samples, nor has one that is as long as they are many.
            return [NOBODY if candidates(t.shape, self._n) else None for t in call.outputs]
        else:
            return [None] * len(call.outputs)
        found: list[dict[SampleAxis, Owners]] = [{} for _ in call.outputs]
        apart = call.name in _JOINS and all(route is not None for _, route in arguments)
        keeps_axes = apart or call.name in PICKS | MOVES
        for place in places:
            mine = {id(t): _at(route, place, t, call, self._n, keeps_axes) for t, route in arguments}
            for owners, output in zip(self._follow(call, mine), found, strict=True):
                output[place] = owners
                if isinstance(owners, Tensor) and (not is_hit or self._is_restored(call, mine, owners)):
                    output[place] = self._settled(owners)
        if source is not None and call.known.pointwise and any(CERTAIN in route.owners for route in routed):
            found = [_ascertained(owners) for owners in found]
        given = source is None or source.untyped_storage().data_ptr() in self._given
        return [as_route(None if CERTAIN in owners else source, owners, given, is_hit) for owners in found]

    def _is_restored(self, call: Call, of: Mapping[int, Tensor | Fate], owners: Tensor) -> bool:
        """Say whether a pick has put samples in order that were out of it, which is no chance."""
        before = of.get(id(call.args[0])) if call.name in PICKS and not cuts_out(call) else None
        was_out = isinstance(before, Tensor) and isinstance(self._settled(before), Tensor)
        return was_out and not isinstance(self._settled(owners), Tensor)

    def _certain(self, tensor: Tensor) -> Owners | None:
        """Return the owners of a tensor that don't depend on where the samples are in another."""
        route = self(tensor)
        return None if route is None else route.owners.get(CERTAIN)

    def _settled(self, owners: Tensor) -> Owners:
        """Return the axis along which owners are in order; of what is strung together only where it holds no more."""
        return (filled if self._strung else settled)(owners, self._n)

    def _is_hit(self, call: Call, by_batch: bool) -> bool:
        """Say whether values of the batch told what to pick, here or before."""
        if lays_out(call):
            return False
        before = map(self, tensors_among((*call.args, *call.kwargs.values())))
        return by_batch or call.name in PLACES or any(route is not None and route.is_hit for route in before)

    def _follow(self, call: Call, of: Mapping[int, Tensor | Fate]) -> Sequence[Tensor | Fate]:
        """Return the owners of the outputs, given those of the batched arguments, by identity."""
        everywhere, first = len(call.outputs), call.args[0] if call.args else None
        if call.known.pointwise or call.name in _CHOICES:
            call = replace(call, batched=weighing(call.batched))
        known = [of.get(id(t), Fate.ORDINARY) for t in call.batched]
        own = of.get(id(first), Fate.ORDINARY)
        if call.name in PLACES or call.name in SORTS:
            if not isinstance(own, Tensor):
                return [own] * everywhere
            if call.name in PLACES:
                return placed(call.args[0], own, call.outputs)
            axis = call.argument(SORTS[call.name][0], "dim", SORTS[call.name][1])
            return sorted_along(axis, own, call.outputs, call.is_noise)
        if call.name in WRITES:
            return [written(call.name, call.args, call.kwargs, of, self._n)] * everywhere
        if call.name == "embedding_bag":
            return [Fate.ORDINARY if known_place(self.layouts(t)) else Fate.LOST for t in call.outputs]
        if all(owners is Fate.ORDINARY for owners in known):
            return [Fate.ORDINARY] * everywhere
        if any(owners is Fate.LOST for owners in known):
            return [Fate.LOST] * everywhere
        if self._strung and call.name not in MOVES | PICKS and any(map(has_gaps, known)):
            return [Fate.LOST] * everywhere
        soles = {sole_owner(owners) for owners in known}
        sole = soles.pop() if len(soles) == 1 else None
        if sole is not None and not (self._strung and call.name in _JOINS):
            return [belonging_to(sole, output) for output in call.outputs]
        if call.name in _JOINS:
            return [self._joined(call, of)]
        if (call.known.pointwise or call.name in _CHOICES) and not reduces(call):
            return [self._combined(call, of)]
        if not isinstance(own, Tensor):
            return [multiplied(call, of, self._n) if call.name in PRODUCTS else looked_up(call, of)]
        if call.name in MOVES or call.name in PICKS:
            return [Fate.ORDINARY if moved is None else moved for moved in call.on(own)]
        found = through(call, own)
        return [multiplied(call, of, self._n)] if call.name in PRODUCTS and found == [Fate.LOST] else found

    def _joined(self, call: Call, of: Mapping[int, Tensor | Fate]) -> Tensor | Fate:
        known = [owners for owners in of.values() if isinstance(owners, Tensor)]

        def own(tensor: Tensor) -> Tensor | Fate:
            if id(tensor) in of:
                return of[id(tensor)]
            if not self._strung:  # zeros for those that are nowhere
                zeros = torch.full_like(tensor, EMPTY, dtype=torch.int16)
                return Fate.LOST if bool(tensor.any()) or call.name == "stack" else zeros
            return self._strung.appended(call, tensor, known)

        parts = [own(t) for t in tensors_among((call.argument(0, "tensors"),))]
        owners = [part for part in parts if isinstance(part, Tensor)]
        if len(owners) < len(parts):
            return Fate.LOST
        joined: Tensor = call.function(owners, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k == "dim"})
        return joined

    def _combined(self, call: Call, of: Mapping[int, Tensor | Fate]) -> Tensor | Fate:
        """Return the owners after a function that works entry by entry."""
        (output,) = call.outputs
        ordinary = [t for t in call.batched if of.get(id(t), Fate.ORDINARY) is Fate.ORDINARY]
        if any(candidates(t.shape, self._n) for t in ordinary):
            return Fate.ORDINARY
        parts = [owners.expand(output.shape) for t in call.batched if isinstance(owners := of.get(id(t)), Tensor)]
        return parts[0] if all(torch.equal(part, parts[0]) for part in parts[1:]) else Fate.LOST


def _ascertained(owners: dict[SampleAxis, Owners]) -> dict[SampleAxis, Owners]:
    """Return owners that don't depend on a place any more, because one place alone agrees with what is certain."""
    agreed = [found for found in owners.values() if found is not Fate.LOST]
    return {CERTAIN: agreed[0]} if len(agreed) == 1 and isinstance(agreed[0], Tensor) else owners


def _at(
    route: Route | None, place: SampleAxis, tensor: Tensor, call: Call, n_samples: int, keeps_axes: bool
) -> Tensor | Fate:
    """Return the owners of an argument for one place of the samples in the source."""
    owners: Owners = Fate.ORDINARY
    if route is not None:  # the source of another route has a place of its own, certain if sizes allow no more
        owners = next(iter(route.owners.values())) if len(route.owners) == 1 else route.owners.get(place, Fate.LOST)
    if isinstance(owners, SampleAxis):
        return laid_out(owners, tensor, n_samples) if keeps_axes else Fate.ORDINARY
    if owners is Fate.ORDINARY and tensor is call.args[0] and picks_samples(call, n_samples):
        ways = call.places(n_samples)
        return laid_out(ways[0], tensor, n_samples) if len(ways) == 1 else Fate.LOST
    return owners
