"""Which tensors of a batch all samples have in common, though there are as many entries in them as samples.

A collate function may put something beside the samples: a grid, the names of the classes, positions. Nothing tells it
from one entry for each sample, if it happens to be as long. But the loss does not depend on the order of the samples:
in another order it is what it was if such a tensor keeps its own order, and is not if it doesn't. What may come in any
order, such as a set of negatives, can't be told from one entry for each sample, and counts as that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.intake.batch import leaves
from lightning_gradtrace.capture.intake.collating import may_hold_more
from lightning_gradtrace.capture.precision import FINE_TO_COARSE, HALF
from lightning_gradtrace.capture.probing.probe import SWAP, PermutationProbe, permutation

_MOST_TRIALS = 16
_CLEARLY = 100  # changes so many times smaller than others are rounding
# A loss that changes by less than so many of its parts may do so in another order of summation.
_ROUNDING = {dtype: torch.finfo(dtype).eps * (4 if dtype in HALF else 64) for dtype in FINE_TO_COARSE}
Losses = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Common:
    """Remembers which tensors of the batches the samples have in common, by where they stand and by their shape."""

    def __init__(self) -> None:
        self._known: dict[Hashable, bool] = {}

    def among(self, probe: PermutationProbe) -> list[Tensor]:
        """Return the tensors of a batch that all its samples have in common and that don't look like it.

        Args:
            probe: of the batch; the model is run at most a few times when something stands in the batch that was not
                there before.
        """
        found = dict(self._candidates(probe)) if probe.n_samples > 1 else {}
        if len(found) > 1 and not found.keys() <= self._known.keys():
            common = _common(list(found.values()), probe)
            self._known |= {key: any(tensor is one for one in common) for key, tensor in found.items()}
        return [tensor for key, tensor in found.items() if self._known.get(key)]

    def _candidates(self, probe: PermutationProbe) -> Iterator[tuple[Hashable, Tensor]]:
        for path, tensor in leaves(probe.batch):
            axis = probe.moved_axis(tensor)
            if axis is not None and tensor.numel() and not bool((tensor == tensor.narrow(axis, 0, 1)).all()):
                yield (path, axis, *(-1 if size == probe.n_samples else size > 1 for size in tensor.shape)), tensor


def common_to(trainer: Any, pl_module: Any) -> Common | None:
    """Return what tells what samples of a training's batches have in common; None if all that they hold is theirs."""
    return Common() if may_hold_more(trainer, pl_module) else None


def _common(candidates: Sequence[Tensor], probe: PermutationProbe) -> Sequence[Tensor]:
    """Return the tensors that the samples have in common, none if the model can't be run to find out."""
    for training in (False, True):  # some models have a loss in training only
        with suppress(Exception), probe.losses(training) as (losses, dtype):
            return _fewest(candidates, probe.n_samples, losses, dtype)
    return ()


def _fewest(candidates: Sequence[Tensor], n_samples: int, losses: Losses, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return the fewest tensors without whose order the loss does not change, none if it does in any case.

    What then follows the samples must have an influence: tensors that nothing is computed from leave every loss as it
    is.
    """
    ahead, order = torch.arange(n_samples, device="cpu"), permutation(n_samples)
    orders = [order, order.roll(1)] if n_samples > 2 else [SWAP]
    before = losses(ahead, ())
    rounding = _ROUNDING[dtype] * float(before.abs().max())

    def changes(kept: Sequence[Tensor] = ()) -> list[float]:
        return [_change(before, losses(order, kept)) for order in orders]

    usual = changes()
    if min(usual) <= rounding:
        return ()
    sizes = range(1, len(candidates))
    some = itertools.chain.from_iterable(itertools.combinations(candidates, size) for size in sizes)
    for kept in itertools.islice(some, _MOST_TRIALS):
        stays = all(rest <= change / _CLEARLY for rest, change in zip(changes(kept), usual, strict=True))
        if stays and _change(before, losses(torch.zeros_like(ahead), kept)) > rounding:
            return kept
    return ()


def _change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max())
