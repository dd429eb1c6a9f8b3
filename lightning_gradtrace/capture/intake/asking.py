"""Asks a collate function which tensors of a batch all samples share, although they are as long as these are many.

Sizes can't tell a grid of as many places as there are samples from one entry for each. A collate function can: of half
of the items it makes half of what is theirs, and as much as before of what they share. It is asked where it runs, in a
worker or not, once; a few bytes of shared memory bring the answer to the training.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_gradtrace.capture.intake.batch import leaves, parts_of, tensors
from lightning_gradtrace.capture.intake.shared import note_shared
from lightning_gradtrace.capture.probing.attributes import StateOf
from lightning_gradtrace.capture.probing.random_state import RandomState

Path = tuple[Any, ...]
_SIZE = 2**16  # bytes that an answer may take
_HEAVY = 2**27  # bytes of items of which not all are copied


class Answer:
    """What a collate function told, kept in memory that its workers share with the training."""

    def __init__(self) -> None:
        self._memory = torch.zeros(_SIZE, dtype=torch.uint8, device="cpu").share_memory_()
        self._told: tuple[set[Path], Any] | None = None

    @property
    def is_missing(self) -> bool:
        """Whether nobody has asked yet; of several workers the first one is to, whose batch arrives first."""
        worker = get_worker_info()
        return (worker is None or worker.id == 0) and not self._size

    @property
    def _size(self) -> int:
        return int(self._memory[:8].view(torch.int64))

    def give(self, paths: set[Path], batch: Any) -> None:
        """Write down which tensors of a batch, by the paths to them, are shared."""
        told = pickle.dumps((paths, _structure(batch)))
        if len(told) < _SIZE - 8:
            self._memory[8 : 8 + len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
            self._memory[:8].view(torch.int64).fill_(len(told))

    def mark(self, batch: Any) -> None:
        """Note which tensors of a batch are shared, if it still has the structure that the collate function gave it.

        Args:
            batch: a batch as the training step receives it.
        """
        if self._told is None and self._size:
            self._told = pickle.loads(self._memory[8 : 8 + self._size].numpy().tobytes())
        if self._told is None:
            return
        paths, structure = self._told
        if paths and _structure(batch) == structure:
            for path, tensor in leaves(batch):
                if path in paths:
                    note_shared(tensor)


def _structure(batch: Any, depth: int = 0) -> Any:
    """Return which parts a batch has; of lists in it, which may be of any length, only that they are some."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.dim()
    if isinstance(batch, list) and depth:
        return "list"
    parts = parts_of(batch)
    return None if parts is None else {key: _structure(part, depth + 1) for key, part in parts.items()}


def parts_to_ask_of(items: Sequence[Any]) -> list[Any]:
    """Return copies of the items of a batch in two parts, both halves of it; of heavy ones, of a few."""
    n_samples = len(items)
    is_heavy = n_samples > 9 and sum(tensor.nbytes for tensor in tensors(list(items))) > _HEAVY
    cuts = (4, 9) if is_heavy else (n_samples // 2, n_samples)
    return [copy.deepcopy(list(items[begin:end])) for begin, end in zip((0, cuts[0]), cuts, strict=True)]


def shared_paths(collate: Callable[[Any], Any], parts: Sequence[Any], batch: Any, n_samples: int) -> set[Path]:
    """Return the paths to those tensors of a batch that are not as long as the samples are many, but by chance.

    The function is called on parts of the items, and what it changes is put back: random states, what hangs on it and
    on what it was defined with. Where it draws numbers for all, they may be others, but are as many.

    Args:
        collate: the collate function.
        parts: items that it received, untouched, in two parts.
        batch: what it returned.
        n_samples: number of samples in it.
    """
    if n_samples < 2:
        return set()
    found = [(len(part), dict(leaves(one))) for part, one in zip(parts, _each(collate, parts), strict=True)]
    whole = {path: tensor for path, tensor in leaves(batch) if all(path in one for _, one in found)}
    found.append((n_samples, whole))
    fixed = {path for path in whole if not _follows([(n, one[path].shape) for n, one in found])}
    return fixed if len(fixed) < len(whole) else set()  # else it fills all batches up to one size


def _follows(met: Sequence[tuple[int, torch.Size]]) -> bool:
    """Say whether one of the first two axes is always as long as the samples are many, given these and shapes."""
    return any(all(shape[axis : axis + 1] == (n,) for n, shape in met) for axis in (0, 1))


def _each(collate: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
    """Call a collate function on items, and leave everything else as it was."""
    state, random = StateOf(collate), RandomState.now()
    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in parts:
                state.lend()
                try:
                    found.append(collate(part))
                finally:
                    state.restore()
                    random.restore()
    finally:
        state.end()
    return found
