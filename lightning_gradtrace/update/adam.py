"""torch.optim.Adam and AdamW: amsgrad, maximize, decoupled or L2 weight decay; every implementation of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, number


class AdamRule(UpdateRule):
    """``dW = -lr / (1 - b1^t) m_t / den`` with ``m_t = b1 m_prev + (1 - b1) e``, ``den`` as realised at the step.

    ``den = sqrt(v_t) / sqrt(1 - b2^t) + eps`` depends on all samples; the split holds it fixed at its realised value.
    With L2 decay ``e = c g + w W``; decoupled, ``-lr w W`` is a term of its own (docs/concepts.md, 3).
    """

    optimizers: ClassVar = (torch.optim.Adam, torch.optim.AdamW)

    @override
    def remember(self, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool) -> dict[str, Any]:
        moment = state.get("exp_avg")
        return {"moment": moment.clone() if ledger and moment is not None else None}

    @override
    def split(
        self, group: Mapping[str, Any], state: Mapping[str, Any], memory: Mapping[str, Any], before: Tensor | None
    ) -> Split:
        rate, decay, step = number(group["lr"]), number(group["weight_decay"]), number(state["step"])
        beta1, beta2 = (number(beta) for beta in group["betas"])
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(number(group["eps"]))
        unit = (rate / (1 - beta1**step)) / denominator  # of the first moment
        fresh = unit * (1 - beta1)
        split = Split(gain=fresh if group["maximize"] else -fresh)
        if before is not None:
            if decay:
                decoupled = group.get("decoupled_weight_decay", False)
                split.decay = before * (-rate * decay) if decoupled else fresh * before * -decay
            if memory["moment"] is not None:
                split.carry = unit * memory["moment"] * -beta1
        return split
