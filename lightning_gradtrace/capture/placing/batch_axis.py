"""Which axis of the tensors of a use holds the samples (docs/concepts.md, 2).

Inside one model the answer differs from use to use: `torch.nn.MultiheadAttention` works on (T, B, E) whatever its
``batch_first`` says, and its output projection sees rows of T * B, where the sample is a factor of an axis. Sizes
decide where they can; the shape before a merging view decides which factor; what is left in doubt is settled by
running the model on the batch with its samples permuted (`probe.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """Place of the samples in a tensor.

    Attributes:
        axis: the axis that holds them.
        factor: "whole" if the axis holds nothing else; "outer", "middle" or "inner" if samples and positions are merged
            in it; "single" if the whole tensor belongs to the only sample.
        run: for "middle", how many entries of a sample lie side by side.
    """

    axis: int
    factor: Literal["whole", "outer", "middle", "inner", "single"] = "whole"
    run: int = 1

    def fits(self, shape: Sequence[int], n_samples: int) -> bool:
        """Say whether a tensor of this shape can hold ``n_samples`` samples here."""
        if self.factor == "single":
            return n_samples == 1
        if self.axis >= len(shape):
            return False
        size = shape[self.axis]
        return size == n_samples if self.factor == "whole" else size > 0 and size % (n_samples * self.run) == 0

    def _sizes(self, size: int, n_samples: int) -> tuple[int, int, int]:
        """Return the sizes of the three axes that are merged in this one; the samples are the middle one."""
        rest = size // n_samples
        run = rest if self.factor == "outer" else self.run
        return rest // run, n_samples, run

    def samples_first(self, tensor: Tensor, n_samples: int) -> Tensor:
        """Return the tensor with the samples along axis 0 and every other axis in its old order."""
        if self.factor == "single":
            return tensor.unsqueeze(0)
        if self.factor == "whole":
            return tensor.movedim(self.axis, 0)
        apart = tensor.unflatten(self.axis, self._sizes(tensor.shape[self.axis], n_samples))
        return apart.movedim(self.axis + 1, 0).flatten(self.axis + 1, self.axis + 2)

    def mark(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """Lay out one weight per sample so that it multiplies what belongs to that sample.

        Args:
            weights: shape (..., sample).
            shape: shape of the tensor that holds the samples here.

        Returns:
            Shape (..., *shape) with 1 for every axis of ``shape`` but that of the samples.
        """
        lead, n_samples = weights.shape[:-1], weights.shape[-1]
        sizes = [1] * len(shape)
        if self.factor == "single":
            return weights.reshape((*lead, *sizes))
        if self.factor != "whole":
            repeats, _, run = self._sizes(shape[self.axis], n_samples)
            weights = weights.repeat_interleave(run, -1) if run > 1 else weights
            weights = torch.cat([weights] * repeats, -1) if repeats > 1 else weights
        sizes[self.axis] = shape[self.axis]
        return weights.reshape((*lead, *sizes))

    def permute(self, tensor: Tensor, order: Tensor) -> Tensor:
        """Return the tensor with the samples at this place in the given order."""
        if self.factor == "single":
            return tensor
        if self.factor == "whole":
            return tensor.index_select(self.axis, order)
        repeats, n_samples, run = self._sizes(tensor.shape[self.axis], len(order))
        rows = torch.arange(repeats * n_samples * run, device=order.device).view(repeats, n_samples, run)
        return tensor.index_select(self.axis, rows.index_select(1, order).flatten())


def candidates(shape: Sequence[int], n_samples: int, among: Collection[int] | None = None) -> list[SampleAxis]:
    """Return every place where a tensor of this shape could hold the samples.

    Args:
        shape: shape of the tensor.
        n_samples: number of samples of the micro-batch.
        among: the axes that may hold samples, because the function does not consume them; all if None.

    Returns:
        Axes of the right size first, then both factors of axes whose size is a multiple. With one sample every axis
        of size 1 means the same, and only the first is returned; without one, the whole tensor is the sample.
    """
    # An axis of unlike lengths, in a nested tensor, has no number for its size.
    leading = [
        (axis, size) for axis, size in enumerate(shape) if type(size) is int and (among is None or axis in among)
    ]
    found = [SampleAxis(axis) for axis, size in leading if size == n_samples]
    if n_samples == 1:
        return found[:1] or [SampleAxis(0, "single")]
    for axis, size in leading:
        if size > n_samples and size % n_samples == 0:
            found += [SampleAxis(axis, "outer"), SampleAxis(axis, "inner")]
    return found


def in_the_middle(options: Collection[SampleAxis], shape: Sequence[int], n_samples: int) -> list[SampleAxis]:
    """Return the places in the middle of axes that hold positions as well, according to other options."""
    found = []
    for axis in {option.axis for option in options if option.factor in ("outer", "inner")}:
        rest = shape[axis] // n_samples
        found += [SampleAxis(axis, "middle", run) for run in range(2, rest // 2 + 1) if rest % run == 0]
    return found


def shape_before_view(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape that a tensor had before the view that made it, None if no view made it."""
    node = tensor.grad_fn
    if node is not None:
        saved = getattr(node, "_saved_self_sym_sizes", None) if "View" in node.name() else None
        return None if saved is None else tuple(int(size) for size in saved)
    return None if tensor._base is None else tuple(tensor._base.shape)


def narrow(
    options: list[SampleAxis], shape: Sequence[int], before: Sequence[int] | None, n_samples: int
) -> list[SampleAxis]:
    """Keep the places that the shape before the view allows, which may be in the middle of what was merged.

    Args:
        options: places from `candidates`.
        shape: shape of the tensor.
        before: its shape before the view, None if unknown.
        n_samples: number of samples.

    Returns:
        The places that remain; all of them if the earlier shape says nothing.
    """
    if before is None or n_samples == 1 or tuple(before) == tuple(shape):
        return options
    kept: list[SampleAxis] = []
    for option in options:
        merged = None if option.factor == "whole" else _merged_axes(shape, before, option.axis)
        for place in [option] if merged is None else _after_merging(option.axis, before, *merged, n_samples):
            if place not in kept:
                kept.append(place)
    return kept or options


def _after_merging(axis: int, before: Sequence[int], first: int, last: int, n_samples: int) -> list[SampleAxis]:
    """Return where in an axis the samples may be that was merged from the axes ``first`` to ``last`` of a tensor."""
    found = []
    for place in candidates(before, n_samples):
        if first <= place.axis <= last:
            repeats, _, run = place._sizes(before[place.axis], n_samples)
            repeats *= math.prod(before[first : place.axis])
            run *= math.prod(before[place.axis + 1 : last + 1])
            factor: Literal["outer", "inner", "middle"] = "outer" if repeats == 1 else "inner" if run == 1 else "middle"
            found.append(SampleAxis(axis, factor, run if factor == "middle" else 1))
    return found


def _merged_axes(shape: Sequence[int], before: Sequence[int], axis: int) -> tuple[int, int] | None:
    """Find the run of axes (first, last) of ``before`` that a view merged into ``axis`` of ``shape``."""
    outside, size = 1, shape[axis]
    for s in shape[:axis]:
        outside *= s
    product, first = 1, 0
    while first < len(before) and product < outside:
        product *= before[first]
        first += 1
    if product != outside:
        return None
    inside, last = 1, first
    while last < len(before) and inside < size:
        inside *= before[last]
        last += 1
    return (first, last - 1) if inside == size and last - first > 1 else None
