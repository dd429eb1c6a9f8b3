"""Backward passes of the package's own, before the real one: what wants them, and who makes them.

What wants passes names one after the other, and goes on when it has the shares of the last one. So it need not know
whether it is alone, or one of several processes that hold pieces of the model and pass through it together
(`ranks/passing.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from torch import Tensor, nn

from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.sharded import set_apart
from lightning_gradtrace.capture.shares import Share

Wanted = Generator[Tensor, dict[str, Share], None]
"""Yields where a pass begins, as a cotangent; is sent the shares that it led to."""


class Passes(Protocol):
    """Backward passes over the graph of one forward pass, which they leave as it is."""

    def wanted(self) -> Wanted:
        """Name the passes, one by one."""

    def make(self, start: Tensor | None) -> None:
        """Make a pass.

        Args:
            start: what it begins with; None for a pass whose shares nobody wants.
        """

    def asks(self, probe: Probe) -> Doubt:
        """Say what `collect` would run the probe for."""

    def collect(self, probe: Probe) -> dict[str, Share]:
        """Return the shares, by parameter, that the last pass led to."""


def next_start(wanted: Wanted, shares: dict[str, Share] | None) -> Tensor | None:
    """Return where the next pass begins, None if no more are wanted.

    Args:
        wanted: from `Passes.wanted`.
        shares: those of the last pass that it named; None before the first one.
    """
    try:
        return next(wanted) if shares is None else wanted.send(shares)
    except StopIteration:
        return None


def make_alone(module: nn.Module, passes: Passes, probe: Probe) -> None:
    """Make the passes over a model as they are wanted."""
    wanted = passes.wanted()
    with set_apart(module):
        start = next_start(wanted, None)
        while start is not None:
            passes.make(start)
            start = next_start(wanted, passes.collect(probe))
