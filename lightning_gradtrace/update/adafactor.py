"""torch.optim.Adafactor: factored second moments, steps relative to the size of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, divide, number, wide


class AdafactorRule(UpdateRule):
    """``dW = -alpha / max(1, rms(U) / d) U - lr w W`` with ``U = c g / sqrt(V)``; V, alpha and rms(U) as realised.

    ``alpha = max(eps2, rms(W)) min(lr, 1 / sqrt(t))``. V is the product of row and column averages of the squared
    gradient, for parameters with one axis the average itself. Source: Shazeer and Stern 2018, "Adafactor".
    """

    optimizers: ClassVar = (torch.optim.Adafactor,)
    elementwise: ClassVar = False

    @override
    def remember(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool
    ) -> dict[str, Any]:
        return {"rms": number(parameter.detach().norm(2)) / parameter.numel() ** 0.5}

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        small, smallest = group["eps"]
        small = torch.finfo(gradient.dtype).eps if small is None else number(small)
        if "row_var" in state:
            rows, columns = wide(state["row_var"]), wide(state["col_var"])
            variance = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=small))
        else:
            variance = wide(state["variance"])
        unit = variance.clamp(min=small * small).rsqrt_()
        root_mean_square = number((unit * wide(gradient)).norm(2)) / unit.numel() ** 0.5
        rate = max(number(smallest), memory["rms"]) * min(number(group["lr"]), number(state["step"]) ** -0.5)
        fresh = unit.mul_(rate / max(1.0, root_mean_square / number(group["d"])))
        return divide(group, fresh, before, decoupled=True)
