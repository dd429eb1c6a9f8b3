"""What a training must not do while it is recorded, and what to do instead."""

from __future__ import annotations

import warnings
from typing import NoReturn

from torch import Tensor
from torch.optim import Optimizer


def check_needs_gradient(loss: Tensor) -> None:
    """Refuse a loss that nothing can be back-propagated from.

    Raises:
        ValueError: the loss needs no gradient.
    """
    if not loss.requires_grad:
        raise ValueError(
            "GradTrace: the loss needs no gradient: `training_step` returned a tensor that no trainable parameter "
            "led to. Return the loss itself, not a detached copy, and compute it with gradients enabled."
        )


def refuse_second_closure(optimizer: Optimizer) -> NoReturn:
    """Refuse an optimizer that evaluates the loss several times in one step.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"GradTrace: the optimizer `{type(optimizer).__name__}` evaluates its closure more than once in one "
        "step, so the step does not follow from one gradient and can't be divided among samples. Use an "
        "optimizer that evaluates it once."
    )


def refuse_unannounced(optimizer: Optimizer) -> NoReturn:
    """Refuse a step that nobody knew of beforehand.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"GradTrace: `{type(optimizer).__name__}` made a step with a closure that Lightning does not know of. "
        "Use the optimizers that `self.optimizers()` returns."
    )


def refuse_unseen_gradients() -> NoReturn:
    """Refuse a backward pass that Lightning did not announce: nobody looked at the gradients before it.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "GradTrace: gradients were computed that Lightning does not know of, by `loss.backward()` or "
        "`torch.autograd.grad` in `training_step`. Call `self.manual_backward(loss)` instead of "
        "`loss.backward()`; take other gradients before the backward pass that they belong to."
    )


def warn_of_no_step() -> None:
    """Warn of a training at whose end no optimizer had made a step that could be seen."""
    warnings.warn(
        "GradTrace: no optimizer step was seen in the whole training, so the trace holds none. Steps are seen of the "
        "optimizers that `configure_optimizers` returned, when their `step` is called: not of an optimizer inside of "
        "another one (SAM's `first_step` and `second_step`), and not of code that writes to the weights itself",
        stacklevel=2,
    )
