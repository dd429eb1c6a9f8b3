"""Are random numbers the samples' own, or do all samples share them?

A tensor of random numbers with as many rows as there are samples may hold the noise of each, or as many negatives for
all of them. It matters where parameters meet it before they meet the batch: as the samples' own it is like the batch
there, as shared it is a constant. While that is not known a pass is read in both ways. Then the model is run on its
samples in another order, with one draw in its old order: where it meets the samples, what comes of it changes places
with them if they share the draw, and does not if each had its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradtrace.capture.forward.influence import InfluenceTape
from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.forward.ways import Way
from lightning_gradtrace.capture.placing.comparing import is_permuted, same, stays_or_moves
from lightning_gradtrace.capture.placing.placement import Probe, UnattributableError
from lightning_gradtrace.capture.probing.draws import EVERYWHERE, DrawSite

# How often the model is asked about a draw that has no influence yet, as before a layer that begins with zeros.
MOST_QUESTIONS = 3
# Passes over as many samples that are read in both ways after the last question; not every pass draws the same.
CALM_PASSES = 3


@dataclass
class Sharing:
    """Knows which draws the samples share, and chooses how a pass is to be read.

    Attributes:
        own: where numbers are drawn that each sample has for itself, and the ways in which they have been used.
        shared: where numbers are drawn that all samples share.
        doubtful: where it could not be told at the last pass.
    """

    own: dict[DrawSite, set[Way]] = field(default_factory=dict)
    shared: set[DrawSite] = field(default_factory=set)
    doubtful: set[DrawSite] = field(default_factory=set)
    _asked: dict[DrawSite, int] = field(default_factory=dict, init=False)
    _calm: dict[int, int] = field(default_factory=dict, init=False)

    def is_known(self, n_samples: int | None) -> bool:
        """Say whether a pass need not be read in both ways, given its number of samples: draws may be as many."""
        return n_samples is None or n_samples < 2 or self._calm.get(n_samples, 0) == CALM_PASSES

    def unknown(self, tape: Tape) -> set[DrawSite]:
        """Return the draws that parameters met before they met the batch, and of which nothing is known.

        Those of the samples' own may turn out to be shared where they are used in a way that is new.
        """
        return {s for s in drawn(tape) - self.shared if s not in self.own or not tape.taint.ways.of(s) <= self.own[s]}

    def choose(self, tape: Tape, n_samples: int, probe: Probe) -> tuple[Tape, Probe]:
        """Return the reading of a pass that is right, and the probe for it.

        Args:
            tape: a tape whose uses have their cotangents.
            n_samples: number of samples of the micro-batch; everything is the own of a single one.
            probe: is asked about draws that are not known.

        Returns:
            The tape or the one aside.

        Raises:
            UnattributableError: it can't be told, or the other reading is needed and was not made.
        """
        if n_samples < 2:
            return tape, probe
        unknown = self.unknown(tape)
        self.doubtful = self._ask(unknown, tape, probe) if unknown else set()
        calm = self._calm.get(n_samples, 0)
        self._calm[n_samples] = 0 if self.doubtful else min(calm + 1, CALM_PASSES)
        if not drawn(tape) & (self.shared | self.doubtful):
            return tape, probe.sharing(self.shared, self.shared) if self.shared else probe
        if tape.aside is None:
            raise UnattributableError(_late(drawn(tape) & (self.shared | self.doubtful)))
        return tape.aside, probe.sharing(EVERYWHERE, self.shared)

    def _ask(self, sites: Collection[DrawSite], tape: Tape, probe: Probe) -> set[DrawSite]:
        """Learn what draws are, and return those of which it can't be told; they count as shared in the end.

        Raises:
            UnattributableError: the model can't be asked.
        """
        try:
            found = probe.influence(sites)
        except Exception as error:
            raise UnattributableError(_not_told(sites, error)) from error
        doubtful = set()
        for site in sites:
            answer = found.get(site)
            if answer is None:
                self._asked[site] = self._asked.get(site, 0) + 1
                answer = self._asked[site] == MOST_QUESTIONS or None
            if answer is None:
                doubtful.add(site)
                continue
            self._asked.pop(site, None)
            if answer:
                self.own.pop(site, None)
                self.shared.add(site)
            else:
                self.own.setdefault(site, set()).update(tape.taint.ways.of(site))
        return doubtful


def drawn(tape: Tape) -> set[DrawSite]:
    """Return the draws that parameters met before they met the batch."""
    return {site for use in tape.uses if use.reached for site in use.draws}


def _not_told(sites: Collection[DrawSite], error: Exception) -> str:
    return (
        f"GradTrace: parameters meet the random numbers of {_listed(sites)} before they meet the batch, and it can't "
        "be told whether each sample has its own or all samples share them. `training_step` was run again to find out, "
        f"without gradients ({type(error).__name__}: {error}). Draw another number than there are samples if they "
        "share them, let `training_step` run without gradients, or leave the parameters out with "
        "`GradTrace(params=...)`."
    )


def _late(sites: Collection[DrawSite]) -> str:
    return (
        f"GradTrace: the random numbers of {_listed(sites)} are shared by all samples, or it can't be told that they "
        "are not, and they are as many. This was not known when the forward pass was recorded, because no captured "
        "step before drew them, or used them as this one does. Begin the trace at a step that does, draw them in a "
        "line of their own, or draw another number."
    )


def _listed(sites: Collection[DrawSite]) -> str:
    return ", ".join(sorted(map(str, sites))[:3])


def is_shared(
    site: DrawSite, first: InfluenceTape, fixed: InfluenceTape, moved: InfluenceTape, order: Tensor
) -> bool | None:
    """Say whether all samples share a draw.

    Args:
        site: where it is made.
        first: a run on the batch.
        fixed: a run on the permuted batch, with this draw as it was and all others permuted.
        moved: a run on the permuted batch, with all draws permuted.
        order: the order of its samples.

    Returns:
        None if it can't be told: the draw has no influence on what samples meet, or what comes of them does not change
        places with them even if all draws do.

    Raises:
        UnattributableError: it is shared in one place and not in another.
    """
    votes = set[bool | None]()
    for key, result in first.results.items():
        if site in first.sites[key]:
            votes |= _votes(result, fixed.results.get(key), moved.results.get(key), order)
    if votes >= {True, False}:
        raise UnattributableError("they seem to be shared in one place, and the samples' own in another")
    if not votes:
        return False  # no sample meets it, as no real image meets the latent codes of a generator
    return next((vote for vote in votes if vote is not None), None)


def _votes(first: Tensor, fixed: Tensor | None, moved: Tensor | None, order: Tensor) -> set[bool | None]:
    """Say whether a result tells of a draw that all samples share; nothing if it has not met the samples.

    Args:
        first: the result on the batch.
        fixed: on the permuted batch with the draw as it was; None if the run did not come to it.
        moved: on the permuted batch with the draw permuted.
        order: the order of the samples.
    """
    if fixed is None or moved is None or fixed.shape != first.shape or moved.shape != first.shape:
        return {None}
    if is_permuted(first, fixed, order):
        return {None if same(fixed, moved) else True}
    if stays_or_moves(first, fixed, order):
        return set()  # rows that are only joined with the samples stay where they were, whoever they belong to
    return {False if is_permuted(first, moved, order) else None}
