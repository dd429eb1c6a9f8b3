"""torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, number


class SGDRule(UpdateRule):
    """With ``e = c g + w W``: ``buf = m buf_prev + (1 - t) e`` (first step ``buf = e``), ``dW = -lr buf``.

    Nesterov: ``dW = -lr (e + m buf)``. Each of e's parts enters with the same factor k (docs/concepts.md, 3).
    """

    optimizers: ClassVar = (torch.optim.SGD,)

    @override
    def remember(self, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool) -> dict[str, Any]:
        buffer = state.get("momentum_buffer")
        return {"first": buffer is None, "buffer": buffer.clone() if ledger and buffer is not None else None}

    @override
    def split(
        self, group: Mapping[str, Any], state: Mapping[str, Any], memory: Mapping[str, Any], before: Tensor | None
    ) -> Split:
        rate, momentum, decay = number(group["lr"]), number(group["momentum"]), number(group["weight_decay"])
        k = 1.0
        if momentum:
            k = 1.0 if memory["first"] else 1.0 - number(group["dampening"])
            k = 1.0 + momentum * k if group["nesterov"] else k
        split = Split(gain=(rate if group.get("maximize", False) else -rate) * k)
        if before is not None:
            if decay:
                split.decay = before * (-rate * k * decay)
            if momentum and memory["buffer"] is not None:
                split.carry = memory["buffer"] * (-rate * momentum * (momentum if group["nesterov"] else 1.0))
        return split
