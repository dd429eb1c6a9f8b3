"""Which backward passes the gradients hold at the moment, parameter by parameter.

``.grad`` adds up what backward passes leave until somebody zeroes it: after every step, after several (accumulation),
for one optimizer's parameters and not for another's (a generator's loss leaves gradients in its discriminator). The
accumulation follows ``.grad`` itself instead of the calls that may have changed it, so the order in which a training
loop calls ``zero_grad``, ``backward`` and ``step`` does not matter:

- at the beginning of a backward pass, a parameter whose gradient is None or zero holds no earlier pass;
- a backward pass reached the parameters whose gradient it changed;
- a step uses up what its parameters hold. If nobody zeroes them afterwards, they hold something unknown.

Where parameters are spread, a backward pass may leave gradients that wait outside of ``.grad`` for a later one, which
adds them to its own when it reduces them (`capture.sharded.waiting_gradients`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.precision import coarsest_by_name
from lightning_gradtrace.capture.shares import add_shares
from lightning_gradtrace.update.clipping import copy_gradient
from lightning_gradtrace.update.sharding import local

Mark = tuple[int, int] | None


@dataclass
class BackwardPass:
    """One backward pass through the forward pass of a batch.

    Attributes:
        batch: running number of the batch; several passes may belong to one batch.
        micro_batch: its shares; those that no gradient holds any more are removed.
        loss: what was back-propagated, without the loss scale.
        held_by: parameters whose gradients it changed and that still hold it.
        waiting: parameters for whose gradients it left something that waits.
        idle: whether it reached no tracked parameter at all.
        unseen_by: optimizers that have made no step since; they are told of idle passes too.
    """

    batch: int
    micro_batch: MicroBatch
    loss: Tensor
    held_by: set[str]
    waiting: set[str]
    idle: bool
    unseen_by: set[int]

    @property
    def over(self) -> bool:
        """Whether no coming step has to do with it."""
        return not self.held_by and not self.waiting and not (self.idle and self.unseen_by)

    def drop(self, names: Collection[str]) -> None:
        """Forget the shares of parameters that hold it no more, or never will."""
        self.held_by.difference_update(names)
        self.waiting.difference_update(names)
        for name in names:
            self.micro_batch.shares.pop(name, None)


@dataclass
class Accumulation:
    """The backward passes since the gradients were zeroed.

    Attributes:
        reference: copies of the gradients as the last backward pass left them, before hooks or clipping, by name.
        unknown: parameters whose gradients hold something that no captured pass left.
        waiting: returns gradients that wait outside of ``.grad``, by the identity of their parameters.
    """

    reference: dict[str, Tensor] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    waiting: Callable[[], Mapping[int, Tensor]] = dict
    _passes: list[BackwardPass] = field(default_factory=list)
    _marks: dict[str, Mark] = field(default_factory=dict)
    _waiting_marks: dict[str, Mark] = field(default_factory=dict)
    _waiting_unknown: set[str] = field(default_factory=set)

    @torch.no_grad()
    def begin_pass(self, parameters: Mapping[str, Tensor]) -> None:
        """Look at the gradients as a backward pass finds them.

        Args:
            parameters: the tracked parameters by name.
        """
        held = {name for p in self._passes for name in p.held_by}
        zeroed = set()
        for name, parameter in parameters.items():
            grad, mark = parameter.grad, _mark(parameter.grad)
            if grad is None or (name in held and mark != self._marks.get(name) and not _any(grad)):
                zeroed.add(name)
            elif name not in held:
                (self.unknown.add if _any(grad) else zeroed.add)(name)
            self._marks[name] = mark
        self._forget(zeroed)
        self._look_at_waiting(parameters)

    def _look_at_waiting(self, parameters: Mapping[str, Tensor]) -> None:
        waiting = self.waiting()
        known = {name for p in self._passes for name in p.waiting}
        gone = set()
        for name, parameter in parameters.items():
            gradient = waiting.get(id(parameter))
            mark, before = _mark(gradient), self._waiting_marks.get(name)
            if gradient is None or (mark != before and not _any(gradient)):
                gone.add(name)
            elif name not in known:
                self._waiting_unknown.add(name)
            self._waiting_marks[name] = mark
        self._waiting_unknown -= gone
        for p in self._passes:
            p.drop(p.waiting & gone)
        self._passes = [p for p in self._passes if not p.over]

    def end_pass(
        self,
        batch: int,
        micro_batch: MicroBatch,
        loss: Tensor,
        parameters: Mapping[str, Tensor],
        optimizers: Collection[int],
    ) -> None:
        """Add a backward pass.

        Args:
            batch: running number of the batch.
            micro_batch: shares of the pass.
            loss: what was back-propagated.
            parameters: the tracked parameters by name.
            optimizers: keys of all optimizers.
        """
        reached = _changed(self._marks, {name: p.grad for name, p in parameters.items()})
        left = self.waiting()
        waiting = _changed(self._waiting_marks, {name: left.get(id(p)) for name, p in parameters.items()})
        for earlier in self._passes:  # what waited has come to `.grad`
            earlier.held_by |= earlier.waiting & reached
            earlier.waiting -= reached
        self.unknown |= self._waiting_unknown & reached
        self._waiting_unknown -= reached
        # A frozen parameter may have been used; only what `.grad` holds takes part in a step.
        kept = dataclasses.replace(
            micro_batch, shares={n: share for n, share in micro_batch.shares.items() if n in reached or n in waiting}
        )
        idle = not reached and not waiting
        self._passes.append(BackwardPass(batch, kept, loss.detach(), reached, waiting, idle, set(optimizers)))
        for name in reached:
            if (gradient := parameters[name].grad) is not None:
                self.reference[name] = copy_gradient(gradient)

    def of(self, optimizer: int, names: Collection[str]) -> tuple[list[MicroBatch], list[Tensor]]:
        """Return what the gradients of an optimizer's parameters hold.

        Args:
            optimizer: key of the optimizer.
            names: its tracked parameters.

        Returns:
            One micro-batch per batch, with shares of ``names`` alone, and the losses of the passes.
        """
        batches: dict[int, list[MicroBatch]] = {}
        losses = []
        for p in self._passes:
            if not p.held_by.isdisjoint(names) or (p.idle and optimizer in p.unseen_by):
                held = p.held_by.intersection(names)
                shares = {name: share for name, share in p.micro_batch.shares.items() if name in held}
                batches.setdefault(p.batch, []).append(dataclasses.replace(p.micro_batch, shares=shares))
                losses.append(p.loss)
        return [_merge(found) for found in batches.values()], losses

    def not_captured(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters whose gradients hold something that no captured pass left, or that a step has used up.

        Args:
            parameters: tracked parameters by name.
        """
        grads = {name: p.grad for name, p in parameters.items() if name in self.unknown}
        return [name for name, grad in grads.items() if grad is not None and _any(grad)]

    def spend(self, optimizer: int, names: Collection[str]) -> None:
        """Take note of a step: what its parameters hold is used up, though still there."""
        self._forget(names)
        self.unknown.update(names)
        self.passed_over(optimizer)

    def passed_over(self, optimizer: int) -> None:
        """Forget passes that reached no tracked parameter: an optimizer made its step or zeroed its gradients."""
        for p in self._passes:
            p.unseen_by.discard(optimizer)
        self._passes = [p for p in self._passes if not p.over]

    def _forget(self, names: Collection[str]) -> None:
        self.unknown.difference_update(names)
        for name in names:
            self.reference.pop(name, None)
        for p in self._passes:
            p.drop(p.held_by.intersection(names))
        self._passes = [p for p in self._passes if not p.over]


