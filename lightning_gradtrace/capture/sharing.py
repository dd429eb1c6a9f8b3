"""Are random numbers the samples' own, or do all samples share them?

A tensor of random numbers with as many rows as there are samples may hold the noise of each, or as many negatives for
all of them. It matters where parameters meet it before they meet the batch: as the samples' own it is like the batch
there, as shared it is a constant. While that is not known a pass is read in both ways. Then the model is run on its
samples in another order, with one draw in its old order: where it meets the samples, what comes of it changes places
with them if they share the draw, and does not if each had its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradtrace.capture.batch_axis import candidates
from lightning_gradtrace.capture.draws import EVERYWHERE, DrawSite
from lightning_gradtrace.capture.placement import Probe, UnattributableError
from lightning_gradtrace.capture.settling import same
from lightning_gradtrace.capture.tape import Tape
from lightning_gradtrace.capture.use import Use

# How often the model is asked about a draw that has no influence yet, as before a layer that begins with zeros.
MOST_QUESTIONS = 3


@dataclass
class Sharing:
    """Knows which draws the samples share, and chooses how a pass is to be read.

    Attributes:
        own: where numbers are drawn that each sample has for itself.
        shared: where numbers are drawn that all samples share.
        is_known: whether there was nothing left to ask at the last pass.
    """

    own: set[DrawSite] = field(default_factory=set)
    shared: set[DrawSite] = field(default_factory=set)
    is_known: bool = False
    _asked: dict[DrawSite, int] = field(default_factory=dict, init=False)

    def unknown(self, tape: Tape) -> set[DrawSite]:
        """Return the draws that parameters met before they met the batch, and of which nothing is known."""
        return _drawn(tape) - self.own - self.shared

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
        doubtful = self._ask(unknown, probe) if unknown else set()
        self.is_known = not doubtful
        if not _drawn(tape) & (self.shared | doubtful):
            return tape, probe.sharing(self.shared) if self.shared else probe
        if tape.aside is None:
            raise UnattributableError(_late(_drawn(tape) & (self.shared | doubtful)))
        return tape.aside, probe.sharing(EVERYWHERE)

    def _ask(self, sites: Collection[DrawSite], probe: Probe) -> set[DrawSite]:
        """Learn what draws are, and return those that have no influence so far; they count as shared in the end."""
        try:
            found = probe.influence(sites)
        except Exception as error:
            raise UnattributableError(_not_told(sites, error)) from error
        doubtful = set()
        for site in sites:
            is_shared = found.get(site, False)
            if is_shared is None:
                self._asked[site] = self._asked.get(site, 0) + 1
                is_shared = self._asked[site] == MOST_QUESTIONS or None
            if is_shared is None:
                doubtful.add(site)
            else:
                (self.shared if is_shared else self.own).add(site)
        return doubtful


def _drawn(tape: Tape) -> set[DrawSite]:
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
        f"GradTrace: the random numbers of {_listed(sites)} are shared by all samples, and there are as many as there "
        "are samples. This was not known when the forward pass was recorded, because no captured step before drew "
        "them. Begin the trace at a step that draws them, or draw another number."
    )


def _listed(sites: Collection[DrawSite]) -> str:
    return ", ".join(sorted(map(str, sites))[:3])


def is_shared(
    site: DrawSite, first: Sequence[Use], fixed: Sequence[Use], moved: Sequence[Use], order: Tensor
) -> bool | None:
    """Say whether all samples share a draw.

    Args:
        site: where it is made.
        first: uses of a run on the batch, with all draws as constants.
        fixed: those of a run on the permuted batch, with this draw as it was and all others permuted.
        moved: those of a run on the permuted batch, with all draws permuted.
        order: the order of its samples.

    Returns:
        None if the draw has no influence on what samples meet.

    Raises:
        UnattributableError: it is shared in one place and not in another.
    """
    by_site = [{use.site: use for use in uses} for uses in (fixed, moved)]
    clean = unclean = meets = False
    for use in first:
        if not any(site in lineage.draws for lineage in use.lineages.values()):
            continue
        others = [uses.get(use.site) for uses in by_site]
        for i, kept in enumerate(use.outputs):
            after = [None if other is None else other.outputs[i] for other in others]
            if kept is None or after[0] is None or not candidates(kept.tensor.shape, len(order)):
                continue
            meets = True
            if not _is_permuted(kept.tensor, after[0].tensor, order):
                unclean = True
            elif after[1] is None or not same(after[0].tensor, after[1].tensor):
                clean = True
    if clean and unclean:
        raise UnattributableError("they seem to be shared in one place, and the samples' own in another")
    return clean if clean or unclean or not meets else None


def _is_permuted(before: Tensor, after: Tensor, order: Tensor) -> bool:
    order = order.to(before.device)
    ways = candidates(before.shape, len(order))
    return before.shape == after.shape and any(same(way.permute(before, order), after) for way in ways)
