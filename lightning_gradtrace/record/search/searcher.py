"""Searches a step, from guesses of its thresholds to candidates that are complete."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lightning_gradtrace.record._base import StepShifts
from lightning_gradtrace.record.search.candidates import Candidates, Known, kth_largest
from lightning_gradtrace.record.search.forming import Task
from lightning_gradtrace.record.search.gathering import Gathering
from lightning_gradtrace.record.search.overflow import first_not_finite, suspicious
from lightning_gradtrace.record.search.pieces import parts_of
from lightning_gradtrace.record.search.queued import can_queue, search_queued, to_host
from lightning_gradtrace.record.search.side_by_side import call_all, n_threads

# A guess aims below last step's smallest k-th value (relative to the occurrence's size) by this factor. Too low costs
# little: the threshold rises with what is found. Too high costs a second search.
CAUTION = 0.7
# The smallest ratio seen is forgotten by this factor per step, so that one odd step does not loosen the guess for good.
FORGET = 1.02
# A guess that was too high is first lowered by this factor; only if that is too high as well, the search starts anew.
RETRY = 0.6
# A part of a step that a thread searches has so many entries at least.
PART = 1 << 21
_TINY = float(np.finfo(np.float32).tiny)


@dataclass
class _Work:
    """The shares of a step, the most promising first.

    Attributes:
        tasks: the shares.
        peaks: for each the bound of all entries of every sample.
        squares: squared typical size of the shifts of every occurrence.
    """

    tasks: list[Task]
    peaks: list[np.ndarray]
    squares: np.ndarray

    @classmethod
    def of(cls, step: StepShifts, prune: bool, on_device: bool | None, sieved: bool | None) -> _Work:
        """List the shares of a step."""
        tasks = []
        for parameter in step.parameters:
            for samples, share in zip(step.micro_batches, parameter.shares, strict=True):
                if share is not None and share.shape.numel():
                    tasks.append(Task.of(parameter, share, samples, prune, on_device, sieved))
        total, peaks, promise = np.zeros(step.n_occurrences), [], []
        for task, summary in zip(tasks, to_host([task.reach.summary() for task in tasks]), strict=True):
            squares, peak = task.reach.per_sample(summary)
            total[task.samples] += squares
            peaks.append(peak)
            promise.append(squares.sum() / max(1, task.share.shape.numel()))
        order = np.argsort(-np.array(promise), kind="stable")
        return cls([tasks[i] for i in order], [peaks[i] for i in order], total)

    def n_parts(self, pool: bool) -> int:
        """Return into how many parts to cut the occurrences, to be searched side by side on the host."""
        if pool or any(task.on_device or not task.share.is_held for task in self.tasks):
            return 1
        entries = sum(task.share.n_samples * task.share.shape.numel() for task in self.tasks)
        return max(1, min(n_threads(), len(self.squares), entries // PART))

    def exact(self, rough: Candidates) -> np.ndarray:
        """Return the shifts of candidates whose shifts have an error."""
        shift = np.empty_like(rough.shift)
        for task in self.tasks:
            own = np.flatnonzero(task.owns(rough))
            if len(own):
                own = own[np.argsort(rough.occurrence[own], kind="stable")]
                shift[own] = task.exact(rough[own])
        return shift


@dataclass
class Searcher:
    """Finds candidates; remembers the ratio of k-th value to typical size between steps.

    Attributes:
        k: number of entries to select.
        pool: select among all occurrences of the step together instead of for each.
        prune: use the Cauchy-Schwarz bounds; without them the same entries are found more slowly.
        on_device: search in large pieces where the shares are, as on a GPU; None: unless they are on the host.
        sieved: leave out entries in bfloat16 first, see `Sieve`; None: where the processor is fast at it.
    """

    k: int
    pool: bool = False
    prune: bool = True
    on_device: bool | None = None
    sieved: bool | None = None
    _ratio: float | None = field(default=None, init=False)

    @property
    def guess(self) -> float | None:
        """Ratio with which the next step's thresholds are guessed, None for no guess."""
        return None if self._ratio is None else float(self._ratio)

    @guess.setter
    def guess(self, ratio: float | None) -> None:
        self._ratio = ratio

    def search(self, step: StepShifts, known: Known | None = None) -> Candidates:
        """Return at least the ``k`` largest non-zero shifts of every occurrence (or of the step).

        Args:
            step: the shifts.
            known: what a selection per occurrence found in the same step, for a selection over the step: occurrences of
                which everything that counts is known are not searched again.

        Returns:
            Candidates by occurrence. Fewer than ``k`` only if no more shifts differ from zero.
        """
        work = self._work(step)
        sizes = np.sqrt(np.full_like(work.squares, work.squares.sum()) if self.pool else work.squares)
        floor = np.full(step.n_occurrences, _TINY)
        guess = floor
        if self._ratio is not None:
            guess = np.maximum(sizes * self._ratio, floor)
            guess = np.where(np.isfinite(guess), guess, floor)
        if known is not None and known.floor(self.k):
            # The k-th largest of what is known, less its rounding, is no guess: the step has k entries above it.
            guess = np.maximum(guess, known.floor(self.k) * (1 - 1e-3))
        odd, through, first = suspicious(work.squares), np.zeros(step.n_occurrences, bool), Candidates.join([])
        if odd.any():
            through, first = first_not_finite(step, odd, self.k, self.pool)
            guess, floor = np.where(through, np.inf, guess), np.where(through, np.inf, floor)
        parts = parts_of(step.n_occurrences, work.n_parts(self.pool))
        others = call_all([partial(self._select, work, guess, floor, known, part) for part in parts])
        found = Candidates.join([first, *others])
        if len(first):
            found = found[np.argsort(found.occurrence, kind="stable")]
        self._learn(found, sizes)
        return found

    def _select(
        self, work: _Work, guess: np.ndarray, floor: np.ndarray, known: Known | None, part: slice
    ) -> Candidates:
        """Return the candidates of some occurrences, sorted.

        Args:
            work: the shares.
            guess: where to start, one per occurrence of the step.
            floor: below the smallest shift that counts, likewise.
            known: see `search`.
            part: the occurrences.
        """
        own = np.zeros(len(guess), bool)
        own[part] = True
        gathering = Gathering(self.k, np.where(own, guess, np.inf), self.pool)
        self._gather(work, gathering, known)
        for lower in (guess * RETRY, floor):
            short = own & (gathering.counts() < self.k) & (guess > floor) & np.isfinite(guess)
            if not short.any():
                break
            gathering.drop(short)
            gathering.threshold[:] = np.where(short, np.maximum(lower, floor), np.inf)
            self._gather(work, gathering, known)
        return gathering.result()

    def _work(self, step: StepShifts) -> _Work:
        how = self.prune, self.on_device, self.sieved
        key = (_Work, *how)
        if key not in step.shared:
            step.shared[key] = _Work.of(step, *how)
        work: _Work = step.shared[key]
        return work

    def _gather(self, work: _Work, gathering: Gathering, known: Known | None) -> None:
        """Collect all entries at or above the threshold of their occurrence (inf skips it)."""
        if known is not None:
            complete, entries = known.at_least(gathering.threshold)
            gathering.threshold[complete] = np.inf
            gathering.add(entries)
        left = list(range(len(work.tasks)))
        if all(map(can_queue, work.tasks)):
            entries, left = search_queued(work.tasks, work.peaks, gathering.threshold, self.k, self.pool)
            gathering.add(entries)
        for i in left:
            for found in work.tasks[i].search(gathering.threshold, work.peaks[i], self.k):
                gathering.add(found)
        gathering.settle(work.exact)

    def _learn(self, found: Candidates, sizes: np.ndarray) -> None:
        """Remember the smallest ratio of the k-th value to the typical size."""
        edges = [0, len(found.shift)] if self.pool else np.searchsorted(found.occurrence, np.arange(len(sizes) + 1))
        ratios = [
            kth_largest(found.shift[a:b], self.k) / size
            for (a, b), size in zip(itertools.pairwise(edges), sizes, strict=False)
            if b - a >= self.k and np.isfinite(size) and size > 0
        ]
        ratios = [ratio for ratio in ratios if np.isfinite(ratio)]
        if not ratios:
            self._ratio = None
            return
        least = CAUTION * min(ratios)
        self._ratio = least if self._ratio is None else min(least, self._ratio * FORGET)
