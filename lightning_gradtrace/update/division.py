"""One optimizer step, divided: remembers what it needs before the step and gives the scales and the ledger after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradtrace.capture.precision import HALF
from lightning_gradtrace.capture.shares import Share, accumulation_dtype
from lightning_gradtrace.update._base import Split, UpdateRule, setting
from lightning_gradtrace.update._generic import GenericRule
from lightning_gradtrace.update._registry import rule_for
from lightning_gradtrace.update.clipping import clip_factors, copy_gradient, dense, projection
from lightning_gradtrace.update.ledger import Balance, Entry, balance
from lightning_gradtrace.update.preconditioned import precondition
from lightning_gradtrace.update.sharding import local, local_state


@dataclass
class _Parameter:
    """What is kept of one parameter from before the step, and what was read off after it."""

    tensor: Tensor
    group: Mapping[str, Any]
    gradient: Tensor | None
    memory: dict[str, Any]
    weights: Tensor | None
    split: Split | None = None
    clip: float | Tensor = 1.0
    kept: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """The gradient as the optimizer saw it; one that the step set to None is taken as not clipped."""
        if self.kept is not None:
            return self.kept
        if self.tensor.grad is not None:
            return local(self.tensor.grad).detach()
        assert self.gradient is not None
        return self.gradient


@dataclass
class StepDivision:
    """The division of one step of one optimizer.

    Make it after the gradients of the step are complete and before they are clipped, call `complete` after the step.
    Memory: a copy of the tracked gradients, and one tensor of gains where the optimizer has one per weight; on steps
    with a ledger also copies of the tracked weights and of the optimizer's memory. Carry and decay are formed for one
    parameter at a time.

    Attributes:
        optimizer: the optimizer.
        ledger: whether the residual is wanted; costs copies of the tracked weights.
        loss_scale: factor by which the cotangents exceed the true gradients: the scale of fp16 AMP times the number of
            ranks that gradients are averaged over, 1 otherwise.
        unexplained: parameters whose gradients something other than a factor changed before the step; after `complete`.
    """

    optimizer: Optimizer
    ledger: bool
    loss_scale: float
    unexplained: list[str] = field(default_factory=list, init=False)
    _rule: UpdateRule
    _parameters: dict[str, _Parameter] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        optimizer: Optimizer,
        rule: UpdateRule,
        tracked: Mapping[str, Tensor],
        ledger: bool,
        loss_scale: float = 1.0,
        reference: Mapping[str, Tensor] | None = None,
    ) -> StepDivision:
        """Keep what the division of the coming step needs.

        Args:
            optimizer: the optimizer, its gradients complete and not yet clipped.
            rule: from `explain`.
            tracked: tracked parameters by name; those without a gradient or of other optimizers are left out.
            ledger: whether the ledger is wanted for this step.
            loss_scale: see the class.
            reference: copies of the gradients, unscaled, as the backward pass left them, if hooks may have changed
                them since; by name. Parameters that are not in it have their gradients copied now.

        Returns:
            The division, to be completed after the step.

        Raises:
            ValueError: a parameter is complex.
        """
        division = cls(optimizer, ledger, loss_scale, rule)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        moving = {name: p for name, p in tracked.items() if id(p) in groups and p.grad is not None}
        gradients = dict(reference or {})
        gradients.update(
            {n: copy_gradient(p.grad) for n, p in moving.items() if n not in gradients and p.grad is not None}
        )
        for name, tensor in moving.items():
            if tensor.is_complex():
                raise ValueError(
                    f"GradTrace divides the steps of real parameters, and `{name}` is {tensor.dtype}. Leave it out "
                    "with `GradTrace(params=...)`, or keep its real and imaginary part as two parameters."
                )
            group = groups[id(tensor)]
            state = local_state(optimizer.state.get(tensor, {}))
            memory = rule.remember(local(tensor).detach(), group, state, ledger)
            weights = local(tensor).detach().clone() if ledger else None
            division._parameters[name] = _Parameter(tensor, group, gradients[name], memory, weights)
        return division

    def keep_gradients(self) -> None:
        """Copy the gradients that the step may write into; called when it is about to use them, after clipping."""
        scale = getattr(self.optimizer, "grad_scale", None)  # of fp16 AMP, for fused optimizers to divide by
        for p in self._parameters.values():
            grad = p.tensor.grad
            if p.kept is None and grad is not None and self._rule.overwrites_gradient(p.group):
                p.kept = dense(grad).clone() if scale is None else dense(grad) / scale

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients before clipping, by name; those that were not let go of."""
        return {name: p.gradient for name, p in self._parameters.items() if p.gradient is not None}

    @torch.no_grad()
    def complete(self, forget: bool = True) -> None:
        """Read off clipping and the optimizer's state after the step.

        Args:
            forget: whether `gradients` are no longer needed; the gains of each parameter then take their room.
        """
        seen = [dense(p.seen) for p in self._parameters.values()]
        factors = clip_factors(list(self.gradients.values()), seen)
        for (name, p), factor, after in zip(self._parameters.items(), factors, seen, strict=True):
            if factor is None:
                self.unexplained.append(name)
                factor = projection(self.gradients[name], after)
            p.clip = factor.expand(after.shape) if isinstance(factor, Tensor) else factor
            p.split = self._split(p, None)
            if p.kept is None and p.tensor.grad is not None:  # step hooks of others may zero it before the ledger
                whole = self.ledger and not self._rule.elementwise
                p.kept = p.seen.clone() if whole else p.seen
            if forget and p.kept is not None:
                p.gradient = None

    @property
    def is_complete(self) -> bool:
        """Whether the step has been read off."""
        return all(p.split is not None for p in self._parameters.values())

    @property
    def factors(self) -> dict[str, tuple[float | Tensor, float | Tensor]]:
        """The optimizer's own factor and that of clipping of every parameter that moved; of a spread one, by piece."""
        return {name: (p.split.gain, p.clip) for name, p in self._parameters.items() if p.split is not None}

    def gather(self, name: str, gain: float | Tensor, clip: float | Tensor) -> None:
        """Replace `factors` of a piece by those of the whole parameter, for `scale`, `share` and `gain`."""
        p = self._parameters[name]
        assert p.split is not None
        p.split, p.clip = replace(p.split, gain=gain), clip

    def scale(self, name: str) -> float | Tensor | None:
        """Return the factor from `share` to the shifts of a parameter, None if the step did not move it."""
        p = self._parameters.get(name)
        if p is None or p.split is None:
            return None
        factor = 1.0 / self.loss_scale * (1.0 if _has_matrix(p.split) else p.clip)
        return p.split.gain if isinstance(factor, float) and factor == 1.0 else p.split.gain * factor

    def share(self, name: str, share: Share) -> Share:
        """Return what `scale` turns into shifts: the share itself, or the share times the matrices of the step."""
        p = self._parameters.get(name)
        if p is None or p.split is None or not _has_matrix(p.split):
            return share
        return precondition(share, p.clip, p.split.left, p.split.right)

    def gain(self, name: str) -> float | Tensor | None:
        """Return the optimizer's own factor, without clipping; None if the step did not move the parameter."""
        p = self._parameters.get(name)
        return None if p is None or p.split is None else p.split.gain

    def clip_factor(self) -> float:
        """Return the factor by which the gradients were clipped, NaN if it differs between weights."""
        factors = [p.clip for p in self._parameters.values()]
        if not factors or any(isinstance(f, Tensor) for f in factors):
            return float("nan") if factors else 1.0
        numbers = [float(f) for f in factors]
        middle = sorted(numbers)[len(numbers) // 2]
        return middle if max(numbers) - min(numbers) <= 1e-4 * abs(middle) else float("nan")

    @torch.no_grad()
    def balance(self, total: Callable[[str], Tensor | None]) -> Balance:
        """Return the outcome of the ledger, NaN if it was not asked for.

        Args:
            total: gives the sum of the shifts of a parameter over all occurrences, None for no shifts.
        """
        return balance(self.entries(total)) if self.ledger else Balance()

    def entries(self, total: Callable[[str], Tensor | None]) -> Iterator[Entry]:
        """Yield the ledger's lines, one parameter after the other; see `balance`."""
        for name in self._parameters:
            yield self.entry(name, total(name))

    def entry(self, name: str, shifts: Tensor | None) -> Entry:
        """Return one parameter's line in the ledger.

        Args:
            name: a parameter that the step has a gradient of.
            shifts: sum of its shifts over all occurrences, None for no shifts.
        """
        p = self._parameters[name]
        assert p.weights is not None
        split = self._split(p, p.weights)
        shifts = torch.zeros_like(p.weights) if shifts is None else shifts
        return Entry(p.weights, local(p.tensor).detach(), shifts, split.carry, split.decay, name)

    def forget_before(self) -> None:
        """Let go of what only the ledger needs: the weights and the optimizer's memory from before the step."""
        for p in self._parameters.values():
            p.weights, p.memory = None, {}

    def _split(self, p: _Parameter, before: Tensor | None) -> Split:
        return self._rule.split(p.group, local_state(self.optimizer.state.get(p.tensor, {})), p.memory, p.seen, before)


def _has_matrix(split: Split) -> bool:
    return split.left is not None or split.right is not None


def explain(optimizer: Optimizer, sharded: bool = False) -> UpdateRule:
    """Return the rule of an optimizer's family, or the generic rule with a warning.

    Args:
        optimizer: the optimizer.
        sharded: whether its parameters are spread over ranks.

    Returns:
        The rule.

    Raises:
        ValueError: the optimizer evaluates the loss several times in one step, holds a parameter twice, or mixes the
            weights of a parameter of which only a piece is here.
    """
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(set(held)) < len(held):
        raise ValueError(
            f"GradTrace can't divide the steps of `{type(optimizer).__name__}`: it holds {len(held) - len(set(held))} "
            "of its parameters more than once, and every step moves these as often. Give it every parameter once, as "
            "`model.parameters()` does."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"GradTrace can't divide the steps of `{type(optimizer).__name__}`: it evaluates the loss several times in "
            "one step, at weights that it then leaves, so that no single set of gradients explains the step. Use an "
            "optimizer that takes one gradient per step."
        )
    rule = rule_for(optimizer)
    if sharded and rule is not None and not rule.elementwise:
        raise ValueError(
            f"GradTrace: the step of `{type(optimizer).__name__}` mixes the weights of a parameter, and every process "
            'holds only a piece of it. Use an optimizer that treats weights one by one, or `strategy="ddp"`.'
        )
    if rule is None:
        rates = [setting(group.get("lr", 1.0)) for group in optimizer.param_groups]
        hidden = "" if all(rate == rate for rate in rates) else " Its `lr` is no number, so that shifts are NaN."
        warnings.warn(
            f"GradTrace has no rule for the optimizer `{type(optimizer).__name__}`: shifts are taken as "
            "-lr * clipped gradient. The ledger's `residual` shows how much of the real step that misses; "
            f"`quantity='gradient'` records per-sample gradients, which don't depend on the optimizer.{hidden}",
            stacklevel=2,
        )
        return GenericRule()
    if rule.caution is not None:
        warnings.warn(f"GradTrace: {rule.caution}", stacklevel=2)
    return rule


def gradient_norm(optimizer: Optimizer) -> float:
    """Return the Euclidean norm of all gradients of an optimizer, as norm clipping computes it; of the pieces here."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = [local(g.coalesce().values() if g.is_sparse else g).detach() for g in gradients]
    if any(value.dtype in HALF for value in values):  # norms in half precision have few digits
        norms = [torch.linalg.vector_norm(value, dtype=accumulation_dtype(value.dtype)) for value in values]
        values = [norm.to(values[0].device) for norm in norms]
    return float(torch.nn.utils.get_total_norm(values))
