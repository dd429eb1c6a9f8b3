"""The ledger: do shifts, carry and decay add up to what happened to the weights (docs/concepts.md, 3)?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Entry:
    """One parameter's line in the ledger of a step; all tensors have the parameter's shape.

    Attributes:
        before: weights before the step.
        after: weights after the step.
        shifts: sum of the shifts over all occurrences.
        carry: contribution of the optimizer's memory, None for nothing.
        decay: contribution of weight decay, None for nothing.
    """

    before: Tensor
    after: Tensor
    shifts: Tensor
    carry: Tensor | None = None
    decay: Tensor | None = None


def residual(entries: Iterable[Entry]) -> float:
    """Return ``|dW - (sum_i s[i] + carry + decay)| / |dW|`` over all entries, Frobenius norms, in float64.

    In float32 the weights themselves are rounded, so that the residual can't fall below about
    ``6e-8 |W| / |dW|``: about 1e-6 for usual learning rates, more for very small ones.

    Returns:
        The relative residual; 0 if neither the weights nor the shares moved, inf if only the shares did, NaN if
        anything is not finite.
    """
    missing = change = 0.0
    for entry in entries:
        moved = entry.after.double() - entry.before.double()
        explained = entry.shifts.double()
        for part in (entry.carry, entry.decay):
            if part is not None:
                explained = explained + part.double()
        change += float(torch.linalg.vector_norm(moved)) ** 2
        missing += float(torch.linalg.vector_norm(moved - explained)) ** 2
    if change == 0:
        return float("inf") if missing else missing
    return float((missing / change) ** 0.5)
