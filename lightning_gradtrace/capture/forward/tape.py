"""Sees every use of a tracked parameter in the real forward pass and its cotangent in the real backward pass.

The tape is a `torch.overrides.TorchFunctionMode`: it sees functions, not modules, because a module's parameters are
often used without the module being called (`torch.nn.MultiheadAttention` never calls its ``out_proj``). It runs no
forward of its own and changes no number: it keeps a detached reference to a use's input and puts a hook on its output.

The invariant: every tensor of the pass is tracked (a parameter, or computed from tracked tensors and constants alone),
batched, or a constant. A *use* is a call in which a tracked tensor first meets a batched one; its result is batched. A
call of tracked tensors and constants is a derivation; its result is tracked.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gradtrace.capture.forward.arriving import arriving
from lightning_gradtrace.capture.forward.backward import OwnBackward
from lightning_gradtrace.capture.forward.derived import Derived, Lineage, Operand, Root, flatten_call
from lightning_gradtrace.capture.forward.elements import Elements, elements_of
from lightning_gradtrace.capture.forward.functions import METADATA, Facts, facts, without_running_statistics
from lightning_gradtrace.capture.forward.mixture import Mixtures
from lightning_gradtrace.capture.forward.modes import opened
from lightning_gradtrace.capture.forward.replay import Surroundings, outputs_of
from lightning_gradtrace.capture.forward.taint import Taint
from lightning_gradtrace.capture.forward.use import Site, Use, operand
from lightning_gradtrace.capture.placing.settling import lighten
from lightning_gradtrace.capture.probing.draws import Draws, DrawSite, call_open
from lightning_gradtrace.capture.probing.random_state import RandomState
from lightning_gradtrace.capture.routes.routing import Routes
from lightning_gradtrace.capture.routes.rows import NOBODY
from lightning_gradtrace.capture.rules import Rule, rule_for


class Tape(TorchFunctionMode):
    """Records the uses of tracked parameters while it is active.

    Args:
        parameters: the tracked parameters by name.
        batch: the batch; None if it is unknown, then every tensor that is not tracked counts as batched.
        n_samples: its number of samples.
        batch_axis: axis of the samples in its tensors.
        probing: record although no gradients are taken, and keep the outputs of uses, for `probe.py`.
        shared: where random numbers are drawn that all samples share.
        draws: notes which draw was made where.
        aside: reads the same pass in another way, is not entered itself, and needs what this tape needs.

    Attributes:
        uses: the uses, in the order of the pass.
        mixtures: tensors made of parameters and of the batch as a whole.
        own_backward: makes the step's own backward passes in a probe.
        taint: knows which tensors come from the batch.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any = None,
        n_samples: int | None = None,
        batch_axis: int = 0,
        *,
        probing: bool = False,
        shared: Container[DrawSite] = (),
        draws: Draws | None = None,
        aside: Tape | None = None,
    ) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._probing = probing
        self._routes = Routes(batch, n_samples, batch_axis)
        self._n_samples = n_samples
        self._counts: dict[tuple[str, tuple[str, ...]], int] = {}
        self.mixtures, self.own_backward = Mixtures(), OwnBackward()
        # Lineages hold their tensors, so that an id is not given to another tensor; what has no entries is a constant.
        self._lineage: dict[int, Lineage] = {id(p): Root(name, p) for name, p in parameters.items() if p.numel()}
        self._names = frozenset(parameters)
        self._swaps, self._kept = False, list[Tensor]()
        self._opened: set[tuple[Any, ...]] = set()  # calls of Python functions whose bodies are running
        # Passes that are read once are known; the probe runs others again as they ran.
        self.aside, self.state = aside, None if aside is None else RandomState.now()
        self.taint = Taint(batch, n_samples, self._lineage, shared, None if draws is None else draws.note)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.aside is not None:
            return self.aside.__torch_function__(func, (), args, kwargs)
        return self.own_backward.noted(args, call_open(func, args, kwargs)) if self._probing else func(*args, **kwargs)

    def meet(self, name: str, parameter: Tensor) -> None:
        """Take a tensor for a parameter as well: FSDP2 swaps parameters while a module runs, and frees them after it.

        From then on the tape copies whatever does not come from the batch, because it may be a view of such a tensor,
        and uses are looked into when that is freed.

        Args:
            name: name of a tracked parameter.
            parameter: the tensor that stands for it now.
        """
        self._swaps = True
        if self.aside is not None:
            self.aside.meet(name, parameter)
        if id(parameter) not in self._lineage and name in self._names:
            self._lineage[id(parameter)] = Root(name, self._lasting(parameter))

    def watch(self, tensor: Tensor, hook: Callable[[Tensor | None], None] | None = None) -> None:
        """Take note of a tensor that backward passes are to come to.

        Args:
            tensor: a tensor of the forward pass.
            hook: receives its cotangent; None if nobody asks for it.
        """
        if hook is not None and not self._probing:
            tensor.register_hook(hook)

    def _lasting(self, tensor: Tensor) -> Tensor:
        """Return a copy with values that nobody frees; the tensor itself is kept too, so that its id stays its own."""
        self._kept.append(tensor)
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def forget_backward(self) -> None:
        """Forget what backward passes left; the uses stay, as a retained graph may be run through again."""
        for use in self.uses:
            use.cotangents.clear()
        self.mixtures.forget_backward()
        if self.aside is not None:
            self.aside.forget_backward()

    def clear(self) -> None:
        """Forget everything, so that no tensor of the forward pass is kept alive."""
        self.uses.clear()
        self.mixtures.clear()
        self._lineage.clear()
        self._kept.clear()
        if self.aside is not None:
            self.aside.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function and record it if it uses a tracked tensor."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in METADATA:  # compiled code stays what it is without the tape
            return func(*args, **kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            if self._probing:
                return self.own_backward(opened(func), args, kwargs)
            with self:  # checkpointed layers run their forward pass now
                return opened(func)(*args, **kwargs)
        if func is torch.broadcast_tensors and self._is_tracked(args):  # one function for each of its outputs
            with self:
                shape = torch.broadcast_shapes(*(tensor.shape for tensor in args))
                return tuple(tensor.expand(shape) for tensor in args)
        if not self._is_tracked(args) and not (kwargs and self._is_tracked(kwargs.values())):
            return self._untracked(facts(func), func, args, kwargs)
        rule = rule_for(func)
        if rule is None and isinstance(func, types.FunctionType):
            call_of = (func, *map(id, args))
            if call_of not in self._opened:
                return self._look_inside(call_of, args, kwargs)
        known = facts(func)
        if not (self._probing or torch.is_grad_enabled()):
            return self._untracked(known, func, args, kwargs)
        # What a call overwrites, or draws, is known only before it.
        call = self._call(known, func, args, kwargs) if known.in_place or known.random else None
        drawn = self.taint.before(known, args, kwargs)
        result = self._run(func, args, kwargs)
        if drawn is not None:
            self.taint.ways.after(drawn, args[0] if known.in_place else result)
        outputs = outputs_of(known.in_place, args, result)
        if not self._live(known, outputs) or self._is_frozen(args, kwargs):
            return self._follow_on(known, func, args, kwargs, self._is_batched(args, kwargs), result)
        if known.in_place or not any(id(t) in self._lineage for t in outputs):  # `W.to(W.dtype)` is W
            leaves, structure, around = call or self._call(known, func, args, kwargs)
            elements = elements_of(func, args, kwargs) if self._is_batched(args, kwargs) else None
            use = self._record(func, rule, leaves, structure, around, outputs, elements)
            if use is not None:
                self._routes.after(known, func, args, kwargs, result, self.taint, use)
                if elements is not None:
                    self._routes.after(known, func, elements.args, elements.kwargs, elements.value, self.taint)
                parts = outputs if elements is None else [elements.value]
                use.routes = self._routes.of(parts)
                use.notes = {i: self._routes.layouts(t) for i, t in enumerate(parts) if isinstance(t, Tensor)}
        return result

    def _look_inside(self, call_of: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the body of a function written in Python under the tape.

        Some of them, as `Tensor.unflatten`, hand their call on to a built-in function that reaches the tape under the
        same name; that one is taken as it is.
        """
        self._opened.add(call_of)
        try:
            with self:
                return opened(call_of[0])(*args, **kwargs)
        finally:
            self._opened.discard(call_of)

    def _untracked(
        self, known: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        batched = self._is_batched(args, kwargs)
        drawn = self.taint.before(known, args, kwargs)
        result = self._run(func, args, kwargs)
        if drawn is not None:
            self.taint.ways.after(drawn, args[0] if known.in_place else result)
        return self._follow_on(known, func, args, kwargs, batched, result)

    def _follow_on(self, known: Facts, func: Any, args: Any, kwargs: Any, batched: bool, result: Any) -> Any:
        if self.taint.after(known, args, kwargs, batched, result):
            self._routes.after(known, func, args, kwargs, result, self.taint)
        return result

    def _is_frozen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Say whether a probe's call has no more than frozen parameters and constants, which no gradient passes."""
        if not self._probing or self._is_batched(args, kwargs):
            return False
        found = [self._lineage.get(id(leaf)) for leaf in flatten_call(args, kwargs)[0]]
        return not any(isinstance(one, Derived) or (one and one.tensor.requires_grad) for one in found)

    def _is_batched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return self.taint.any(args) or bool(kwargs and self.taint.any(kwargs.values()))

    def _call(
        self, known: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], Any, Surroundings]:
        leaves, structure = self._leaves(known, args, kwargs)
        tracked = next(leaf for leaf in leaves if isinstance(leaf, (Root, Derived)))
        return leaves, structure, Surroundings.now(func, tracked.tensor.device)

    def _is_tracked(self, values: Iterable[Any]) -> bool:
        lineage = self._lineage
        for value in values:
            if id(value) in lineage:
                return True
            if isinstance(value, (list, tuple)) and self._is_tracked(value):
                return True
        return False

    def _live(self, known: Facts, outputs: list[Any]) -> dict[int, Tensor]:
        """Return the outputs that gradients pass, or would pass if a probe ran with gradients."""
        if not self._probing:
            return {i: t for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.requires_grad}
        if known.detached or known.fresh or (known.draws and not known.in_place):
            return {}
        return {
            i: t for i, t in enumerate(outputs) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
        }

    def _leaves(self, known: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Return the flattened arguments, as they are before the call, and their structure."""
        leaves, structure = flatten_call(args, kwargs)
        found: list[Any] = []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) in self._lineage:
                found.append(self._lineage[id(leaf)])
            else:
                read = not known.fresh and not (known.shape_only and i)
                batched = read and self.taint(leaf)
                kept = operand(self._lasting(leaf) if self._swaps and not batched else leaf, batched)
                kept.route = self._routes.known(leaf, self.taint) if batched else None
                kept.batched = batched and kept.route is not NOBODY
                kept.draws = self.taint.draws(leaf) if read else kept.draws
                kept.note = self._routes.layouts(leaf) if batched else None
                if known.in_place and i == 0:
                    kept = self._before_writing(known, kept)
                found.append(kept)
        return found, structure

    def _before_writing(self, known: Facts, target: Operand) -> Operand:
        """Keep what a function in place is about to overwrite, unless no derivative asks for it."""
        tensor = target.tensor
        spare = known.additive and not self._probing
        copy = tensor.new_zeros(()).expand(tensor.shape) if spare else tensor.clone()
        return Operand(copy, target.before, copy._version, target.batched, draws=target.draws)

    def _record(
        self,
        func: Callable[..., Any],
        rule: Rule | None,
        leaves: list[Any],
        structure: Any,
        around: Surroundings,
        outputs: list[Any],
        elements: Elements | None,
    ) -> Use | None:
        """Record a call as a use, which is returned, or as a derivation."""
        known = facts(func)
        live = self._live(known, outputs)
        leaves = without_running_statistics(known.name, leaves)
        if not any(isinstance(leaf, Operand) and leaf.batched for leaf in leaves):
            mixed = any(isinstance(leaf, Operand) and leaf.route is NOBODY for leaf in leaves)
            self._derive(func, leaves, structure, around, live, mixed)
            return None
        names = tuple(dict.fromkeys(n for one in leaves if isinstance(one, (Root, Derived)) for n in one.roots))
        keep = self._probing or around.random is not None
        parts, call = outputs, (leaves, structure)
        if elements is not None:
            parts, call = [elements.value], self._leaves(known, elements.args, elements.kwargs)
        kept = [operand(t, True) if keep and isinstance(t, Tensor) else None for t in parts]
        key = (known.name, names)
        use = Use(Site(*key, self._counts.get(key, 0)), func, rule, *call, around, kept)
        use.spread = None if elements is None else elements.spread()
        if self._probing and around.random is None and use.is_told_by_input:
            use.outputs = [None] * len(outputs)
        if not use.has_room(live.values() if elements is None else parts, self._n_samples):
            self._derive(func, leaves, structure, around, live, mixed=True)
            return None
        if self._probing:
            lighten(use)
        self._counts[key] = use.site.number + 1
        self.uses.append(use)
        for mixture in self.mixtures.among(use.lineages.values()):
            mixture.readers.append(use)
        for i, tensor in ((i, t) for i, t in live.items() if t.requires_grad):
            self.watch(*arriving(tensor, functools.partial(use.receive, i), leaves, known.in_place))
        if known.in_place:
            self._lineage.pop(id(outputs[0]), None)
            self.taint.written(outputs[0], use.draws)
        self.taint.add(outputs, use.draws)
        return use

    def _derive(
        self,
        func: Callable[..., Any],
        leaves: list[Any],
        structure: Any,
        around: Surroundings,
        live: Mapping[int, Tensor],
        mixed: bool,
    ) -> None:
        shared = tuple(leaves)  # one object for all outputs: by it they are known to come from one call
        before = self.mixtures.among(leaves)
        for i, tensor in live.items():
            values = self._lasting(tensor) if self._swaps else tensor
            derived = Derived(func, shared, structure, around, i, values)
            self._lineage[id(tensor)] = derived
            if (mixed or before) and tensor.requires_grad:
                self.watch(tensor, self.mixtures.add(derived, facts(func).name, before).reach)
