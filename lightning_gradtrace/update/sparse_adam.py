"""torch.optim.SparseAdam: Adam on the rows that the gradient names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, divide, number, wide


class SparseAdamRule(UpdateRule):
    """``dW = -lr sqrt(1 - b2^t) / (1 - b1^t) m_t / (sqrt(v_t) + eps)`` where the gradient has a row.

    ``m_t = b1 m_prev + (1 - b1) e``, ``v_t`` as realised. Rows that the gradient does not name keep their moments.
    """

    optimizers: ClassVar = (torch.optim.SparseAdam,)
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
        step, (beta1, beta2) = number(state["step"]), (number(beta) for beta in group["betas"])
        rate = number(group["lr"]) * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        second = wide(state["exp_avg_sq"])
        named = torch.zeros_like(second)
        named[tuple(gradient.coalesce().indices())] = rate
        unit = named.div_(second.sqrt().add_(number(group["eps"])))
        kept = unit * beta1 if before is not None else 0.0
        return divide(group, unit * (1 - beta1), before, memory["exp_avg"], kept)
