"""A permutation probe that all ranks run, or none: where parameters are spread, a forward pass needs all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.probing.draws import EVERYWHERE, DrawSite
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.ranks.meeting import Recorder

Runs = tuple[list[Use], list[Use], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class JointProbe:
    """What a probe found that ran on all ranks at the same time, each with a batch of its own.

    Attributes:
        probe: this rank's probe.
        runs: what it found; None if no rank asked, its error if it failed.
        influences: what it found about random numbers, likewise.
        aside: what it found with all random numbers as constants, likewise.
    """

    probe: PermutationProbe
    runs: Runs | Exception | None = None
    influences: dict[DrawSite, bool | None] | Exception | None = None
    aside: Runs | Exception | None = None

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
        return _told(self.runs)

    def sharing(self, sites: Container[DrawSite], fixed: Collection[DrawSite] = ()) -> JointProbe:
        """Return what was found with random numbers as constants; those that are known to be were so from the start."""
        return replace(self, runs=self.aside) if sites is EVERYWHERE else self

    def influence(self, sites: Collection[DrawSite]) -> Any:
        """Return what the probe found about random numbers."""
        return _told(self.influences)

    def again(self) -> Sequence[Use]:
        """Return nothing: the other ranks don't run the model once more."""
        return []

    def otherwise(self) -> None:
        """Return nothing, as `again` does."""

    def swapped(self) -> tuple[Sequence[Use], Tensor]:
        """Return nothing, as `again` does."""
        return [], torch.tensor([1, 0], device="cpu")


def _told(found: T | Exception | None) -> T:
    if found is None or isinstance(found, Exception):
        raise found or RuntimeError("not all ranks ran the model again")
    return found


def probe_together(
    recorder: Recorder, probe: PermutationProbe | None, asks: Callable[[PermutationProbe], Doubt]
) -> JointProbe | None:
    """Run a probe on all ranks, if the batch of one of them leaves doubt; all ranks call this.

    All ranks run the model equally often: none spends a run on trials, so all are in evaluation mode, where layers
    draw nothing, and about random numbers, if one of them has
    to, they ask only if they drew them at as many places; then about all of them.

    Args:
        recorder: what records on this rank.
        probe: its probe; None if it has failed before, or has nothing to ask about.
        asks: says what this rank needs it for.

    Returns:
        What the probe found.

    Raises:
        RankError: another rank failed.
    """
    doubt = Doubt()
    if probe is not None and recorder.failure is None:
        try:
            doubt = asks(probe)
        except Exception as error:
            recorder.fail(error)
    n_sites = len(doubt.drawn)
    told = recorder.ranks.agree(recorder.failure, [float(bool(doubt)), len(doubt.draws), n_sites, n_sites**2])
    n_wanted, n_doubtful, n_drawn, squares = told
    if probe is None:
        return None
    probe = replace(probe.sharing(doubt.shared, doubt.shared), trials=0, training=False)
    joint = JointProbe(probe, _attempt(probe) if n_wanted else None)
    if not n_doubtful:
        return joint
    if squares * recorder.ranks.size != n_drawn**2:
        return replace(joint, influences=RuntimeError("the ranks draw at unlike places"))
    influences = _attempt(functools.partial(replace(probe, training=True).influence, sorted(doubt.drawn, key=str)))
    own = isinstance(influences, dict) and not any(found is not False for found in influences.values())
    (n_asides,) = recorder.ranks.agree(recorder.failure, [float(not own)])
    shared = {site for site, found in influences.items() if found} if isinstance(influences, dict) else set()
    aside = _attempt(probe.sharing(EVERYWHERE, shared.union(doubt.shared))) if n_asides else None
    return replace(joint, influences=influences, aside=aside)


def _attempt(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error
