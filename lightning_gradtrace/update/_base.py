"""How an optimizer's step divides into shifts, carry and decay, and the interface of a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Number = float | Tensor


@dataclass
class Split:
    """Division of one parameter's change in one optimizer step (docs/concepts.md, 3).

    ``W_after - W_before = sum_i gain * (left @ e[i] @ right) + carry + decay``, where ``e[i]`` is the clipped, unscaled
    per-sample gradient.

    Attributes:
        gain: factor from a clipped gradient to its shift: a number, or a tensor of the parameter's shape. It must be a
            number where there is a matrix.
        carry: what earlier steps contribute through the optimizer's memory, None for nothing or when not asked for.
        decay: what weight decay contributes, None for nothing or when not asked for.
        left: matrix of shape (out, out) by which the gradient is multiplied from the left, None for none.
        right: matrix of shape (in, in) by which the gradient is multiplied from the right, None for none.
    """

    gain: Number
    carry: Tensor | None = None
    decay: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


class UpdateRule(ABC):
    """One family of optimizers.

    A subclass names the optimizers it explains and is registered by being defined in a file of this folder.

    Attributes:
        optimizers: the classes that it explains; see `lightning_gradtrace.update.rule_for` for their subclasses.
        carried: names in the optimizer's state of what carries earlier steps into the next; `remember` copies them for
            the ledger.
        caution: what a user should know before trusting the shifts, said once as a warning; None for nothing.
        elementwise: whether a weight's step depends on no other weight's gradient.
        tolerance: residual up to which a float32 ledger counts as closed, rounding of the weights aside.
        half_tolerance: the same where layers compute their gradients in half precision. An optimizer that lifts small
            entries of the gradient lifts their rounding errors with them.
    """

    optimizers: ClassVar[tuple[type[Optimizer], ...]] = ()
    carried: ClassVar[tuple[str, ...]] = ()
    caution: ClassVar[str | None] = None
    elementwise: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-3
    half_tolerance: ClassVar[float] = 0.2

    def remember(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool
    ) -> dict[str, Any]:
        """Keep what `split` needs from before the step.

        Args:
            parameter: the weights before the step.
            group: the parameter group.
            state: the parameter's optimizer state before the step; empty before its first step.
            ledger: whether carry will be asked for, so that copies of the state are worth their memory.

        Returns:
            Anything, handed to `split`: here, copies of what is `carried`, by name, None where there is none.
        """
        return {name: copy_of(state, name, ledger) for name in self.carried}

    def overwrites_gradient(self, group: Mapping[str, Any]) -> bool:
        """Say whether a step may write into the gradients, so that a copy is needed of what it began with.

        Args:
            group: the parameter group.
        """
        return False

    @abstractmethod
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        """Divide a step that has been made.

        Args:
            group: the parameter group, with the learning rate of the step.
            state: the parameter's optimizer state after the step.
            memory: what `remember` returned.
            gradient: the gradient as the optimizer saw it, after clipping; may be sparse.
            before: the weights before the step; None if the ledger is not computed, then carry and decay may be None.

        Returns:
            The division.
        """


def divide(
    group: Mapping[str, Any],
    fresh: Number,
    before: Tensor | None,
    memory: Tensor | None = None,
    kept: Number = 0.0,
    decoupled: bool = False,
) -> Split:
    """Divide a step of the form ``dW = -fresh * (c g + w W) - kept * memory``, which most optimizers have.

    With `maximize` the gradient counts negative, decay does not. Decoupled, decay is ``-lr w W`` instead.

    Args:
        group: the parameter group.
        fresh: factor of what enters at this step; a tensor is used up.
        before: the weights before the step, None if the ledger is not computed.
        memory: the optimizer's memory before the step, None for none or when the ledger is not computed.
        kept: factor of the memory, needed only with the ledger.
        decoupled: whether weight decay bypasses the optimizer.

    Returns:
        The division.
    """
    split = Split(gain=0.0)
    if before is not None:
        weight_decay = number(group.get("weight_decay", 0.0))
        if weight_decay:
            factor = number(group["lr"]) if decoupled else fresh
            split.decay = wide(before) * (factor * -weight_decay)
        if memory is not None:
            split.carry = wide(memory) * -kept
    if not group.get("maximize", False):
        fresh = fresh.neg_() if isinstance(fresh, Tensor) else -fresh
    split.gain = fresh
    return split


def copy_of(state: Mapping[str, Any], name: str, wanted: bool = True) -> Tensor | None:
    """Return a copy of a tensor of an optimizer's state, None if there is none or none is wanted."""
    tensor = state.get(name)
    return tensor.detach().clone() if wanted and tensor is not None else None


def number(value: Any) -> float:
    """Return a hyperparameter as a float; learning rates and betas may be tensors."""
    return float(value)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32, dense, for arithmetic that adds no rounding to that of the optimizer."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bias_correction(beta: Any, state: Mapping[str, Any], in_tensors: bool) -> float:
    """Return ``1 - beta^t``, rounded as the optimizer rounds it: in Python's floats, or in the dtype of its counter."""
    return float(1 - beta ** state["step"].detach()) if in_tensors else 1.0 - number(beta) ** number(state["step"])


def first_momentum(group: Mapping[str, Any]) -> float:
    """Return the factor by which a parameter group's optimizer keeps its first memory: momentum, or the first beta.

    0 if there is none that the group names, NaN if it is no number. Schedules such as `OneCycleLR` change it from step
    to step.
    """
    return setting(group["betas"][0] if group.get("betas") else group.get("momentum", 0.0))


def setting(value: Any) -> float:
    """Return a setting as it is written down: an optimizer of a user's own may call anything by a usual name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
