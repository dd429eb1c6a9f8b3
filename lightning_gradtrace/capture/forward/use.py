"""A use of tracked parameters: one call of one function in which something computed from them meets the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lightning_gradtrace.capture.forward.arriving import is_vectorised
from lightning_gradtrace.capture.forward.derived import Derived, Lineage, Operand, Root
from lightning_gradtrace.capture.forward.replay import Surroundings
from lightning_gradtrace.capture.placing.batch_axis import candidates, shape_before_view
from lightning_gradtrace.capture.precision import coarsest, coarsest_by_name
from lightning_gradtrace.capture.probing.draws import DrawSite
from lightning_gradtrace.capture.routes.layouts import Note
from lightning_gradtrace.capture.routes.rows import LOST, Route
from lightning_gradtrace.capture.rules import Rule
from lightning_gradtrace.update.sharding import local


@dataclass(frozen=True)
class Site:
    """Where in a forward pass a use happens: the same place in every pass, also if other parts are left out.

    Attributes:
        function: name of the torch function.
        parameters: names of the tracked parameters that the use receives.
        number: how many uses of the same parameters by the same function came before it in the pass.
    """

    function: str
    parameters: tuple[str, ...]
    number: int

    def __str__(self) -> str:
        return f"use {self.number} (`{self.function}` of {', '.join(f'`{p}`' for p in self.parameters)})"


@dataclass
class BoundUse:
    """A use whose arguments fit a rule.

    Attributes:
        rule: the rule.
        values: arguments by name.
        lineages: the tracked ones among them.
        source: name of the argument that holds the samples, empty if the rule looks for them in the output.
        place: where that argument is among the leaves, None without one.
        axes: where samples may be: axis of that argument (or of the output) to axis of the output.
        reads: places among the leaves of the tensors whose values the rule reads.
    """

    rule: Rule
    values: dict[str, Any]
    lineages: dict[str, Lineage]
    source: str
    place: int | None
    axes: Mapping[int, int]
    reads: tuple[int, ...]


@dataclass
class Use:
    """One call of one function with tracked and batched tensors.

    Attributes:
        site: where it happened.
        function: the torch function.
        rule: its closed form, None for the general rule.
        leaves: flattened arguments; `Root` or `Derived` in place of tracked tensors, `Operand` in place of others.
        structure: pytree structure of the arguments.
        around: surroundings in which it ran.
        outputs: the outputs while probing, and those of a random function; None for all others, which nobody reads.
        cotangents: gradient of the loss with respect to each output, filled in by the backward pass.
        routes: whose the entries of the outputs are, of those that are parts of the batch.
        notes: what the axes of the outputs hold, None where nothing is known.
        spread: gives the cotangent of the elements for that of their sum, where the use stands for a call that
            returned the sum (`elements.py`); None for all others.
    """

    site: Site
    function: Callable[..., Any]
    rule: Rule | None
    leaves: list[Any]
    structure: Any
    around: Surroundings
    outputs: list[Operand | None]
    cotangents: dict[int, Tensor] = field(default_factory=dict)
    routes: dict[int, Route] = field(default_factory=dict)
    notes: dict[int, Note | None] = field(default_factory=dict)
    spread: Callable[[Tensor], Tensor] | None = None

    @property
    def operands(self) -> dict[int, Operand]:
        """Batched tensors among the arguments, by their place among the leaves."""
        return {i: leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, Operand) and leaf.batched}

    @property
    def lineages(self) -> dict[int, Lineage]:
        """Tracked tensors among the arguments, by their place among the leaves."""
        return {i: leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, (Root, Derived))}

    @property
    def draws(self) -> frozenset[DrawSite]:
        """Where the random numbers were drawn that it received in place of the batch; nowhere if it met the batch."""
        each = [operand.draws for operand in self.operands.values()]
        return frozenset().union(*each) if all(each) else frozenset()

    @property
    def is_routed(self) -> bool:
        """Whether it received or returned parts of the batch."""
        return bool(self.routes) or any(operand.route is not None for operand in self.operands.values())

    @property
    def switches(self) -> tuple[Any, ...]:
        """What selects a branch of the function, such as the ``training`` of a normalisation."""
        return tuple(leaf for leaf in self.leaves if leaf is None or isinstance(leaf, (bool, str)))

    def bound(self) -> BoundUse | None:
        """Return the arguments by name if the closed form applies to this use, None if the general rule must serve."""
        if self.rule is None:
            return None
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        named = self.rule.bind(args, kwargs)
        if named is None:
            return None
        lineages = {name: leaf for name, leaf in named.items() if isinstance(leaf, (Root, Derived))}
        operands = {name: leaf for name, leaf in named.items() if isinstance(leaf, Operand)}
        source = next((name for name in self.rule.inputs if name in operands and operands[name].batched), "")
        if (self.rule.inputs and not source) or not lineages.keys() <= self.rule.parameters:
            return None
        values = {
            name: leaf.tensor if isinstance(leaf, (Root, Derived, Operand)) else leaf for name, leaf in named.items()
        }
        if any(isinstance(value, Tensor) and value.is_complex() for value in values.values()):
            return None
        axes = self.rule.axes(values, source)
        if not axes:
            return None
        places = {name: i for name in operands for i, leaf in enumerate(self.leaves) if leaf is operands[name]}
        reads = tuple(places[name] for name in operands if name in self.rule.reads)
        return BoundUse(self.rule, values, lineages, source, places.get(source), axes, reads)

    @property
    def precision(self) -> dict[str, torch.dtype]:
        """Coarsest dtype that the gradient of each parameter passes on its way from here.

        What happens inside of a function without a closed form is not seen: under autocast `torch.gru` multiplies in
        half precision and returns single precision.
        """
        passed = [cotangent.dtype for cotangent in self.cotangents.values()]
        if self.rule is None and self.around.autocast is not None:
            passed.append(self.around.autocast)
        return coarsest_by_name(
            dict.fromkeys(lineage.roots, coarsest([lineage.precision, *passed])) for lineage in self.lineages.values()
        )

    @property
    def is_told_by_input(self) -> bool:
        """Whether the samples of an argument tell where those of the outputs are, so that these need not be kept."""
        if self.rule is None or any(operand.route is not None for operand in self.operands.values()):
            return False
        if any(lineage.draws for lineage in self.lineages.values()):
            return False  # whether the samples share the random numbers shows in the outputs
        bound = self.bound()
        return bound is not None and bound.place is not None

    @property
    def reached(self) -> bool:
        """Whether the backward pass came here."""
        return bool(self.cotangents)

    def has_room(self, outputs: Iterable[Tensor], n_samples: int | None) -> bool:
        """Say whether samples can be told apart in the result; in a statistic of the whole batch they can't.

        What is computed from such a statistic belongs to the samples that it meets later, as a constant does.

        Args:
            outputs: what the use returned.
            n_samples: number of samples, None if it is unknown.
        """
        n = n_samples
        if n is None or n == 1:
            return True
        operands = list(self.operands.values())
        if any(operand.route is not None for operand in operands):
            operands = [operand for operand in operands if _may_hold(operand, n)]
            if not operands or any(operand.route is not None for operand in operands):
                return bool(operands)
        if not any(n in o.tensor.shape or candidates(o.tensor.shape, n) for o in operands):
            return False
        shapes = [t.shape for t in outputs]
        if any(n in shape for shape in shapes):
            return True
        bound = self.bound()
        return any(candidates(shape, n, among=bound.axes.values() if bound else None) for shape in shapes)

    def receive(self, output: int, cotangent: Tensor | None) -> None:
        """Keep the cotangent of one output; a second backward pass through it adds up.

        Args:
            output: number of the output.
            cotangent: None where nothing came to this one of several outputs (recurrent layers). One of many backward
                passes at once, which a step may make of its own (``is_grads_batched``), is none of the loss's.
        """
        if cotangent is None or is_vectorised(cotangent):
            return
        cotangent = cotangent.detach() if self.spread is None else self.spread(cotangent.detach())
        known = self.cotangents.get(output)
        self.cotangents[output] = cotangent if known is None else known + cotangent


def _may_hold(operand: Operand, n_samples: int) -> bool:
    """Say whether a tensor can hold samples; a number that was computed can't, as that of an expert."""
    shape, route = operand.tensor.shape, operand.route
    if route is None or route is LOST or (not shape and not route.is_given):
        return bool(candidates(shape, n_samples))
    return True


def operand(tensor: Tensor, batched: bool, route: Route | None = None) -> Operand:
    """Make the operand of a tensor as it is now."""
    return Operand(tensor.detach(), shape_before_view(tensor), tensor._version, batched, route)


def part_from_gradients(tape: Any, parameters: Iterable[Tensor]) -> None:
    """Copy cotangents that lie where a gradient does, because gradients are written to after the backward pass.

    Autograd makes a cotangent the gradient itself where nothing has to be added up: of an offset of the shape of the
    output, as with a single sample, or of the rows of a sparse embedding. Accumulation, clipping and GradScalers then
    write into both.

    Args:
        tape: a tape, after the backward pass; one of another engine holds no cotangents.
        parameters: all parameters, tracked or not.
    """
    taken = {_storage(local(p.grad)) for p in parameters if p.grad is not None}
    uses = [use for one in (tape, getattr(tape, "aside", None)) for use in getattr(one, "uses", ())]
    for use in uses:
        for output, cotangent in use.cotangents.items():
            if _storage(cotangent) in taken:
                use.cotangents[output] = cotangent.clone()


def _storage(tensor: Tensor) -> int | None:
    """Return where a tensor lies; of a sparse one, where its rows do."""
    tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None
