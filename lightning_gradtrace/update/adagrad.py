"""torch.optim.Adagrad, with dense or sparse gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, divide, number, wide


class AdagradRule(UpdateRule):
    """``dW = -lr / (1 + (t - 1) lr_decay) e / (sqrt(sum of squares) + eps)``, the sum as realised at the step.

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods".
    """

    optimizers: ClassVar = (torch.optim.Adagrad,)

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        rate = number(group["lr"]) / (1 + (number(state["step"]) - 1) * number(group["lr_decay"]))
        fresh = wide(state["sum"]).sqrt().add_(number(group["eps"])).reciprocal_().mul_(rate)
        return divide(group, fresh, before)
