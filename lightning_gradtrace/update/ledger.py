"""The ledger: do shifts, carry and decay add up to what happened to the weights (docs/concepts.md, 3)?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradtrace.capture.precision import summable

# Entries that are added up at a time.
_PIECE = 1 << 20


@dataclass
class Entry:
    """One parameter's line in the ledger of a step; all tensors have the parameter's shape.

    Attributes:
        before: weights before the step.
        after: weights after the step.
        shifts: sum of the shifts over all occurrences.
        carry: contribution of the optimizer's memory, None for nothing.
        decay: contribution of weight decay, None for nothing.
        name: of the parameter.
    """

    before: Tensor
    after: Tensor
    shifts: Tensor
    carry: Tensor | None = None
    decay: Tensor | None = None
    name: str = ""


@dataclass(frozen=True)
class Balance:
    """Outcome of a ledger.

    Attributes:
        residual: ``|dW - (sum_i s[i] + carry + decay)| / |dW|``; 0 if neither the weights nor the shares moved, inf if
            only the shares did, NaN if anything is not finite or the ledger was not asked for.
        rounding: ``u |W| / |dW|``, the residual that rounding the weights once can leave at most; u is half a unit in
            the last place (6e-8 in float32). NaN where the weights did not move.
    """

    residual: float = float("nan")
    rounding: float = float("nan")


@dataclass
class Ledger:
    """Adds up the lines of a step, with Frobenius norms, in float64, one parameter at a time.

    In low precision the weights themselves are rounded when they are stored: where they move little, that, and no
    fault of the division, is what is left.

    Attributes:
        missing: square of what shifts, carry and decay leave of the change.
        change: square of the change.
        unit: square of what rounding can leave.
    """

    missing: float = 0.0
    change: float = 0.0
    unit: float = 0.0

    def add(self, entry: Entry) -> None:
        """Add the line of one more parameter."""
        rounding = torch.finfo(entry.after.dtype).eps / 2
        for before, after, *parts in _pieces(entry):
            moved = after.to(torch.float64, copy=True).sub_(before)  # a copy also of what is float64 already
            self.change += _square(moved)
            for part in parts:
                moved.sub_(part)
            self.missing += _square(moved)
            self.unit += rounding**2 * _square(after)

    def balance(self) -> Balance:
        """Return the outcome so far."""
        if self.change == 0:
            return Balance(float("inf") if self.missing else self.missing)
        return Balance((self.missing / self.change) ** 0.5, (self.unit / self.change) ** 0.5)


def balance(entries: Iterable[Entry]) -> Balance:
    """Add up a ledger over all entries."""
    ledger = Ledger()
    for entry in entries:
        ledger.add(entry)
        del entry  # before the next one is formed
    return ledger.balance()


def _pieces(entry: Entry) -> Iterator[tuple[Tensor, ...]]:
    """Yield weights before and after, shifts, carry and decay, some entries at a time: float64 needs room."""
    parts = (entry.before, entry.after, entry.shifts, entry.carry, entry.decay)
    flat = [summable(part).reshape(-1).split(_PIECE) for part in parts if part is not None]
    yield from zip(*flat, strict=True)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
