"""torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, copy_of, divide, number


class SGDRule(UpdateRule):
    """With ``e = c g + w W``: ``buf = m buf_prev + (1 - t) e`` (first step ``buf = e``), ``dW = -lr buf``.

    Nesterov: ``dW = -lr (e + m buf)``. Each of e's parts enters with the same factor k (docs/concepts.md, 3).
    """

    optimizers: ClassVar = (torch.optim.SGD,)
    half_tolerance: ClassVar = 5e-2

    @override
    def overwrites_gradient(self, group: Mapping[str, Any]) -> bool:
        return bool(group["nesterov"])  # `foreach` adds the buffer to the gradients themselves

    @override
    def remember(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool
    ) -> dict[str, Any]:
        return {"first": state.get("momentum_buffer") is None, "buffer": copy_of(state, "momentum_buffer", ledger)}

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        rate, momentum = number(group["lr"]), number(group["momentum"])
        if not momentum:
            return divide(group, rate, before)
        k = 1.0 if memory["first"] else 1.0 - number(group["dampening"])
        if group["nesterov"]:
            return divide(group, rate * (1.0 + momentum * k), before, memory["buffer"], rate * momentum**2)
        return divide(group, rate * k, before, memory["buffer"], rate * momentum)
