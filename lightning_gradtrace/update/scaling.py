"""What a GradScaler (fp16 AMP) does to the gradients of an optimizer, and whether it lets a step happen."""

from __future__ import annotations

from typing import Any

from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer


def loss_scale(scaler: Any) -> float:
    """Return what a GradScaler multiplies losses by at the moment, 1 without one."""
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def held_scale(scaler: Any, optimizer: Optimizer) -> float:
    """Return the factor by which the gradients of an optimizer exceed the true ones right before its step.

    Most are unscaled by then. Fused optimizers are handed scaled gradients and divide by the scale in their own kernel,
    unless somebody has unscaled them to clip them; and who calls the optimizer itself leaves them scaled.

    Args:
        scaler: the GradScaler, None without one.
        optimizer: the optimizer, for which no `step` of the scaler has been called yet.
    """
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {})
    return 1.0 if state.get("stage") is OptState.UNSCALED else loss_scale(scaler)


def overflowed(optimizer: Optimizer) -> bool:
    """Say, in a step, whether a fused optimizer has skipped it in its own kernel, as a GradScaler told it to."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)
