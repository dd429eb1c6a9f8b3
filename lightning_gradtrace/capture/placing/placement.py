"""Decides, use by use, where the samples are; asks the permutation probe where sizes leave doubt."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.use import Site, Use
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates, narrow, shape_before_view
from lightning_gradtrace.capture.placing.cotangents import AnyAxis, after, told
from lightning_gradtrace.capture.placing.looks import certain, followed, open_places, seen_otherwise, settled_by
from lightning_gradtrace.capture.placing.settling import (
    Options,
    Place,
    Probe,
    routes_of,
    sources_of,
)
from lightning_gradtrace.capture.routes.layouts import Note, allowed
from lightning_gradtrace.capture.routes.rows import CERTAIN, Fate, Rows


@dataclass(frozen=True)
class UsePlaces:
    """Places of the samples in the tensors of one use.

    Attributes:
        inputs: by position among the leaves; arguments that hold no samples are left out.
        outputs: by number of the output.
    """

    inputs: dict[int, AnyAxis]
    outputs: dict[int, AnyAxis]

    @property
    def has_rows(self) -> bool:
        """Whether any tensor holds parts of the batch."""
        return any(isinstance(place, Rows) for place in (*self.inputs.values(), *self.outputs.values()))


@dataclass(frozen=True)
class Placement:
    """Places of the samples at a site.

    Attributes:
        inputs: by position among the leaves; arguments that hold no samples are left out.
        outputs: by number of the output.
        sources: for tensors that were picked, places in the tensors that they were picked from.
    """

    inputs: Mapping[int, SampleAxis]
    outputs: Mapping[int, SampleAxis]
    sources: Mapping[Place, SampleAxis]

    def lasts(self, use: Use, n_samples: int) -> bool:
        """Say whether it serves for a later use, whose tensors may have been merged in another way.

        Args:
            use: a use of the site.
            n_samples: number of samples.
        """
        for i, own in self.inputs.items():
            if own.factor not in ("whole", "single") and i in use.operands:
                shape, before = use.operands[i].tensor.shape, use.operands[i].before
                if own not in narrow(candidates(shape, n_samples), shape, before, n_samples):
                    return False
        return bool(self.inputs) or all(own.factor != "middle" for own in self.outputs.values())

    def is_lost(self, use: Use) -> bool:
        """Say whether nobody knows here whose the entries of a tensor are, if the samples of sources are as they were.

        Such a placement holds for one batch: the next one may have been picked in another way.
        """
        return any(
            route.owners.get(self.sources.get(place.source, CERTAIN), Fate.LOST) is Fate.LOST
            for place, route in routes_of(use).items()
        )

    def agrees(self, use: Use) -> bool:
        """Say whether what was picked holds the samples here, wherever its source holds them."""
        for place, route in routes_of(use).items():
            own = (self.inputs if place.is_input else self.outputs).get(place.number)
            found = route.owners.values()
            if any(isinstance(owners, Tensor) or owners not in (Fate.ORDINARY, own) for owners in found):
                return False
        return True

    def of(self, use: Use, n_samples: int) -> UsePlaces | None:
        """Return the places in the tensors of one use of the site; None if it has other shapes, or other parts."""
        inputs: dict[int, AnyAxis] = {}
        outputs: dict[int, AnyAxis] = {}
        if self.sources or use.is_routed:
            sources = sources_of(use)
            fit = {
                place: self.sources[place].fits(t.shape, n_samples)
                for place, t in sources.items()
                if place in self.sources
            }
            if fit.keys() != self.sources.keys() or not all(fit.values()):
                return None
            for place, axis in followed(use, self.sources).items():
                (inputs if place.is_input else outputs)[place.number] = axis
        operands = use.operands
        for i, own in self.inputs.items():
            if i not in inputs and (i not in operands or not own.fits(operands[i].tensor.shape, n_samples)):
                return None
            inputs.setdefault(i, own)
        bound = use.bound() if inputs and len(outputs) < len(use.cotangents) else None
        for i, cotangent in use.cotangents.items():
            found: AnyAxis | None = outputs.get(i) or self.outputs.get(i)
            if found is None and bound is not None and bound.place is not None:
                found = after(bound, inputs[bound.place]) if bound.place in inputs else None
            if found is None or not found.fits(cotangent.shape, n_samples):
                return None
            if isinstance(found, Rows) and not found.hold_all(cotangent):
                return None
            outputs[i] = found
        return UsePlaces(inputs, outputs)


def _key(use: Use) -> tuple[Any, ...]:
    """Return the site, what was picked from other tensors there, and whether the samples may be lost."""
    return (use.site, frozenset(sources_of(use)), _may_be_lost(use)) if use.is_routed else (use.site,)


class UnattributableError(RuntimeError):
    """A parameter's gradient can't be split into samples; the message says which, why, and what to do."""


class Placer:
    """Remembers the placement of every site of a model; sizes propose, the probe confirms or chooses, once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Placement] = {}

    def place(self, uses: Sequence[Use], n_samples: int, probe: Probe) -> list[UsePlaces]:
        """Return the places of the samples in the tensors of every use.

        Args:
            uses: uses of one micro-batch, with cotangents.
            n_samples: number of samples of the micro-batch.
            probe: asked about sites that were not seen before, if sizes leave doubt or may mislead.

        Returns:
            The places, one by one.

        Raises:
            UnattributableError: the samples of a use can't be found.
        """
        found = {use.site: self._remembered(use, n_samples) for use in uses}
        options, lost, doubtful = _unknown([use for use in uses if found[use.site] is None], n_samples)
        if options:  # in most steps there are none
            known = {site: places.outputs for site, places in found.items() if places is not None}
            if n_samples > 1 and (doubtful or probe.coincides()):
                options = self._confirm(uses, options, known, probe, doubtful, lost)
            else:
                options = told(uses, options, known)
        for use in uses:
            if use.site in options:
                placement = _decide(use, options[use.site], n_samples)
                # One sample fits everywhere and teaches nothing about later batches.
                if n_samples > 1 and not placement.is_lost(use):
                    self._known[_key(use)] = placement
                found[use.site] = placement.of(use, n_samples)
        return [_checked(use, found[use.site], n_samples) for use in uses]

    def asks(self, uses: Sequence[Use], probe: Probe) -> bool:
        """Say whether `place` would run the probe."""
        n_samples = probe.n_samples
        options, _, doubtful = _unknown([u for u in uses if self._remembered(u, n_samples) is None], n_samples)
        return n_samples > 1 and (doubtful or bool(options and probe.coincides()))

    def _remembered(self, use: Use, n_samples: int) -> UsePlaces | None:
        known = self._known.get(_key(use))
        if known is not None and known.is_lost(use):
            return None
        if known is None and use.is_routed:
            plain = self._known.get((use.site,))
            known = plain if plain is not None and plain.agrees(use) else None
        return known.of(use, n_samples) if known is not None and known.lasts(use, n_samples) else None

    def _confirm(
        self,
        uses: Sequence[Use],
        options: dict[Site, Options],
        known: Mapping[Site, Mapping[int, AnyAxis]],
        probe: Probe,
        doubtful: bool,
        lost: Collection[Site],
    ) -> dict[Site, Options]:
        """Let the probe choose where sizes leave doubt, and contradict them where they mislead.

        What is open then, and no cotangent tells, is asked again in other ways.

        Raises:
            UnattributableError: there is doubt, and the model can't be run again.
        """
        real = {use.site: use for use in uses}
        try:
            settled, seen = settled_by(real, options, probe, lost)
        except Exception as error:
            if doubtful:
                raise UnattributableError(_no_probe(options, lost, error)) from error
            warnings.warn(
                "GradTrace: the forward pass could not be repeated to confirm which axis of each layer's input holds "
                f"the samples ({type(error).__name__}: {error}). Sizes alone decide; they leave no doubt.",
                stacklevel=2,
            )
            return told(uses, options, known)
        left = told(uses, settled, known)
        # A swap of two samples tells nothing of what may be lost.
        askable = left.keys() - (set(lost) if probe.n_samples == 2 else set())
        still = {s: options[s] for s in askable if open_places(real[s], left[s])}
        if still:
            refuted = {s for s in still if s in seen and not any(left[s].get(p) for p in open_places(real[s], left[s]))}
            for site, by_place in seen_otherwise(real, still, probe, refuted).items():
                left[site].update(by_place)
            left = told(uses, left, known)
        return left


