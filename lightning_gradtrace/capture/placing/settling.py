"""What two runs of a model, on a batch and on the batch permuted, tell of the places of the samples in a use."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.derived import Operand
from lightning_gradtrace.capture.forward.use import Site, Use
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates, in_the_middle, narrow
from lightning_gradtrace.capture.placing.comparing import both, close, closest, is_permuted, moves, same
from lightning_gradtrace.capture.probing.draws import DrawSite
from lightning_gradtrace.capture.routes.layouts import Note, free_axes, known_place
from lightning_gradtrace.capture.routes.rows import Route


class Place(NamedTuple):
    """A tensor of a use whose samples are looked for.

    Attributes:
        is_input: whether it is an argument, else an output.
        number: position among the leaves, or number of the output.
        of_source: look at the tensor that it was picked from instead.
    """

    is_input: bool
    number: int
    of_source: bool = False

    @property
    def source(self) -> Place:
        """The place of the tensor that it was picked from."""
        return self._replace(of_source=True)


# One option each means that there is no doubt.
Options = dict[Place, list[SampleAxis]]


# Larger tensors are not kept whole for the comparison of two runs.
SMALL = 2**16


def lighten(use: Use) -> None:
    """Keep of a large input of a rule only a random combination over the axes that can't hold samples.

    Two combinations with the same weights differ where the tensors do, and the probe has to hold those of every use of
    two runs at once.
    """
    bound = use.bound()
    operand = None if bound is None or bound.place is None else use.leaves[bound.place]
    if bound is None or not isinstance(operand, Operand) or operand.tensor.numel() <= SMALL:
        return
    found = operand.tensor
    if not found.is_floating_point() or found.layout is not torch.strided or found.is_nested:
        return
    generator = np.random.default_rng(0)  # torch's draws are those of the model
    for axis in set(range(found.dim())) - set(bound.axes):
        weights = torch.from_numpy(generator.standard_normal(found.shape[axis])).to(found)
        found = torch.tensordot(found, weights, ([axis], [0])).unsqueeze(axis)
    use.leaves = [replace(leaf, tensor=found) if leaf is operand else leaf for leaf in use.leaves]


def routes_of(use: Use) -> dict[Place, Route]:
    """Return whose the entries are of those tensors of a use that hold parts of the batch."""
    found = {Place(True, i): operand.route for i, operand in use.operands.items()}
    found |= {Place(False, i): route for i, route in use.routes.items() if i in use.cotangents or not use.reached}
    return {place: route for place, route in found.items() if route is not None}


def sources_of(use: Use) -> dict[Place, Tensor]:
    """Return the tensors that parts of the batch were picked from."""
    return {place.source: route.source for place, route in routes_of(use).items() if route.source is not None}


@dataclass(frozen=True)
class Doubt:
    """What the model has to be run again for.

    Attributes:
        places: whether the places of the samples are in doubt.
        draws: random numbers that may be shared by all samples.
        drawn: all random numbers that parameters met before they met the batch.
        shared: random numbers that are.
    """

    places: bool = False
    draws: Collection[DrawSite] = ()
    drawn: Collection[DrawSite] = ()
    shared: Collection[DrawSite] = ()

    def __bool__(self) -> bool:
        return self.places or bool(self.draws)


class Probe(Protocol):
    """What the placer asks; see `lightning_gradtrace.capture.probing.probe.PermutationProbe`."""

    @property
    def n_samples(self) -> int:
        """Number of samples."""

    def coincides(self) -> bool:
        """Say whether something else than samples is as numerous as they are, or may stand in their place."""

    def __call__(self) -> tuple[Sequence[Use], Sequence[Use], Tensor]:
        """Return the uses of a run, those of the run on the permuted batch, and the order of its samples."""

    def own_axis(self, tensor: Tensor) -> int | None:
        """Return the axis of the samples in a tensor of the batch itself, None for all others."""

    def again(self) -> Sequence[Use]:
        """Return the uses of a later run on the batch: other random numbers, a later state of the model."""

    def swapped(self) -> tuple[Sequence[Use], Tensor]:
        """Return the uses of a run on a batch of two samples in the other order, and that order."""

    def otherwise(self) -> Probe | None:
        """Return a probe that may tell what this one leaves open, None if there is none."""

    def sharing(self, sites: Container[DrawSite], fixed: Collection[DrawSite] = ()) -> Probe:
        """Return a probe for random numbers that all samples share.

        Args:
            sites: where they are drawn; these are constants.
            fixed: which of these are known to be shared, and stay as they are when the samples are permuted.
        """

    def influence(self, sites: Collection[DrawSite]) -> Mapping[DrawSite, bool | None]:
        """Say of random numbers whether all samples share them, None where they have no influence yet."""


class Questions:
    """What is asked of a probe about single tensors, if the permuted batch does not tell."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._runs: dict[Site, Use] | None = None
        self._swapped: tuple[dict[Site, Use], Tensor] | None = None

    def own(self, tensor: Tensor, places: list[SampleAxis]) -> list[SampleAxis]:
        """Of several places in a tensor of the batch itself keep the batch's own."""
        axis = self._probe.own_axis(tensor) if len(places) > 1 else None
        return places if axis is None else [place for place in places if place == SampleAxis(axis)] or places

    def permuted(self, first: Use, second: Use | None, place: Place, order: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return what a tensor is on permuted samples, and their order.

        Where one of two samples was taken twice, a run may pick other numbers of rows, and none where it should, or
        pad to another length. The tensor is then looked at in a run on both, swapped.
        """
        before, after = _compared(first, place), None if second is None else _compared(second, place)
        if before is None:
            return after, order
        is_other = place.of_source if after is None else before.shape != after.shape
        if is_other and len(order) == 2:
            if self._swapped is None:
                self._swapped = {}, order
                with suppress(Exception):  # a step that asks that the longer one comes first
                    uses, swap = self._probe.swapped()
                    self._swapped = {one.site: one for one in uses}, swap
            found, order = self._swapped
            after = _compared(found[first.site], place) if first.site in found else None
        return after, order.to(before.device)

    def differs_by_chance(self, use: Use, place: Place) -> bool:
        """Say whether a tensor differs from run to run on the same batch; the model is run again when first asked."""
        if self._runs is None:
            self._runs = {again.site: again for again in self._probe.again()}
        again = self._runs.get(use.site)
        before, after = _compared(use, place), None if again is None else _compared(again, place)
        return before is not None and after is not None and not same(before, after)


def settle(
    real: Use,
    first: Use,
    second: Use | None,
    options: Options,
    order: Tensor,
    strictly: bool,
    alike: bool,
    ask: Questions,
) -> Options:
    """Keep the places along which the permuted run's tensors are the first run's tensors, permuted.

    A place that size alone allows is kept as well if some entries are permuted and all others stay as they are, or if
    the tensors differ by chance: noise that the model draws, a state that it keeps. A tensor that stays as it is,
    whatever the order of the samples, holds something else of the same number, such as positions; one that changes in
    any other way holds a mixture of samples, or other rows than theirs.

    Args:
        real: a use of the real pass.
        first: the same in the run on the batch.
        second: the same on the permuted batch, None if it was not reached there.
        options: the places that sizes allow.
        order: which samples the permuted batch holds.
        strictly: keep only what is permuted.
        alike: whether the run on the batch came to the sizes of the real pass.
        ask: answers further questions.

    Returns:
        The places that remain.
    """
    settled: Options = {}
    for place, found in options.items():
        before = _compared(first, place)
        after, taken = ask.permuted(first, second, place, order)
        if before is not None:  # a run again may have come to other sizes
            found = [o for o in found if o.fits(before.shape, len(order))]
        if not found or before is None or after is None or before.shape != after.shape:
            kept = found if before is None else ask.own(before, found)
            settled[place] = kept if len(kept) == 1 and not strictly else []
            continue
        fitting = [o for o in found if same(o.permute(before, taken), after)]
        if strictly and same(before, after):  # in any order, it may be: that tells nothing
            settled[place] = [o for o in fitting if moves(o, before, after, taken)]
            continue
        if not fitting and alike and _is_untold(real, place, len(order)):
            others = in_the_middle(found, before.shape, len(order))
            fitting = [o for o in others if same(o.permute(before, taken), after)]
        if not fitting:  # samples against samples: it is split by the first of the two axes
            fitting = [one for one in both(before, after, taken) if one in found]
        if not fitting and len(found) == 1 and not strictly and not same(before, after):
            stays = close(before, after) | close(found[0].permute(before, taken), after)
            is_so = found[0] == known_place(note_of(real, place)) or bool(stays.all())
            fitting = found if is_so or ask.differs_by_chance(first, place) else []
        fitting = closest(fitting, before, after, taken)
        if len(fitting) > 1:  # a tensor that is the same everywhere, such as of a layer in which no neuron spikes
            known = free_axes(note_of(first, place))
            fitting = [one for one in fitting if one.axis not in known] or fitting
        if place.of_source and len(fitting) > 1:  # a mask that holds everywhere, or nowhere, has samples for rows
            fitting = [one for one in fitting if one.axis < before.dim() - 1] or fitting
        settled[place] = ask.own(before, fitting)
    return settled


def _is_untold(real: Use, place: Place, n_samples: int) -> bool:
    """Say whether the shape of the real use's input before a view tells no factor of an axis."""
    operand = real.operands.get(place.number) if place.is_input and not place.of_source else None
    if operand is None:
        return False
    places = candidates(operand.tensor.shape, n_samples)
    return narrow(places, operand.tensor.shape, operand.before, n_samples) == places


def are_alike(real: Mapping[Site, Use], again: Sequence[Use]) -> bool:
    """Say whether a pass that was run again came to the same sizes, not to other crops or another branch."""
    return all(
        one == other or other == 1  # large tensors are combined over some axes
        for use in again
        if use.site in real
        for i, operand in use.operands.items()
        if i in real[use.site].operands
        for one, other in itertools.zip_longest(real[use.site].operands[i].tensor.shape, operand.tensor.shape)
    )


def count_unexplained(first: Sequence[Use], second: Sequence[Use], order: Tensor) -> int:
    """Count the tensors of a run that on the permuted batch are neither as they were nor permuted.

    Args:
        first: uses of the run on the batch.
        second: uses of the run on the permuted batch.
        order: which samples it holds.
    """
    permuted = {use.site: use for use in second}
    return sum(not _is_explained(use, permuted.get(use.site), place, order) for use in first for place in _places(use))


def _places(use: Use) -> list[Place]:
    outputs = [Place(False, i) for i, kept in enumerate(use.outputs) if kept is not None]
    return [*(Place(True, i) for i in use.operands), *outputs, *sources_of(use)]


def _is_explained(first: Use, second: Use | None, place: Place, order: Tensor) -> bool:
    route = None if place.of_source else routes_of(first).get(place)
    if route is not None and all(isinstance(owners, Tensor) for owners in route.owners.values()):
        return True  # rows that are followed need not be in the order of the samples
    before, after = _compared(first, place), None if second is None else _compared(second, place)
    if before is None or after is None or before.shape != after.shape or same(before, after):
        return before is None or (after is not None and before.shape == after.shape)
    return is_permuted(before, after, order) or next(both(before, after, order), None) is not None


def note_of(use: Use, place: Place) -> Note | None:
    """Return what is known of the axes of a tensor of a use."""
    if place.of_source:
        return None
    operand = use.operands.get(place.number)
    return use.notes.get(place.number) if not place.is_input else None if operand is None else operand.note


def _compared(use: Use, place: Place) -> Tensor | None:
    """Return what the probe looks at."""
    if place.of_source:
        return sources_of(use).get(place)
    operand = use.operands.get(place.number) if place.is_input else use.outputs[place.number]
    if operand is None or operand.tensor.is_nested:
        return None
    return operand.tensor if operand.tensor.layout is torch.strided else operand.tensor.to_dense()
