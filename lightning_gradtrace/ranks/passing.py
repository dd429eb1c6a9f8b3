"""Backward passes that all ranks make, or none: where parameters are spread, each pass gathers them from all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from lightning_gradtrace.capture.passes import Passes, next_start
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.sharded import set_apart
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.ranks.meeting import Recorder
from lightning_gradtrace.ranks.probing import probe_together

T = TypeVar("T")


def pass_together(
    recorder: Recorder, module: nn.Module, begin: Callable[[PermutationProbe], Passes], probe: PermutationProbe | None
) -> None:
    """Make the passes that the ranks want, as many on each as one of them wants; all ranks call this.

    Before every pass the ranks ask each other who wants one. A rank that wants none makes it all the same, from zeros.

    Args:
        recorder: what records on this rank.
        module: the model.
        begin: returns the passes of this rank, given its probe.
        probe: None if this rank has failed before.

    Raises:
        RankError: something failed on another rank, before a pass or after it; on that rank, its own error.
    """
    passes = _attempt(recorder, functools.partial(begin, probe)) if probe is not None else None
    recorder.ranks.agree(recorder.failure)
    assert passes is not None
    with set_apart(module):
        _make(recorder, passes, probe)


def _make(recorder: Recorder, passes: Passes, probe: PermutationProbe | None) -> None:
    wanted = passes.wanted()
    shares: dict[str, Share] | None = None
    while True:
        start: Tensor | None = _attempt(recorder, functools.partial(next_start, wanted, shares))
        (n_wanted,) = recorder.ranks.agree(recorder.failure, [float(start is not None)])
        if not n_wanted:
            return
        _attempt(recorder, functools.partial(passes.make, start))
        joint = probe_together(recorder, probe, passes.asks)
        if start is not None and joint is not None:
            shares = _attempt(recorder, functools.partial(passes.collect, joint))


def _attempt(recorder: Recorder, work: Callable[[], T]) -> T | None:
    """Do something; an error of it, or of anything before, is told when the ranks meet."""
    if recorder.failure is None:
        try:
            return work()
        except Exception as error:
            recorder.fail(error)
    return None