def _checked(use: Use, places: UsePlaces | None, n_samples: int) -> UsePlaces:
    if places is None:  # several uses of one site with unlike shapes, or an output that its own axis can't describe
        raise UnattributableError(_complaint(use, Place(False, next(iter(use.cotangents))), [], n_samples))
    return places


def _unknown(uses: Sequence[Use], n_samples: int) -> tuple[dict[Site, Options], set[Site], bool]:
    """Return what sizes allow at sites that are not known, those that may be lost, and whether there is doubt."""
    options = {use.site: _options(use, n_samples) for use in uses}
    lost = {use.site for use in uses if _may_be_lost(use)}
    several = any(len(axes) > 1 for by_place in options.values() for axes in by_place.values())
    return options, lost, bool(lost) or several


def _may_be_lost(use: Use) -> bool:
    return any(Fate.LOST in route.owners.values() for route in routes_of(use).values())


def _options(use: Use, n_samples: int) -> Options:
    """Return where sizes allow the samples in the tensors that matter."""
    bound, routes = use.bound(), routes_of(use)
    among = bound.axes if bound else None
    options: Options = {place.source: list(route.owners) for place, route in routes.items() if route.source is not None}

    def look(place: Place, shape: Sequence[int], before: Sequence[int] | None, note: Note | None) -> None:
        route = routes.get(place)
        if route is None or any(isinstance(owners, Fate) for owners in route.owners.values()):
            found = narrow(candidates(shape, n_samples, among), shape, before, n_samples)
            options[place] = allowed(found, note) if len(found) > 1 else found

    for i, operand in use.operands.items():
        if bound is None or i == bound.place:
            look(Place(True, i), operand.tensor.shape, operand.before, operand.note)
    if bound is None or bound.place is None:
        for i, cotangent in use.cotangents.items():
            look(Place(False, i), cotangent.shape, shape_before_view(cotangent), use.notes.get(i))
    return options


