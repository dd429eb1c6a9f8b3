"""One optimizer step, divided: remembers what it needs before the step and gives the scales and the ledger after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradtrace.update._base import Split, UpdateRule, rule_for
from lightning_gradtrace.update._generic import GenericRule
from lightning_gradtrace.update.clipping import clip_factors, copy_gradients
from lightning_gradtrace.update.ledger import Entry, residual


@dataclass
class _Parameter:
    """What is kept of one parameter from before the step."""

    tensor: Tensor
    group: Mapping[str, Any]
    gradient: Tensor
    memory: dict[str, Any]
    weights: Tensor | None
    split: Split | None = None
    clip: float | Tensor = 1.0


@dataclass
class StepDivision:
    """The division of one step of one optimizer.

    Make it after the gradients of the step are complete and before they are clipped, call `complete` after the step.

    Attributes:
        optimizer: the optimizer.
        ledger: whether carry, decay and the residual are wanted; costs copies of the tracked weights.
        loss_scale: factor by which the cotangents exceed the true gradients (fp16 AMP), 1 otherwise.
    """

    optimizer: Optimizer
    ledger: bool
    loss_scale: float
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
        """
        division = cls(optimizer, ledger, loss_scale, rule)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        moving = {name: p for name, p in tracked.items() if id(p) in groups and p.grad is not None}
        gradients = dict(reference or {})
        now = [name for name in moving if name not in gradients]
        copies = copy_gradients([p.grad for name in now if (p := moving[name]).grad is not None])
        gradients.update(zip(now, copies, strict=True))
        for name, tensor in moving.items():
            group = groups[id(tensor)]
            memory = rule.remember(group, optimizer.state.get(tensor, {}), ledger)
            weights = tensor.detach().clone() if ledger else None
            division._parameters[name] = _Parameter(tensor, group, gradients[name], memory, weights)
        return division

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients before clipping, by name."""
        return {name: p.gradient for name, p in self._parameters.items()}

    def complete(self) -> None:
        """Read off clipping and the optimizer's state after the step."""
        # A gradient that the step set to None is taken as not clipped.
        changed = [p for p in self._parameters.values() if p.tensor.grad is not None]
        factors = clip_factors(
            [p.gradient for p in changed], [p.tensor.grad for p in changed if p.tensor.grad is not None]
        )
        for p, factor in zip(changed, factors, strict=True):
            p.clip = factor
        for p in self._parameters.values():
            p.split = self._rule.split(p.group, self.optimizer.state.get(p.tensor, {}), p.memory, p.weights)

    def scale(self, name: str) -> float | Tensor | None:
        """Return the factor from ``g[i]`` to ``s[i]`` of a parameter, None if the step did not move it."""
        p = self._parameters.get(name)
        if p is None or p.split is None:
            return None
        return p.split.gain * p.clip * (1.0 / self.loss_scale)

    def clip_factor(self) -> float:
        """Return the factor by which the gradients were clipped, NaN if it differs between weights."""
        factors = [p.clip for p in self._parameters.values()]
        if not factors or any(isinstance(f, Tensor) for f in factors):
            return float("nan") if factors else 1.0
        numbers = [float(f) for f in factors]
        middle = sorted(numbers)[len(numbers) // 2]
        return middle if max(numbers) - min(numbers) <= 1e-4 * abs(middle) else float("nan")

    def residual(self, totals: Mapping[str, Tensor]) -> float:
        """Return the relative residual of the ledger.

        Args:
            totals: sum of the shifts over all occurrences, by name.

        Returns:
            See `lightning_gradtrace.update.ledger.residual`; NaN if the ledger was not asked for.
        """
        return residual(self._entries(totals)) if self.ledger else float("nan")

    def _entries(self, totals: Mapping[str, Tensor]) -> Iterator[Entry]:
        for name, p in self._parameters.items():
            assert p.weights is not None and p.split is not None
            shifts = totals.get(name)
            shifts = torch.zeros_like(p.weights) if shifts is None else shifts
            yield Entry(p.weights, p.tensor.detach(), shifts, p.split.carry, p.split.decay)


def explain(optimizer: Optimizer) -> UpdateRule:
    """Return the rule of an optimizer's family, or the generic rule with a warning."""
    rule = rule_for(optimizer)
    if rule is None:
        warnings.warn(
            f"GradTrace has no rule for the optimizer `{type(optimizer).__name__}`: shifts are taken as "
            "-lr * clipped gradient. The ledger's `residual` shows how much of the real step that misses; "
            "`quantity='gradient'` records per-sample gradients, which don't depend on the optimizer.",
            stacklevel=2,
        )
        return GenericRule()
    return rule


def gradient_norm(optimizer: Optimizer) -> float:
    """Return the Euclidean norm of all gradients of an optimizer, as norm clipping computes it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return 0.0
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    norms = [torch.linalg.vector_norm(g.detach()).float() for g in dense]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))
