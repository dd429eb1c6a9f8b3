"""torch.optim.Adamax: Adam with the infinity norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, bias_correction, divide, number, wide


class AdamaxRule(UpdateRule):
    """``dW = -lr / (1 - b1^t) m_t / u_t`` with ``m_t = b1 m_prev + (1 - b1) e``, ``u_t`` as realised at the step.

    ``u_t = max(b2 u_prev, |e| + eps)``. Source: Kingma and Ba 2015, "Adam", section 7.
    """

    optimizers: ClassVar = (torch.optim.Adamax,)
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
        beta1 = number(group["betas"][0])
        rate = number(group["lr"]) / bias_correction(beta1, state, group["capturable"])
        unit = wide(state["exp_inf"]).reciprocal().mul_(rate)
        kept = unit * beta1 if before is not None else 0.0
        return divide(group, unit * (1 - beta1), before, memory["exp_avg"], kept)
