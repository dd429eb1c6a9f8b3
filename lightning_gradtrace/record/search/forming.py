"""Forms the entries of one share block by block and hands on those that reach the threshold of their occurrence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.shares import OuterShare, Share
from lightning_gradtrace.capture.shares.contraction import OuterView
from lightning_gradtrace.record._base import ParameterShifts
from lightning_gradtrace.record.search.bounds import OuterBounds, OuterExtents, Sizes, Stairs
from lightning_gradtrace.record.search.candidates import Candidates
from lightning_gradtrace.record.search.comparison import Found, at_least, product_of
from lightning_gradtrace.record.search.pieces import chunks, of_features, of_samples, picked, slices
from lightning_gradtrace.record.search.sieve import Sieve, is_worth

# Entries formed at a time (or one row of one sample, or one sample of a share without factors, if that is larger). On a
# CPU they are compared while they are in a cache, but a block should take far longer than the calls around it; a GPU
# wants few and large pieces.
WORKSPACE = 1 << 20
DEVICE_WORKSPACE = 1 << 26
# Columns of a block at most: a product of few rows and many columns is slower than one of a like number of both.
WIDTH = 1024
# Stairs are formed instead of everything where that takes less than this part of the time.
WORTH_SORTING = 0.8
# Picking an entry's scale out of its matrix takes as long as forming an entry of so many positions.
PICKING = 40
# A sieved entry takes this part of the time of forming it in float32.
SIEVED = 0.5
# Numbers of both factors that are copied at a time (or those of one sample, if that is more).
COPIED = 1 << 22


@dataclass
class Task:
    """One share to search: a parameter in one micro-batch.

    Attributes:
        parameter: the parameter; the matrix of an `OuterView` in its place.
        share: its share.
        samples: its occurrences within the step.
        reach: what is known of its entries before they are formed.
        view: how the share's matrix is arranged in the parameter; None if it is the parameter's own arrangement.
        prune: whether entries that the bounds exclude are left out.
        on_device: whether to search in large pieces with torch where the share is, rather than on the host.
        sieved: whether to leave out entries in bfloat16 before the others are formed in float32.
    """

    parameter: ParameterShifts
    share: Share
    samples: slice
    reach: OuterBounds | OuterExtents | Sizes
    view: OuterView | None
    prune: bool
    on_device: bool
    sieved: bool

    @classmethod
    def of(
        cls,
        parameter: ParameterShifts,
        share: Share,
        samples: slice,
        prune: bool = True,
        on_device: bool | None = None,
        sieved: bool | None = None,
    ) -> Task:
        """Make the task of a share; without ``on_device`` and ``sieved`` they follow from share and processor."""
        view = share if isinstance(share, OuterView) else None
        if view is not None:  # searched as a matrix, with the parameter arranged to fit it
            share, scale = view.matrix, parameter.scale
            info = replace(parameter.info, shape=tuple(share.shape))
            scale = view.as_matrix(scale) if isinstance(scale, Tensor) else scale
            parameter = replace(parameter, info=info, scale=scale, shares=[])
        reach: OuterBounds | OuterExtents | Sizes
        if not isinstance(share, OuterShare):
            reach = Sizes.of(share, parameter.scale)
            on_device = reach.squares.device.type != "cpu" if on_device is None else on_device
            return cls(parameter, share, samples, reach, view, prune, on_device, False)
        on_device = share.left.device.type != "cpu" if on_device is None else on_device
        if on_device:
            reach = OuterExtents.of(share, parameter.scale)
            return cls(parameter, share, samples, reach, view, prune, True, False)
        reach = OuterBounds.of(share, parameter.scale)
        sieved = share.dtype == torch.float32 and (is_worth(share.left.shape[1]) if sieved is None else sieved)
        return cls(parameter, share, samples, reach, view, prune, False, sieved)

    def search(self, threshold: np.ndarray, peaks: np.ndarray, k: int) -> Iterator[Candidates]:
        """Yield the entries at or above the threshold of their occurrence, and some below, in blocks.

        Args:
            threshold: one per occurrence of the step, inf for those that are not searched; it may rise between blocks.
            peaks: bound of all entries of every sample of the share.
            k: number of entries to select: an occurrence may leave out what the k largest of a block exclude.

        Yields:
            Candidates, sorted by occurrence.
        """
        own, samples = threshold[self.samples], self.wanted(threshold, peaks)
        if not len(samples):
            return
        if not isinstance(self.reach, OuterBounds):
            yield from self._written_out(samples, threshold, k)
            return
        left_out = [samples]
        if self.prune:
            left_out = []
            r, c = self.reach.reaching(samples, own[samples])
            for part in chunks(samples, WORKSPACE // (r * c)):
                stairs = Stairs.of(self.reach, part, own[part])
                if self._is_worth(stairs, own[part]):
                    yield from self._on_stairs(stairs, part, threshold, k)
                else:
                    left_out.append(part)
        if left_out:
            yield from self._everything(np.concatenate(left_out), threshold, k)

    def wanted(self, threshold: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        """Return the samples that may reach the threshold of their occurrence; for the arguments see `search`."""
        own = threshold[self.samples]
        wanted = np.isfinite(own)
        if self.prune:
            wanted &= ~(peaks < own)
        return np.flatnonzero(wanted)

    def _is_worth(self, stairs: Stairs, limit: np.ndarray) -> bool:
        """Say whether to form what is on the stairs rather than everything."""
        assert isinstance(self.share, OuterShare)
        positions = self.share.left.shape[1]
        cost, everything = positions, WORTH_SORTING * positions
        if isinstance(self.parameter.scale, Tensor):
            cost += PICKING
        if self.sieved:
            everything *= SIEVED
        return stairs.area(limit) * cost < everything * self.share.shape.numel()

    def _written_out(self, samples: np.ndarray, threshold: np.ndarray, k: int) -> Iterator[Candidates]:
        """Write out whole samples."""
        for run, values, factor in self.written_out(samples):
            position, shift = at_least(values, factor, threshold[self.samples][run], self.on_device, k)
            yield self.candidates(run, position, shift)

    def written_out(self, samples: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, float]]:
        """Write out whole samples, as many at a time as there is room for.

        Args:
            samples: numbers of samples, ascending.

        Yields:
            Neighbouring samples, their entries, shape (sample, entry), and a factor that these lack.
        """
        numel, scale = self.parameter.info.numel, self.parameter.scale
        for part in chunks(samples, (DEVICE_WORKSPACE if self.on_device else WORKSPACE) // max(1, numel)):
            for run in np.split(part, np.flatnonzero(np.diff(part) > 1) + 1):
                values = self.share.dense(slice(int(run[0]), int(run[-1]) + 1)).reshape(len(run), -1)
                factor = 1.0
                if not isinstance(scale, Tensor):
                    factor = scale
                elif not isinstance(self.share, OuterShare):
                    values = values * scale.flatten()
                else:  # products that were formed for this
                    values.mul_(scale.flatten())
                yield run, values, factor

    def candidates(self, run: np.ndarray, position: np.ndarray, shift: np.ndarray) -> Candidates:
        """Return shifts at flat positions of samples that were written out."""
        sample, entry = np.divmod(position, self.parameter.info.numel)
        return self._candidates(run[sample], entry, shift)

    def _everything(self, samples: np.ndarray, threshold: np.ndarray, k: int) -> Iterator[Candidates]:
        """Form outer products block by block, the same block of all samples one after the other."""
        share, scale = self.share, self.parameter.scale
        assert isinstance(share, OuterShare) and isinstance(self.reach, OuterBounds)
        n_rows, n_columns = share.shape
        chunk = max(1, WORKSPACE // share.shape.numel())
        every = COPIED // max(1, share.left[0].numel() + share.right[0].numel())
        for group in chunks(samples, max(chunk, every)):
            left, right = of_samples(share.left, group), of_samples(share.right, group)
            norms = self.reach.norms.numpy()[group], self.reach.columns.numpy()[group]
            sieve = Sieve.of(left, right, *norms, threshold[self.samples][group]) if self.sieved else None
            for rows in slices(n_rows, _height(chunk, n_columns)):
                for columns in slices(n_columns, WIDTH):
                    there = scale[rows, columns] if isinstance(scale, Tensor) else scale
                    now = threshold[self.samples][group]
                    block = None if sieve is None else sieve.block(rows, columns, there, now)
                    for part in slices(len(group), chunk):
                        found = None if block is None else block.search(part)
                        if found is None:
                            limit = threshold[self.samples][group[part]]
                            found = self._found(left[part, :, rows], right[part, :, columns], there, limit, k)
                        entry = (found.row + rows.start) * n_columns + found.column + columns.start
                        yield self._candidates(group[part][found.sample], entry, found.shift, found.error)

    def _on_stairs(self, stairs: Stairs, samples: np.ndarray, threshold: np.ndarray, k: int) -> Iterator[Candidates]:
        """Form what is on the stairs, from the most promising rows to the least.

        They are not sieved: every shape is a new one here, and oneDNN keeps what it prepares for up to 1,024 shapes.
        """
        share, scale = self.share, self.parameter.scale
        assert isinstance(share, OuterShare) and isinstance(self.reach, OuterBounds)
        left = of_features(of_samples(share.left, samples), stairs.rows)
        right = of_features(of_samples(share.right, samples), stairs.columns)
        rows = slice(0, 0)
        while rows.stop < stairs.rows.shape[1]:
            needed = stairs.columns_of(rows.stop, threshold[self.samples][samples])
            if not needed:
                return
            rows = slice(rows.stop, min(rows.stop + _height(len(samples), needed), stairs.rows.shape[1]))
            for columns in slices(needed, WIDTH):
                r, c, limit = stairs.rows[:, rows], stairs.columns[:, columns], threshold[self.samples][samples]
                there = picked(scale, r, c) if isinstance(scale, Tensor) else scale
                found = self._found(left[:, :, rows], right[:, :, columns], there, limit, k)
                entry = r[found.sample, found.row] * share.shape[1] + c[found.sample, found.column]
                yield self._candidates(samples[found.sample], entry, found.shift, found.error)

    def _found(self, left: Tensor, right: Tensor, scale: float | Tensor, limit: np.ndarray, k: int) -> Found:
        """Form one block of some samples and find what reaches the limit."""
        assert isinstance(self.share, OuterShare)
        values = product_of(left.to(self.share.dtype), right.to(self.share.dtype))
        factor = 1.0
        if isinstance(scale, Tensor):
            values.mul_(scale)
        else:
            factor = scale
        position, shift = at_least(values.flatten(1), factor, limit, on_device=False, k=k)
        sample, row, column = np.unravel_index(position, tuple(values.shape))
        return Found(sample, row, column, shift, np.zeros(len(shift)))

    def owns(self, candidates: Candidates) -> np.ndarray:
        """Say which candidates this task has found."""
        entry, occurrence = candidates.entry - self.parameter.info.offset, candidates.occurrence
        here = (occurrence >= self.samples.start) & (occurrence < self.samples.stop)
        return here & (entry >= 0) & (entry < self.parameter.info.numel)

    def exact(self, candidates: Candidates) -> np.ndarray:
        """Return the shifts of candidates of this task, ordered by occurrence, formed position by position."""
        assert isinstance(self.share, OuterShare)
        entry = candidates.entry - self.parameter.info.offset
        entry = entry if self.view is None else self.view.place(entry)
        row, column = np.divmod(entry, self.share.shape[1])
        scale = self.parameter.scale
        there = scale.numpy()[row, column] if isinstance(scale, Tensor) else np.float32(scale)
        shift: np.ndarray = self.share.entries(candidates.occurrence - self.samples.start, row, column).numpy() * there
        return shift

    def _candidates(
        self, sample: np.ndarray, entry: np.ndarray, shift: np.ndarray, error: np.ndarray | None = None
    ) -> Candidates:
        """Give samples and entries of the share their numbers in the step and in the model.

        Zeros are no candidates: all that there are tie, not only those that were found. They are found where a limit
        before scaling is too small for its dtype, or for a device that takes numbers below the normal ones for zero.
        """
        entry = entry if self.view is None else self.view.index(entry)
        error = np.zeros(len(shift)) if error is None else error
        found = Candidates(sample + self.samples.start, entry + self.parameter.info.offset, shift, error)
        other = (shift != 0) | (error != 0)
        return found if other.all() else found[other]


def _height(n_samples: int, n_columns: int) -> int:
    """Return how many rows of so many samples fit into the workspace."""
    return max(1, WORKSPACE // (n_samples * min(n_columns, WIDTH)))
