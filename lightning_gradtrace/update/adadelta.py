"""torch.optim.Adadelta: steps in the unit of the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, copy_of, divide, number, wide


class AdadeltaRule(UpdateRule):
    """``dW = -lr sqrt(d_prev + eps) / sqrt(v_t + eps) e``, both averages as realised.

    The average d of squared steps is needed from before the step, so that a copy of the tracked weights' size
    is made at every step; v is that of squared gradients. Source: Zeiler 2012, "ADADELTA".
    """

    optimizers: ClassVar = (torch.optim.Adadelta,)

    @override
    def remember(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool
    ) -> dict[str, Any]:
        return {"steps": copy_of(state, "acc_delta")}

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        eps, gradients = number(group["eps"]), wide(state["square_avg"])
        steps = torch.zeros_like(gradients) if memory["steps"] is None else wide(memory["steps"])
        fresh = steps.add(eps).sqrt_().div_(gradients.add(eps).sqrt_()).mul_(number(group["lr"]))
        return divide(group, fresh, before)
