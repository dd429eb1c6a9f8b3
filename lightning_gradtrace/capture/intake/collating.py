"""Does a collate function leave the samples in the order of their ids? One that sorts texts by length does not.

It is asked where it runs, in a worker or not, at its first batch: the items are at hand there, and none is loaded
twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_packed_sequence
from torch.utils.data import default_collate

from lightning_gradtrace.capture.intake.batch import parts_of, tensors
from lightning_gradtrace.capture.intake.packed import packed_in

_N_ITEMS = 8  # that are looked for


class OrderedCollate:
    """Collates as another function does, and refuses a first batch in which samples have changed places.

    Args:
        inner: the collate function of the user's dataloader.
    """

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self.inner = inner
        self._asked = False

    @staticmethod
    def applies_to(collate: Any) -> bool:
        """Say whether a collate function is the user's own, and neither torch's nor that of a library of graphs."""
        return collate is not default_collate and not type(collate).__module__.startswith("torch_geometric.")

    def __call__(self, items: Any) -> Any:
        """Return the batch.

        Raises:
            ValueError: samples have changed places.
        """
        if self._asked or not isinstance(items, list):
            return self.inner(items)
        self._asked = True
        n_samples, found = len(items), None
        before: list[Any] = []
        with suppress(Exception):  # items of a kind that can't be looked at
            before = [copy.copy(item) for item in items[:_N_ITEMS]]
        batch = self.inner(items)
        with suppress(Exception):
            found = moved(before, batch, n_samples)
        if found is not None:
            slot, place = found
            raise ValueError(
                f"GradTrace: the collate function gives the samples of a batch another order: number {slot} of the "
                f"batch sampler stands in slot {place}, so shares would be given to the wrong `sample_id`. Leave them "
                "in their order (`enforce_sorted=False` packs texts of any order), or put the ids into the batch and "
                "give `sample_ids=` their key or a callable(batch) -> ids."
            )
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set: unpickling asks before __init__ has run
            raise AttributeError(name)
        return getattr(self.inner, name)


def moved(items: Sequence[Any], batch: Any, n_samples: int) -> tuple[int, int] | None:
    """Return the slot of an item and the other one in which it is found; None if all may stand where they should.

    One alone may have been changed, as texts with masked words are, and be the twin of another: two are asked for.

    Args:
        items: the first items of a batch, in the order of their ids.
        batch: the batch that was made of them.
        n_samples: number of samples in it.
    """
    if n_samples < 2:
        return None
    rows, seen = list(_rows(batch, n_samples)), dict[int, int]()
    for slot, item in enumerate(items):
        found = [_places(part, held) for part in _numbers(item) for held in rows]
        elsewhere = [places[0] for places in found if len(places) == 1]
        if elsewhere and not any(slot in places for places in found):
            seen.setdefault(elsewhere[0], slot)
    place, slot = next(iter(seen.items()), (0, 0))
    return (slot, place) if len(seen) > 1 else None


def _rows(batch: Any, n_samples: int) -> Iterator[Tensor]:
    """Yield what holds a row of several numbers for each sample, shape (sample, number, ...)."""
    for packed in packed_in(batch):
        yield pad_packed_sequence(packed, batch_first=True)[0]
    for tensor in tensors(batch):
        if tensor.layout is torch.strided and not tensor.is_nested and tensor.dim() > 1:
            yield from (tensor.movedim(axis, 0) for axis in (0, 1) if tensor.shape[axis] == n_samples)


def _numbers(item: Any) -> Iterator[Tensor]:
    """Yield the tensors, arrays and lists of several numbers in an item."""
    if isinstance(item, np.ndarray) or (isinstance(item, (list, tuple)) and item and isinstance(item[0], (int, float))):
        try:
            item = torch.as_tensor(item)
        except (TypeError, ValueError):
            return
    if isinstance(item, Tensor):
        if item.layout is torch.strided and not item.is_nested and item.dim() and item.numel() > 1:
            yield item
        return
    for part in item.values() if isinstance(item, Mapping) else (parts_of(item) or {}).values():
        yield from _numbers(part)


def _places(part: Tensor, rows: Tensor) -> list[int]:
    """Return the rows that begin with the numbers of a part of an item; texts may have been padded."""
    if part.dim() != rows.dim() - 1 or any(a > b for a, b in zip(part.shape, rows.shape[1:], strict=True)):
        return []
    begin = rows[(slice(None), *(slice(size) for size in part.shape))]
    if begin.dtype != part.dtype and (begin.is_floating_point() or part.is_floating_point()):
        part = part.to(begin.dtype)
    return [int(i) for i in (begin == part).flatten(1).all(1).nonzero()]
