"""Searches shares on a device without waiting for it until all of them have been searched.

Whatever the host decides by numbers on a device, it has to wait for, and meanwhile the device runs dry. So thresholds
stay on the device here. The shares with the largest shifts come first and raise them to about their final value; then
every piece of a share leaves the entries that reach them, as many as there is room for. A share for whose entries there
was not enough is searched again in the usual way. With a large k there is so much room that the host does wait now and
then, and frees what was not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.precision import brought_to
from lightning_gradtrace.record.search.candidates import Candidates
from lightning_gradtrace.record.search.comparison import first_positions, raised
from lightning_gradtrace.record.search.forming import Task

# A piece has room for so many times k entries of every sample.
ROOM = 2
# So many shares raise thresholds: a k-th largest takes several passes over them.
LEADERS = 2
# With room for more entries than this in memory the host waits for how many were found, and frees the rest.
HELD = 1 << 24


@dataclass
class _Piece:
    """Some samples of a share that were searched.

    Attributes:
        task: the share.
        run: numbers of the samples, neighbours.
        factor: by which values are still to be multiplied.
        position: see `first_positions`.
        value: the values there.
        is_full: whether there may be more entries than there was room for; known once it was cut.
    """

    task: Task
    run: np.ndarray
    factor: float
    position: Tensor
    value: Tensor
    is_full: bool = field(default=False, init=False)

    def cut(self, count: int, free: bool) -> None:
        """Leave only what was found: so many entries."""
        self.is_full = count == len(self.position) < len(self.run) * self.task.parameter.info.numel
        found = slice(0 if self.is_full else count)  # what has too little room is searched again
        self.position, self.value = self.position[found], self.value[found]
        if free:
            self.position, self.value = self.position.clone(), self.value.clone()


def can_queue(task: Task) -> bool:
    """Say whether a share is on a device that can be searched without waiting for it."""
    return task.on_device and _finds_first(task.reach.summary().device.type)


@cache
def _finds_first(device: str) -> bool:
    try:
        first_positions(torch.zeros(1, 1, device=device), 1.0, torch.zeros(1, device=device), 1)
    except NotImplementedError:
        return False
    return True


def search_queued(
    tasks: Sequence[Task], peaks: Sequence[np.ndarray], threshold: np.ndarray, k: int, pool: bool
) -> tuple[Candidates, list[int]]:
    """Search shares without waiting for a device before the last one.

    Args:
        tasks: the shares, the most promising first.
        peaks: for each the bound of all entries of every sample.
        threshold: one per occurrence of the step, inf for those that are not searched.
        k: number of entries to select.
        pool: whether to select them among all occurrences instead of for each.

    Returns:
        Of shares of every dtype and device the k largest entries, and ties, that reach the threshold of their
        occurrence, sorted by occurrence; and the numbers of tasks that are left out for lack of room.
    """
    limits = dict[torch.device, Tensor]()
    pieces: list[list[_Piece]] = []
    uncut, held = list[_Piece](), 0
    for task, bound in zip(tasks, peaks, strict=True):
        pieces.append([])
        for run, values, factor in task.written_out(task.wanted(threshold, bound)):
            device, first = values.device, task.samples.start + int(run[0])
            if device not in limits:
                limits[device] = _beside(device, threshold.copy())
            limit = limits[device][first : first + len(run)]
            if len(pieces) <= LEADERS:
                higher = raised(limit.amax(0, True) if pool else limit, values, factor, k)
                (limits[device] if pool else limit).copy_(higher)
            position = first_positions(values, factor, limit, min(values.numel(), ROOM * k * len(run)))
            piece = _Piece(task, run, factor, position, values.flatten()[position])
            pieces[-1].append(piece)
            uncut.append(piece)
            held += len(position)
            if held > HELD:
                _cut(uncut, free=True)
                uncut, held = [], 0
    _cut(uncut, free=False)
    full = [number for number, own in enumerate(pieces) if any(piece.is_full for piece in own)]
    kept = dict[tuple[torch.device, torch.dtype], list[_Piece]]()
    for own in pieces:
        for piece in own if not any(piece.is_full for piece in own) else ():
            if len(piece.value):
                kept.setdefault((piece.value.device, piece.value.dtype), []).append(piece)
    n_groups = 1 if pool else len(threshold)
    every = Candidates.join([part for alike in kept.values() for part in _largest(alike, k, n_groups)])
    return every[np.argsort(every.occurrence, kind="stable")], full


def _largest(pieces: Sequence[_Piece], k: int, n_groups: int) -> list[Candidates]:
    """Return the k largest entries, and ties, of every group, piece by piece; the pieces are of one device and dtype.

    Args:
        pieces: the pieces.
        k: number of entries.
        n_groups: number of occurrences, each a group of its own, or 1.
    """
    position, value = (torch.cat([getattr(p, name) for p in pieces]) for name in ("position", "value"))
    facts = np.array([(len(p.value), p.task.parameter.info.numel, p.task.samples.start + p.run[0]) for p in pieces])
    counts, numel, first = _beside(value.device, facts.T.copy())
    of = torch.repeat_interleave(torch.arange(len(pieces), device=value.device), counts, output_size=len(value))
    shift = value * _beside(value.device, np.array([piece.factor for piece in pieces])).to(value.dtype)[of]
    group = torch.zeros_like(of) if n_groups == 1 else first[of] + torch.div(position, numel[of], rounding_mode="floor")
    size = torch.nan_to_num(shift.abs(), torch.inf, torch.inf)

    order = size.argsort(descending=True)
    order = order[group[order].argsort(stable=True)]
    group, size = group[order], size[order]
    numbers = torch.arange(n_groups, device=value.device)
    start, stop = torch.searchsorted(group, numbers), torch.searchsorted(group, numbers, right=True)
    least = size[torch.minimum(start + k, stop).sub_(1).clamp_(min=0)]
    order = order[size >= least[group]]

    owner, where, what = to_host([of[order], position[order], shift[order]])
    by_piece = np.argsort(owner, kind="stable")
    parts = np.split(by_piece, np.searchsorted(owner[by_piece], np.arange(1, len(pieces))))
    return [piece.task.candidates(piece.run, where[p], what[p]) for piece, p in zip(pieces, parts, strict=True)]


def _beside(device: torch.device, numbers: np.ndarray) -> Tensor:
    """Bring numbers to a device without waiting for it."""
    return brought_to(device, torch.from_numpy(numbers), non_blocking=True)


def _cut(pieces: Sequence[_Piece], free: bool) -> None:
    """Leave only what was found; waits for the device.

    Args:
        pieces: pieces with room for more.
        free: whether to copy it, so that the memory of the rest is free.
    """
    for piece, count in zip(pieces, _counts([piece.position for piece in pieces]), strict=True):
        piece.cut(count, free)


def _counts(positions: Sequence[Tensor]) -> list[int]:
    """Return how many positions were found in each of some pieces."""
    if len({position.device for position in positions}) != 1:
        return [int(count) for count in to_host([(position >= 0).sum() for position in positions])]
    edges = _beside(positions[0].device, np.cumsum([0, *map(len, positions)]))
    found = torch.nn.functional.pad((torch.cat(list(positions)) >= 0).cumsum(0), (1, 0))[edges]
    return np.diff(found.cpu().numpy()).tolist()


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host, in one transfer for each device and dtype."""
    found: dict[int, np.ndarray] = {}
    for kind in {(tensor.device, tensor.dtype) for tensor in tensors}:
        there = [i for i, tensor in enumerate(tensors) if (tensor.device, tensor.dtype) == kind]
        flat = torch.cat([tensors[i].flatten() for i in there]).cpu().numpy()
        parts = np.split(flat, np.cumsum([tensors[i].numel() for i in there])[:-1])
        found.update((i, part.reshape(tensors[i].shape)) for i, part in zip(there, parts, strict=True))
    return [found[i] for i in range(len(tensors))]
