"""torch.optim.RMSprop: centered or not, with or without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, divide, number, wide


class RMSpropRule(UpdateRule):
    """``dW = -lr buf`` with ``buf = m buf_prev + e / den``, ``den`` as realised at the step.

    ``den = sqrt(v_t) + eps``, centered ``sqrt(v_t - mean_t^2) + eps``. What the buffer holds has been divided already,
    by the denominators of its time.
    """

    optimizers: ClassVar = (torch.optim.RMSprop,)
    carried: ClassVar = ("momentum_buffer",)

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        rate, variance = number(group["lr"]), wide(state["square_avg"])
        if group["centered"]:
            mean = wide(state["grad_avg"])
            variance = variance.addcmul(mean, mean, value=-1)
        fresh = variance.sqrt().add_(number(group["eps"])).reciprocal_().mul_(rate)
        momentum = number(group["momentum"])
        return divide(group, fresh, before, memory["momentum_buffer"] if momentum > 0 else None, rate * momentum)
