"""torch.optim.Adam and AdamW: amsgrad, maximize, decoupled or L2 weight decay; every implementation of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, bias_correction, divide, number, wide


class AdamRule(UpdateRule):
    """``dW = -lr / (1 - b1^t) m_t / den`` with ``m_t = b1 m_prev + (1 - b1) e``, ``den`` as realised at the step.

    ``den = sqrt(v_t) / sqrt(1 - b2^t) + eps`` depends on all samples; the split holds it fixed at its realised value.
    With L2 decay ``e = c g + w W``; decoupled, ``-lr w W`` is a term of its own (docs/concepts.md, 3).
    """

    optimizers: ClassVar = (torch.optim.Adam, torch.optim.AdamW)
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
        beta1, beta2 = group["betas"]
        in_tensors = (group["capturable"] and not group["fused"]) or group["differentiable"]
        second = wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        denominator = second.sqrt().div_(bias_correction(beta2, state, in_tensors) ** 0.5).add_(number(group["eps"]))
        unit = denominator.reciprocal_().mul_(number(group["lr"]) / bias_correction(beta1, state, in_tensors))
        kept = unit * number(beta1) if before is not None else 0.0
        decoupled = group.get("decoupled_weight_decay", False)
        return divide(group, unit * (1 - number(beta1)), before, memory["exp_avg"], kept, decoupled)
