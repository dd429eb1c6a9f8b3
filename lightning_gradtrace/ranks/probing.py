"""A permutation probe that all ranks run, or none: where parameters are spread, a forward pass needs all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.probe import PermutationProbe
from lightning_gradtrace.capture.use import Use
from lightning_gradtrace.ranks.meeting import Recorder

Runs = tuple[list[Use], list[Use], Tensor]


@dataclass(frozen=True)
class JointProbe:
    """What a probe found that ran on all ranks at the same time, each with a batch of its own.

    Attributes:
        probe: this rank's probe.
        runs: what it found; None if no rank asked, its error if it failed.
    """

    probe: PermutationProbe
    runs: Runs | Exception | None

    @property
    def n_samples(self) -> int:
        """Number of samples of this rank's batch."""
        return self.probe.n_samples

    def coincides(self) -> bool:
        """Say whether something else than samples is as numerous as they are."""
        return self.probe.coincides()

    def own_axis(self, tensor: Tensor) -> int | None:
        """Return the axis of the samples in a tensor of the batch itself, None for all others."""
        return self.probe.own_axis(tensor)

    def __call__(self) -> Any:
        """Return what the probe found."""
        if isinstance(self.runs, tuple):
            return self.runs
        raise self.runs or RuntimeError("not all ranks ran the model again")

    def again(self) -> Sequence[Use]:
        """Return nothing: the other ranks don't run the model once more."""
        return []


def probe_together(
    recorder: Recorder, probe: PermutationProbe | None, asks: Callable[[PermutationProbe], bool]
) -> JointProbe | None:
    """Run a probe on all ranks, if the batch of one of them leaves doubt; all ranks call this.

    Args:
        recorder: what records on this rank.
        probe: its probe; None if it has failed before, or has nothing to ask about.
        asks: says whether this rank needs it.

    Returns:
        What the probe found.

    Raises:
        RankError: another rank failed.
    """
    wanted = False
    if probe is not None and recorder.failure is None:
        try:
            wanted = asks(probe)
        except Exception as error:
            recorder.fail(error)
    (n_wanted,) = recorder.ranks.agree(recorder.failure, [float(wanted)])
    if probe is None:
        return None
    try:
        return JointProbe(probe, probe() if n_wanted else None)
    except Exception as error:
        return JointProbe(probe, error)
