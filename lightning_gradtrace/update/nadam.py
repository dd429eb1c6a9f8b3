"""torch.optim.NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, bias_correction, divide, number, wide


class NAdamRule(UpdateRule):
    """``dW = -lr [(1 - mu_t) / (1 - P_t) e + mu_next / (1 - P_t mu_next) m_t] / den``, P_t the product of all mu.

    ``m_t = b1 m_prev + (1 - b1) e``; ``den = sqrt(v_t / (1 - b2^t)) + eps`` as realised. Source: Dozat 2016,
    "Incorporating Nesterov Momentum into Adam".
    """

    optimizers: ClassVar = (torch.optim.NAdam,)
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
        rate, step, decay = number(group["lr"]), number(state["step"]), number(group["momentum_decay"])
        beta1, beta2 = (number(beta) for beta in group["betas"])
        now, following = (beta1 * (1.0 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
        product = number(state["mu_product"])
        direct, through_moment = (1.0 - now) / (1.0 - product), following / (1.0 - product * following)
        second = wide(state["exp_avg_sq"])
        unit = (
            (second / bias_correction(beta2, state, group["capturable"]))
            .sqrt_()
            .add_(number(group["eps"]))
            .reciprocal_()
            .mul_(rate)
        )
        fresh = unit * (direct + through_moment * (1 - beta1))
        kept = unit * (through_moment * beta1) if before is not None else 0.0
        return divide(group, fresh, before, memory["exp_avg"], kept, group["decoupled_weight_decay"])