def _mark(grad: Tensor | None) -> Mark:
    """Return what changes when the gradient is replaced or written to; its address is not given away meanwhile."""
    return None if grad is None else (id(grad), local(grad)._version)


def _changed(marks: dict[str, Mark], gradients: Mapping[str, Tensor | None]) -> set[str]:
    """Return the parameters whose gradients are there and have changed; their marks are renewed."""
    found = {name: mark for name, grad in gradients.items() if (mark := _mark(grad)) is not None}
    changed = {name for name, mark in found.items() if mark != marks.get(name)}
    marks.update({name: found[name] for name in changed})
    return changed


def _any(grad: Tensor) -> bool:
    grad = local(grad)
    return bool((grad.coalesce().values() if grad.is_sparse else grad).any())


def _merge(found: list[MicroBatch]) -> MicroBatch:
    """Add several backward passes through the forward pass of one batch."""
    if len(found) == 1:
        return found[0]
    if any(m.n_chosen is not None for m in found):
        raise ValueError(
            f"`TokenGrads`: {len(found)} backward passes went through the forward pass of one batch, expected one: the "
            "loss tokens of several losses can't be told apart. Add the losses up, or leave `TokenGrads` out."
        )
    names = dict.fromkeys(name for m in found for name in m.shares)
    shares = {name: add_shares([m.shares[name] for m in found if name in m.shares]) for name in names}
    unlike, precision = set().union(*(m.unlike for m in found)), coarsest_by_name(m.precision for m in found)
    return dataclasses.replace(found[0], shares=shares, unlike=unlike, precision=precision)
