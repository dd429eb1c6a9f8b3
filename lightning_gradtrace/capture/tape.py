"""Sees every use of a tracked parameter in the real forward pass and its cotangent in the real backward pass.

The tape is a `torch.overrides.TorchFunctionMode`: it sees functions, not modules, because a module's parameters are
often used without the module being called (`torch.nn.MultiheadAttention` never calls its ``out_proj``). It runs no
forward of its own and changes no number: it keeps a detached reference to a use's input and puts a hook on its output.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_unflatten

from lightning_gradtrace.capture.batch_axis import shape_before_view
from lightning_gradtrace.capture.derived import Derived, Lineage, Root, flatten_call
from lightning_gradtrace.capture.opening import opened
from lightning_gradtrace.capture.rules import Rule, rule_for


@dataclass(frozen=True)
class Site:
    """Where in a forward pass a use happens: the same place in every pass of an unchanged model.

    Attributes:
        number: running number of the use in the forward passes of one training step.
        function: name of the torch function.
        parameters: names of the tracked parameters that the use receives.
    """

    number: int
    function: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"use {self.number} (`{self.function}` of {', '.join(f'`{p}`' for p in self.parameters)})"


@dataclass
class Operand:
    """A tensor that a use receives and that may hold samples.

    Attributes:
        tensor: the tensor, detached.
        before: its shape before the view that made it, None if no view did.
        version: its version counter at the time of the use, to notice later changes in place.
    """

    tensor: Tensor
    before: tuple[int, ...] | None
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Make the operand of a tensor as it is now."""
        return cls(tensor.detach(), shape_before_view(tensor), tensor._version)


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
    """One call of one function with at least one tracked tensor.

    Attributes:
        site: where it happened.
        function: the torch function.
        rule: its closed form, None for the general rule.
        leaves: flattened arguments; `Root` or `Derived` in place of tracked tensors, `Operand` in place of others.
        structure: pytree structure of the arguments.
        outputs: the outputs while probing; None for each in a training step, where nobody reads them.
        cotangents: gradient of the loss with respect to each output, filled in by the backward pass.
    """

    site: Site
    function: Callable[..., Any]
    rule: Rule | None
    leaves: list[Any]
    structure: Any
    outputs: list[Operand | None]
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    @property
    def operands(self) -> dict[int, Operand]:
        """Tensors that may hold samples, by their place among the leaves."""
        return {i: leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, Operand)}

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
        source = next((name for name in self.rule.inputs if name in operands), "")
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

    def receive(self, output: int, cotangent: Tensor) -> None:
        """Keep the cotangent of one output; a second backward pass through it adds up."""
        known = self.cotangents.get(output)
        self.cotangents[output] = cotangent.detach() if known is None else known + cotangent.detach()


class Tape(TorchFunctionMode):
    """Records the uses of tracked parameters while it is active.

    Args:
        parameters: the tracked parameters by name.
        probing: record uses although no gradients are taken, for `probe.py`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, probing: bool = False) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._probing = probing
        self._count = 0
        # Lineages hold their tensors, so that an id is not given to another tensor while the tape lives.
        self._lineage: dict[int, Lineage] = {id(p): Root(name, p) for name, p in parameters.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function and record it if it uses a tracked tensor."""
        kwargs = kwargs or {}
        if not self._is_tracked(args) and not (kwargs and self._is_tracked(kwargs.values())):
            return func(*args, **kwargs)
        rule = rule_for(func)
        if rule is None and isinstance(func, types.FunctionType):
            with self:
                return opened(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        self._record(func, rule, args, kwargs, result)
        return result

    def _is_tracked(self, values: Iterable[Any]) -> bool:
        lineage = self._lineage
        for value in values:
            if id(value) in lineage:
                return True
            if isinstance(value, (list, tuple)) and self._is_tracked(value):
                return True
        return False

    def _record(
        self, func: Callable[..., Any], rule: Rule | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        outputs = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (list, tuple)) else []
        live = [(i, t) for i, t in enumerate(outputs) if isinstance(t, Tensor) and (self._probing or t.requires_grad)]
        if not any(isinstance(t, Tensor) for t in outputs):
            return
        leaves, structure = flatten_call(args, kwargs)
        leaves = [self._lineage.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            single = isinstance(result, Tensor)
            for i, tensor in live:
                derived = Derived(func, tuple(leaves), structure, None if single else i, tensor)
                self._lineage[id(tensor)] = derived
            return
        operands = [Operand.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        names = [name for leaf in leaves if isinstance(leaf, (Root, Derived)) for name in leaf.roots()]
        site = Site(self._count, getattr(func, "__name__", str(func)), tuple(dict.fromkeys(names)))
        self._count += 1  # uses without gradients count too, so that a pass without gradients numbers them alike
        if not live:
            return
        kept = [Operand.of(t) if self._probing and isinstance(t, Tensor) else None for t in outputs]
        use = Use(site, func, rule, operands, structure, kept)
        self.uses.append(use)
        for i, tensor in live:
            if tensor.requires_grad:
                tensor.register_hook(lambda cotangent, use=use, i=i: use.receive(i, cotangent))


def deactivate(tape: Tape) -> None:
    """Take a tape off the stack of active function modes, wherever it stands; nothing happens if it is not there."""
    stack = _get_current_function_mode_stack()
    if not any(mode is tape for mode in stack):
        return
    above = []
    while (mode := _pop_mode()) is not tape:
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
