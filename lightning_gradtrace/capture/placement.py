"""Decides, use by use, where the samples are; asks the permutation probe where sizes leave doubt."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from lightning_gradtrace.capture.batch_axis import SampleAxis, candidates, narrow, shape_before_view
from lightning_gradtrace.capture.routing import Rows
from lightning_gradtrace.capture.use import Site, Use


@dataclass(frozen=True)
class Placement:
    """Places of the samples in the tensors of a use.

    Attributes:
        inputs: by position among the leaves; arguments that hold no samples are left out.
        outputs: by number of the output.
        sources: for tensors whose rows were picked, places in the tensors that they were picked from.
    """

    inputs: dict[int, SampleAxis]
    outputs: dict[int, SampleAxis]
    sources: dict[Place, SampleAxis] = field(default_factory=dict)

    def fits(self, use: Use, n_samples: int) -> bool:
        """Say whether a use of the same site has shapes that this placement can describe."""
        operands = use.operands
        if use.is_lost or _routed(use).keys() != self.sources.keys():
            return False
        if any(not self.sources[place].fits(source.shape, n_samples) for place, source in _routed(use).items()):
            return False
        return all(
            i in operands and axis.fits(operands[i].tensor.shape, n_samples) for i, axis in self.inputs.items()
        ) and all(
            (i in self.outputs and self.outputs[i].fits(cotangent.shape, n_samples)) or (False, i) in self.sources
            for i, cotangent in use.cotangents.items()
        )

    def of(self, use: Use, n_samples: int) -> UsePlaces:
        """Return the places in the tensors of one use; the rows that it picked are its own."""
        inputs: dict[int, AnyPlace] = dict(self.inputs)
        outputs: dict[int, AnyPlace] = dict(self.outputs)
        for (is_input, i), axis in self.sources.items():
            route = use.operands[i].route if is_input else use.routes[i]
            assert route is not None
            (inputs if is_input else outputs)[i] = route.owners(axis, n_samples)
        bound = use.bound()
        if bound is not None and bound.place is not None and (True, bound.place) in self.sources:
            outputs = outputs or dict.fromkeys(use.cotangents, inputs[bound.place])
        return UsePlaces(inputs, outputs)


AnyPlace = SampleAxis | Rows
# (is an input?, number)
Place = tuple[bool, int]


@dataclass(frozen=True)
class UsePlaces:
    """Places of the samples in the tensors of one use, rows that were picked included.

    Attributes:
        inputs: by position among the leaves; arguments that hold no samples are left out.
        outputs: by number of the output.
    """

    inputs: dict[int, AnyPlace]
    outputs: dict[int, AnyPlace]

    @property
    def has_rows(self) -> bool:
        """Whether any tensor holds rows that were picked."""
        return any(isinstance(place, Rows) for place in (*self.inputs.values(), *self.outputs.values()))


def _routed(use: Use) -> dict[Place, Tensor]:
    """Return the tensors that rows of a use were picked from."""
    found = {(True, i): operand.route for i, operand in use.operands.items()}
    found |= {(False, i): route for i, route in use.routes.items() if i in use.cotangents}
    return {place: route.source for place, route in found.items() if route is not None and route.source is not None}


class UnattributableError(RuntimeError):
    """A parameter's gradient can't be split into samples; the message says which, why, and what to do."""


# (is an input?, place) -> options; one option each means that there is no doubt.
Options = dict[tuple[bool, int], list[SampleAxis]]


class Probe(Protocol):
    """What the placer asks; see `lightning_gradtrace.capture.probe.PermutationProbe`."""

    def coincides(self) -> bool:
        """Say whether something else than samples is as numerous as they are."""

    def __call__(self) -> tuple[Sequence[Use], Sequence[Use], Tensor]:
        """Return the uses of a run, those of the run on the permuted batch, and the order of its samples."""


class Placer:
    """Remembers the placement of every site of a model; sizes propose, the probe confirms or chooses, once."""

    def __init__(self) -> None:
        self._known: dict[Site, Placement] = {}

    def place(self, uses: Sequence[Use], n_samples: int, probe: Probe) -> list[Placement]:
        """Return the placement of every use.

        Args:
            uses: uses of one micro-batch, with cotangents.
            n_samples: number of samples of the micro-batch.
            probe: asked about sites that were not seen before, if sizes leave doubt or may mislead.

        Returns:
            A placement per use.

        Raises:
            UnattributableError: the samples of a use can't be found.
        """
        options = {use.site: self._options(use, n_samples) for use in uses if not self._is_known(use, n_samples)}
        lost = {use.site for use in uses if use.is_lost}
        doubtful = bool(lost) or any(len(found) > 1 for by_place in options.values() for found in by_place.values())
        if n_samples > 1 and (doubtful or (options and probe.coincides())):
            options = self._confirm(options, probe, doubtful, lost)
        found = {}
        for use in uses:
            if use.site in options:
                found[use.site] = self._decide(use, options[use.site], n_samples)
        if n_samples > 1:  # one sample fits everywhere and teaches nothing about later batches
            self._known.update(found)
        return [found.get(use.site) or self._known[use.site] for use in uses]

    def _confirm(
        self, options: dict[Site, Options], probe: Probe, doubtful: bool, lost: Collection[Site]
    ) -> dict[Site, Options]:
        """Let the probe choose where sizes leave doubt, and contradict them where they mislead."""
        try:
            first, second, order = probe()
        except Exception as error:
            if doubtful:
                raise
            warnings.warn(
                "GradTrace: the forward pass could not be repeated to confirm which axis of each layer's input holds "
                f"the samples ({type(error).__name__}: {error}). Sizes alone decide; they leave no doubt.",
                stacklevel=2,
            )
            return options
        permuted = {use.site: use for use in second}
        settled = dict(options)
        for use in first:
            if use.site in options and use.site in permuted:
                settled[use.site] = _settle(use, permuted[use.site], options[use.site], order, use.site in lost)
        return settled

    def _is_known(self, use: Use, n_samples: int) -> bool:
        known = self._known.get(use.site)
        return known is not None and known.fits(use, n_samples)

    def _options(self, use: Use, n_samples: int) -> Options:
        bound = use.bound()
        options: Options = {}
        routed = _routed(use)
        for place, source in routed.items():
            options[place] = [o for o in candidates(source.shape, n_samples) if o.axis < max(source.dim() - 1, 1)]
        for i, operand in use.operands.items():
            if (True, i) not in routed and (bound is None or i == bound.place):
                shape = operand.tensor.shape
                found = candidates(shape, n_samples, among=bound.axes if bound else None)
                options[True, i] = narrow(found, shape, operand.before, n_samples)
        if bound is None or bound.place is None:
            for i, cotangent in use.cotangents.items():
                if (False, i) in routed:
                    continue
                found = candidates(cotangent.shape, n_samples, among=bound.axes if bound else None)
                options[False, i] = narrow(found, cotangent.shape, shape_before_view(cotangent), n_samples)
        return options

    def _decide(self, use: Use, options: Options, n_samples: int) -> Placement:
        """Choose the places; those of the outputs are needed, those of other arguments than a rule's are not."""
        bound = use.bound()
        source = bound.place if bound else None
        must = [(True, source)] if source is not None else [(False, i) for i in use.cotangents]
        for place in must:
            if len(options[place]) != 1:
                raise UnattributableError(_complaint(use, place, options[place], n_samples))
        chosen = {place: found[0] for place, found in options.items() if len(found) == 1}
        inputs = {i: axis for (is_input, i), axis in chosen.items() if is_input}
        outputs = {i: axis for (is_input, i), axis in chosen.items() if not is_input}
        sources = {place: chosen[place] for place in _routed(use) if place in chosen}
        if sources:
            inputs = {i: axis for i, axis in inputs.items() if (True, i) not in sources}
            outputs = {i: axis for i, axis in outputs.items() if (False, i) not in sources}
            return Placement(inputs, outputs, sources)
        if bound and source is not None:
            taken = inputs[source]
            axis = taken if taken.factor == "single" else replace(taken, axis=bound.axes[taken.axis])
            outputs = dict.fromkeys(use.cotangents, axis)
        return Placement(inputs, outputs)