def _decide(use: Use, options: Options, n_samples: int) -> Placement:
    """Choose the places; those of the outputs are needed, those of other arguments than a rule's are not."""
    sources, own, _ = certain(use, options)
    inputs = {place.number: axis for place, axis in own.items() if place.is_input}
    outputs = {place.number: axis for place, axis in own.items() if not place.is_input}
    bound = use.bound()
    if bound is not None and bound.place in inputs:
        outputs = dict.fromkeys(use.cotangents, after(bound, inputs[bound.place]))
    for place in open_places(use, options):
        raise UnattributableError(_complaint(use, place, options.get(place, []), n_samples))
    return Placement(inputs, outputs, {place: axis for place, axis in sources.items() if place in sources_of(use)})


def _no_probe(options: Mapping[Site, Options], lost: Collection[Site], error: Exception) -> str:
    site = next(s for s, by_place in options.items() if s in lost or any(len(axes) > 1 for axes in by_place.values()))
    names = ", ".join(f"`{name}`" for name in site.parameters)
    return (
        f"GradTrace: can't attribute {names}: in {site} sizes don't tell which axis holds the samples, and "
        f"`training_step` could not be run again to find out "
        f"({type(error).__name__}: {error}). Train with a batch size that divides no other axis, let "
        "`training_step` run without gradients, or leave the parameter out with `GradTrace(params=...)`."
    )


def _complaint(use: Use, place: Place, options: Sequence[SampleAxis], n_samples: int) -> str:
    i = place.number
    tensor = use.operands[i].tensor if place.is_input and i in use.operands else use.cotangents.get(i)
    shape = tuple(tensor.shape) if tensor is not None else "unknown"
    found = "several places could hold" if options else "no axis was found to hold"
    names = ", ".join(f"`{name}`" for name in use.site.parameters)
    return (
        f"GradTrace: can't attribute {names}: in {use.site} {found} the {n_samples} samples of the batch "
        f"(tensor of shape {shape}). What is computed from parameters and constants alone, or from a mixture of "
        "samples, can't be split; and where sizes leave doubt, random numbers that are not torch's, or a state that is "
        "kept outside of the model, keep a second run with permuted samples from finding the axis. Leave the parameter "
        "out with `GradTrace(params=...)`, or train with a batch size that divides no other axis, or give "
        "`batch_axis=` if the batch itself was misread."
    )


__all__ = ["Placer", "Probe", "UnattributableError", "UsePlaces"]
