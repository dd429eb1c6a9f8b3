"""Exact selection of the largest shifts without writing them all out (docs/concepts.md, 4).

Every occurrence (or the whole step) has a threshold, a guess of its k-th largest value made from the last step.
Entries at or above it are candidates. By Cauchy-Schwarz ``|g[i][r, c]| <= |d[i][:, r]| |a[i][:, c]|``, so rows and
columns whose bound stays below the threshold are never formed. If a guess turns out too high for some occurrence -
fewer than k candidates - that occurrence is searched again from the bottom. The outcome is that of sorting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.contraction import OuterView
from lightning_gradtrace.capture.shares import OuterShare, Share
from lightning_gradtrace.record._base import ParameterShifts, StepShifts
from lightning_gradtrace.record.bounds import OuterBounds, typical_size
from lightning_gradtrace.record.candidates import Candidates, Known, kth_largest, magnitude

# The dense path writes out at most this many numbers at a time (or one sample of one parameter if that is larger).
WORKSPACE = 1 << 18
# Rows and columns are left out when fewer than this part of the entries can reach the threshold.
PRUNE_BELOW = 0.5
# A guess aims below last step's smallest k-th value (relative to the occurrence's size) by this factor.
CAUTION = 0.85
# The smallest ratio seen is forgotten by this factor per step, so that one odd step does not loosen the guess for good.
FORGET = 1.02
# A guess that was too high is first lowered by this factor; only if that is too high as well, the search starts anew.
RETRY = 0.6
# Candidates that compete are cut down to the k largest once there are this many times k.
TRIM = 4
_TINY = float(np.finfo(np.float32).tiny)


@dataclass
class _Task:
    """One share to search: a parameter in one micro-batch.

    Attributes:
        parameter: the parameter.
        share: its share.
        samples: its occurrences within the step.
        bounds: Cauchy-Schwarz bounds, None if the share is no outer product or pruning is off.
        view: how the share's matrix is arranged in the parameter; None if it is the parameter's own arrangement.
    """

    parameter: ParameterShifts
    share: Share
    samples: slice
    bounds: OuterBounds | None
    view: OuterView | None = None

    @classmethod
    def of(cls, parameter: ParameterShifts, share: Share, samples: slice, prune: bool) -> tuple[_Task, np.ndarray]:
        """Make the task of a share, and return the typical size of its shifts with it."""
        view = share if isinstance(share, OuterView) else None
        if view is not None:  # searched as a matrix, with the parameter arranged to fit it
            share, scale = view.matrix, parameter.scale
            info = replace(parameter.info, shape=tuple(share.shape))
            scale = view.as_matrix(scale) if isinstance(scale, Tensor) else scale
            parameter = replace(parameter, info=info, scale=scale, shares=[])
        outer = OuterBounds.of(share, parameter.scale) if isinstance(share, OuterShare) else None
        task = cls(parameter, share, samples, outer if prune else None, view)
        return task, typical_size(share, parameter.scale, outer)

    def rearranged(self, found: Candidates) -> Candidates:
        """Give candidates of a matrix their entry numbers in the parameter, and their order."""
        if self.view is None:
            return found
        offset = self.parameter.info.offset
        entry = self.view.index(found.entry - offset) + offset
        order = np.lexsort((entry, found.occurrence))
        return Candidates(found.occurrence[order], entry[order], found.shift[order])

    def samples_dense(self, samples: slice, threshold: np.ndarray) -> Candidates:
        """Write out some samples of the share and return their entries at or above their threshold."""
        info, scale = self.parameter.info, self.parameter.scale
        scale = scale.flatten() if isinstance(scale, Tensor) else scale
        values = self.share.dense(samples)
        values = values.reshape(len(values), -1)
        position, shift = _at_least(values, scale, threshold[self.samples][samples])
        occurrence, entry = np.divmod(position, info.numel)
        found = Candidates(occurrence + (self.samples.start + samples.start), entry + info.offset, shift)
        return self.rearranged(found)

    def block(self, samples: np.ndarray, rows: np.ndarray, columns: np.ndarray, threshold: np.ndarray) -> Candidates:
        """Write out some rows and columns of outer products; entries at or above their threshold.

        Args:
            samples: numbers of the samples, shape (n,), ascending.
            rows: the rows of each, shape (n, r), ascending.
            columns: the columns of each, shape (n, c), ascending.
            threshold: one per occurrence of the step.

        Returns:
            Candidates by occurrence.
        """
        share, info, scale = self.share, self.parameter.info, self.parameter.scale
        assert isinstance(share, OuterShare)
        pick, r, c = (torch.from_numpy(x).to(share.left.device) for x in (samples, rows, columns))
        left = _gather_features(share.left.index_select(0, pick), r).to(share.dtype)
        right = _gather_features(share.right.index_select(0, pick), c).to(share.dtype)
        values = torch.bmm(left.transpose(1, 2), right).flatten(1)
        if isinstance(scale, Tensor):
            scale = scale.flatten()[(r[:, :, None] * info.shape[1] + c[:, None, :]).flatten(1)]
        occurrence = self.samples.start + samples
        position, shift = _at_least(values, scale, threshold[occurrence])
        sample, place = np.divmod(position, values.shape[1])
        row, column = np.divmod(place, columns.shape[1])
        entry = rows[sample, row] * info.shape[1] + columns[sample, column] + info.offset
        return self.rearranged(Candidates(occurrence[sample], entry, shift))


@dataclass
class Searcher:
    """Finds candidates; remembers the ratio of k-th value to typical size between steps.

    Attributes:
        k: number of entries to select.
        pool: select among all occurrences of the step together instead of for each.
        prune: use the Cauchy-Schwarz bounds; without them the same entries are found more slowly.
    """

    k: int
    pool: bool = False
    prune: bool = True
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
        tasks, sizes = self._tasks(step)
        floor = np.full(step.n_occurrences, _TINY)
        guess = floor
        if self._ratio is not None:
            guess = np.maximum(sizes * self._ratio, floor)
            guess = np.where(np.isfinite(guess), guess, floor)
        if known is not None and known.floor(self.k):
            # The k-th largest of what is known, less its rounding, is no guess: the step has k entries above it.
            guess = np.maximum(guess, known.floor(self.k) * (1 - 1e-3))
        found = self._gather(tasks, guess.copy(), known)
        for lower in (guess * RETRY, floor):
            counts = np.bincount(found.occurrence, minlength=step.n_occurrences)
            short = np.full(len(counts), counts.sum() < self.k) if self.pool else counts < self.k
            short &= guess > floor
            if not short.any():
                break
            keep = ~short[found.occurrence]
            kept = Candidates(found.occurrence[keep], found.entry[keep], found.shift[keep])
            again = np.where(short, np.maximum(lower, floor), np.inf)
            found = Candidates.join([kept, self._gather(tasks, again, known)])
        self._learn(found, sizes)
        return found

    def _tasks(self, step: StepShifts) -> tuple[list[_Task], np.ndarray]:
        """List the shares to search, and the typical size of the shifts of every occurrence (or of their pool)."""
        if ("tasks", self.prune) not in step.shared:
            step.shared["tasks", self.prune] = self._new_tasks(step)
        tasks, squares = step.shared["tasks", self.prune]
        return tasks, np.sqrt(np.full_like(squares, squares.sum()) if self.pool else squares)

    def _new_tasks(self, step: StepShifts) -> tuple[list[_Task], np.ndarray]:
        tasks: list[_Task] = []
        squares = np.zeros(step.n_occurrences)
        for parameter in step.parameters:
            first = 0
            for n, share in zip(step.n_samples, parameter.shares, strict=True):
                samples = slice(first, first + n)
                first += n
                if share is None:
                    continue
                task, size = _Task.of(parameter, share, samples, self.prune)
                squares[samples] += size
                tasks.append(task)
        return tasks, squares

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

    def _gather(self, tasks: list[_Task], threshold: np.ndarray, known: Known | None) -> Candidates:
        """Collect all entries at or above the threshold of their occurrence (inf skips it); may raise thresholds."""
        parts: list[Candidates] = []
        if known is not None:
            complete, entries = known.at_least(threshold)
            threshold[complete] = np.inf
            parts.append(entries)
        for task in tasks:
            dense = np.isfinite(threshold[task.samples])
            if task.bounds is not None:
                rows, columns = task.bounds.reachable(threshold[task.samples])
                reach = rows.sum(1) * columns.sum(1) / task.share.shape.numel()
                few = dense & (reach < PRUNE_BELOW)
                dense &= ~few
                some = np.flatnonzero(few & (reach > 0))
                if len(some):
                    r, c = _first_of(rows[some]), _first_of(columns[some])
                    chunk = max(1, WORKSPACE // (r.shape[1] * c.shape[1]))
                    for start in range(0, len(some), chunk):
                        part = slice(start, start + chunk)
                        parts += self._trim(task.block(some[part], r[part], c[part], threshold), threshold)
            for samples in _runs(dense, max(1, WORKSPACE // task.parameter.info.numel)):
                parts += self._trim(task.samples_dense(samples, threshold), threshold)
        return Candidates.join(parts)

    def _trim(self, found: Candidates, threshold: np.ndarray) -> list[Candidates]:
        """Keep the k largest, and ties, of candidates that compete, and raise their threshold, if they are many."""
        if len(found.shift) <= TRIM * self.k:
            return [found]
        kept = []
        for one in [found] if self.pool else found.by_occurrence():
            if len(one.shift) > TRIM * self.k:
                least = kth_largest(one.shift, self.k)
                owners: Any = slice(None) if self.pool else one.occurrence[0]
                if np.isfinite(least):
                    raised = np.maximum(threshold[owners], least)
                    threshold[owners] = np.where(np.isfinite(threshold[owners]), raised, np.inf)
                keep = magnitude(one.shift) >= least
                one = Candidates(one.occurrence[keep], one.entry[keep], one.shift[keep])
            kept.append(one)
        return kept


def _first_of(wanted: np.ndarray) -> np.ndarray:
    """Return the numbers of the wanted features of every sample, filled up with others to the same count, ascending."""
    most = int(wanted.sum(1).max())
    picked = np.argsort(~wanted, axis=1, kind="stable")[:, :most]
    return np.sort(picked, axis=1)


def _gather_features(factor: Tensor, features: Tensor) -> Tensor:
    """Return some features of every sample: (sample, position, all), (sample, some) -> (sample, position, some)."""
    return factor.gather(2, features[:, None, :].expand(-1, factor.shape[1], -1))


def _runs(wanted: np.ndarray, longest: int) -> Iterator[slice]:
    """Yield slices of at most ``longest`` neighbouring samples that are wanted."""
    start = 0
    while start < len(wanted):
        if not wanted[start]:
            start += 1
            continue
        stop = start
        while stop < len(wanted) and wanted[stop] and stop - start < longest:
            stop += 1
        yield slice(start, stop)
        start = stop


def _at_least(values: Tensor, scale: float | Tensor, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the entries with ``|scale * value| >= limit`` or not finite.

    Args:
        values: shape (n, numel); may be overwritten.
        scale: a number, or a tensor that broadcasts with ``values``.
        limit: one per row.

    Returns:
        Flat positions, ascending, and the shifts there.
    """
    if isinstance(scale, Tensor):
        values, factor = values * scale, 1.0
    else:
        factor = scale
    eps = torch.finfo(values.dtype).eps
    # Compared before scaling, one pass less; a limit a little too low only lets in more candidates. With a learning
    # rate of zero all shifts are zero, or NaN.
    limits = limit * (1 - 4 * eps) / abs(factor) if factor else np.full_like(limit, np.inf)
    if values.device.type == "cpu":
        found = values.numpy()
        size, small = _scratch(found.shape, found.dtype)
        np.less(np.abs(found, out=size), limits[:, None].astype(found.dtype), out=small)
        position = np.flatnonzero(np.logical_not(small, out=small))
        found = found.reshape(-1)[position]
    else:
        limits_there = torch.as_tensor(limits, dtype=values.dtype, device=values.device)
        there = (~(values.abs() < limits_there[:, None])).flatten().nonzero().squeeze(1)
        found, position = values.flatten()[there].cpu().numpy(), there.cpu().numpy()
    shift = found if isinstance(scale, Tensor) else found * found.dtype.type(factor)
    return position, shift


_buffers: dict[np.dtype[Any], tuple[np.ndarray, np.ndarray]] = {}


def _scratch(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return an array of ``dtype`` and one of bools to write to: fresh memory costs more than the arithmetic here."""
    size = int(np.prod(shape))
    kept = _buffers.get(dtype)
    if kept is None or len(kept[0]) < size:
        kept = _buffers[dtype] = np.empty(size, dtype), np.empty(size, bool)
    return kept[0][:size].reshape(shape), kept[1][:size].reshape(shape)
