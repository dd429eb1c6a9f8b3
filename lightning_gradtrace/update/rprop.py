"""torch.optim.Rprop: steps by the sign of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, wide


class RpropRule(UpdateRule):
    """``dW = -size_t sign(g)``, nothing where the sign just changed; ``size_t / |g|`` is held as realised.

    A sample's share of the step is its share of the gradient, whose sum decided the sign. Source: Riedmiller and Braun
    1993, "A direct adaptive method for faster backpropagation learning".
    """

    optimizers: ClassVar = (torch.optim.Rprop,)
    half_tolerance: ClassVar = 0.7

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        seen = wide(gradient)
        # `prev` is the gradient of this step, zero where the optimizer left the weight alone.
        moved = wide(state["prev"]) != 0
        factor = torch.where(moved, wide(state["step_size"]) / seen.abs(), torch.zeros_like(seen))
        return Split(gain=factor if group["maximize"] else -factor)
