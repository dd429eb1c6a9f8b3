"""Optimizers without a rule: the plain gradient step, and a residual that shows what it misses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, setting


class GenericRule(UpdateRule):
    """``s[i] = -lr c g[i]``, nothing carried, nothing decayed (docs/concepts.md, 3)."""

    @override
    def overwrites_gradient(self, group: Mapping[str, Any]) -> bool:
        return True  # as in `p.grad.add_(p, alpha=weight_decay)`, for all that is known

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        return Split(gain=-setting(group.get("lr", 1.0)))
