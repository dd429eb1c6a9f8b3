"""torch.optim.ASGD. Its average of the weights is another tensor: the weights that train are traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, divide, number, wide


class ASGDRule(UpdateRule):
    """``dW = -eta e - lambd eta W``, eta the learning rate as decayed up to the step before.

    Both ``lambd`` and weight decay count as decay. Source: Polyak and Juditsky 1992, "Acceleration of stochastic
    approximation by averaging".
    """

    optimizers: ClassVar = (torch.optim.ASGD,)
    half_tolerance: ClassVar = 5e-2

    @override
    def remember(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool
    ) -> dict[str, Any]:
        return {"eta": number(state["eta"]) if state else None}

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        # Without a state before it, the first step takes the learning rate, rounded to the state's dtype.
        eta = memory["eta"]
        if eta is None:
            eta = number(torch.tensor(number(group["lr"]), dtype=state["eta"].dtype, device="cpu"))
        split = divide(group, eta, before)
        if before is not None:
            shrunk = wide(before) * (-number(group["lambd"]) * eta)
            split.decay = shrunk if split.decay is None else split.decay + shrunk
        return split
