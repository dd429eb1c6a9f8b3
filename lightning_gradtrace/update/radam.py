"""torch.optim.RAdam: Adam whose denominators count once their variance is known well enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import (
    Number,
    Split,
    UpdateRule,
    bias_correction,
    divide,
    number,
    wide,
)


class RAdamRule(UpdateRule):
    """``dW = -lr / (1 - b1^t) m_t * r_t sqrt(1 - b2^t) / (sqrt(v_t) + eps)``; without the last factor while rho_t <= 5.

    ``m_t = b1 m_prev + (1 - b1) e``. Source: Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and
    Beyond".
    """

    optimizers: ClassVar = (torch.optim.RAdam,)
    carried: ClassVar = ("exp_avg",)

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        beta1, beta2 = (number(beta) for beta in group["betas"])
        unit: Number = number(group["lr"]) / bias_correction(beta1, state, group["capturable"])
        correction, step = bias_correction(beta2, state, group["capturable"]), number(state["step"])
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * step * beta2**step / correction
        if length > 5.0:
            rectified = ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5
            denominator = wide(state["exp_avg_sq"]).sqrt().add_(number(group["eps"]))
            unit = denominator.reciprocal_().mul_(unit * rectified * correction**0.5)
        kept = unit * beta1 if before is not None else 0.0
        decoupled = group["decoupled_weight_decay"]
        return divide(group, unit * (1 - beta1), before, memory["exp_avg"], kept, decoupled)