def _settle(first: Use, second: Use, options: Options, order: Tensor, strictly: bool) -> Options:
    """Keep the places along which the permuted run's tensors are the first run's tensors, permuted.

    A place that size alone allows is dropped only if the tensor stays as it is, whatever the order of the samples: it
    holds something else of the same number, such as positions. Any other difference may be chance in the model.
    """
    settled: Options = {}
    for (is_input, i), found in options.items():
        if not found:
            settled[is_input, i] = found
            continue
        before, after = _compared(first, (is_input, i)), _compared(second, (is_input, i))
        if before is None or after is None or before.shape != after.shape:
            settled[is_input, i] = found if len(found) == 1 and not strictly else []
            continue
        order = order.to(before.device)
        fitting = [o for o in found if _same(o.permute(before, order), after)]
        whole = [o for o in found if o.factor == "whole"]
        if not fitting and len(whole) > 1:  # samples against samples: it is split by the first of the two axes
            fitting = [
                one
                for one, other in itertools.combinations(whole, 2)
                if _same(other.permute(one.permute(before, order), order), after)
            ]
        if not fitting and len(found) == 1 and not strictly and not _same(before, after):
            fitting = found
        settled[is_input, i] = fitting
    return settled


def _compared(use: Use, place: Place) -> Tensor | None:
    """Return what the probe looks at: a tensor of the use, or the one that its rows were picked from."""
    is_input, i = place
    operand = use.operands.get(i) if is_input else use.outputs[i]
    if operand is None:
        return None
    route = operand.route if is_input else use.routes.get(i)
    return operand.tensor if route is None or route.source is None else route.source


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding that another order of samples brings."""
    if not (a.is_floating_point() or a.is_complex()):
        return bool((a == b).all())
    scale = float(b.abs().amax()) if b.numel() else 0.0
    precise = a.element_size() >= 4
    return bool(((a - b).abs().amax() <= (1e-4 if precise else 3e-2) * scale) if b.numel() else True)


def _complaint(use: Use, place: tuple[bool, int], options: Sequence[SampleAxis], n_samples: int) -> str:
    is_input, i = place
    tensor = use.operands[i].tensor if is_input and i in use.operands else use.cotangents.get(i)
    shape = tuple(tensor.shape) if tensor is not None else "unknown"
    found = "several places could hold" if options else "no axis holds"
    names = ", ".join(f"`{name}`" for name in use.site.parameters)
    return (
        f"GradTrace: can't attribute {names}: in {use.site} {found} the {n_samples} samples of the batch "
        f"(tensor of shape {shape}). What is computed from parameters and constants alone, or from a mixture of "
        "samples, can't be split. Leave the parameter out with `GradTrace(params=...)`, or train with a batch size "
        "that is no size of another axis, or give `batch_axis=` if the batch itself was misread."
    )


__all__ = ["Placement", "Placer", "Probe", "UnattributableError"]
