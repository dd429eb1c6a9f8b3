"""Places of samples in tensors that were picked from others: rows in any order and number, or one sample alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates, narrow, shape_before_view


class Fate(Enum):
    """What is known of a tensor that has no owners, entry by entry."""

    ORDINARY = "the samples lie along an axis, as they do everywhere else"
    LOST = "nobody knows whose its entries are"
    NOBODY = "it holds no samples, whatever its size: the distinct values of the batch, an order of the samples"


# The sample of every entry of a tensor, of the shape of the tensor; or the axis along which they are in order.
Owners = Tensor | SampleAxis | Fate


@dataclass(frozen=True, eq=False)
class Route:
    """Whose the entries of a tensor are, for every place where the tensor that they come from may hold the samples.

    Attributes:
        source: the tensor that they were picked from, detached; None if there is nothing to find out about it.
        owners: by place of the samples in the source.
        is_given: whether there is no source, or it is a tensor of the batch itself, not one that was computed.
        is_hit: whether values of the batch told what to pick: that owners are in order is chance then.
    """

    source: Tensor | None
    owners: Mapping[SampleAxis, Owners]
    is_given: bool = True
    is_hit: bool = False

    def place(self, axis: SampleAxis) -> Rows | SampleAxis | None:
        """Return where the samples are, given their place in the source; None if it has to be found out."""
        owners = self.owners.get(axis, Fate.LOST)
        if not isinstance(owners, Tensor):
            return owners if isinstance(owners, SampleAxis) else None
        empty = owners == EMPTY
        if bool(((owners < 0) & ~empty).any()):
            return None
        n_rows = owners.dim()
        while n_rows > 1 and constant(owners, n_rows - 1):
            n_rows -= 1
            owners = owners.narrow(n_rows, 0, min(1, owners.shape[n_rows]))
        return Rows(owners.long().clamp(min=0), n_rows, owners == EMPTY if bool(empty.any()) else None)


EMPTY, MIXED = -2, -1
"""Stand for the owner of entries that nobody owns, as a slot of an expert that no token was sent to, and of entries of
several samples."""
CERTAIN = SampleAxis(-1)
"""Stands for the place of the samples in a source that is none."""
LOST = Route(None, {CERTAIN: Fate.LOST})
NOBODY = Route(None, {CERTAIN: Fate.NOBODY})
"""Of a tensor that belongs to the samples that it meets later, as a constant does."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Place of the samples in a tensor whose rows belong to samples in any order and number.

    Attributes:
        owners: int64, the sample of every row, with as many axes as the tensor; of size 1 where it holds features.
        n_rows: number of leading axes that hold rows.
        empty: which rows are nobody's, of the shape of the owners; None if none are.
    """

    owners: Tensor
    n_rows: int
    empty: Tensor | None = None
    factor: str = "rows"
    axis: int = 0

    def fits(self, shape: Sequence[int], n_samples: int) -> bool:
        """Say whether a tensor of this shape has these rows."""
        return tuple(shape[: self.n_rows]) == tuple(self.owners.shape[: self.n_rows])

    def hold_all(self, cotangent: Tensor) -> bool:
        """Say whether nothing comes back to rows that are nobody's."""
        if self.empty is None:
            return True
        rows = cotangent.flatten(0, self.n_rows - 1)
        return not bool(rows[self.empty.flatten()].any())

    def samples_first(self, tensor: Tensor, n_samples: int) -> Tensor:
        """Return the rows of each sample, padded with zeros to the longest: shape (sample, row, ...)."""
        owners = self.owners.flatten()
        rows = tensor.flatten(0, self.n_rows - 1)
        counts = torch.bincount(owners, minlength=n_samples)
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        sorted_owners = owners[order]
        within = torch.arange(len(owners), device=owners.device) - starts[sorted_owners]
        longest = int(counts.max()) if len(owners) else 1
        out = rows.new_zeros((n_samples, longest, *rows.shape[1:]))
        out[sorted_owners, within] = rows[order]
        return out

    def mark(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """Lay out one weight per sample so that it multiplies the rows of that sample."""
        owners = self.owners.reshape(self.owners.shape[: self.n_rows] + (1,) * (len(shape) - self.n_rows))
        return weights[..., owners]


def as_route(
    source: Tensor | None, owners: Mapping[SampleAxis, Owners], is_given: bool = True, is_hit: bool = False
) -> Route | None:
    """Return a route, one of those that stand for a fate, or None if all places are ordinary."""
    for fate, route in ((Fate.ORDINARY, None), (Fate.LOST, LOST), (Fate.NOBODY, NOBODY)):
        if all(found is fate for found in owners.values()):
            return route
    known = {at: Fate.LOST if found is Fate.NOBODY else found for at, found in owners.items()}
    return Route(source, known, is_given, is_hit)


def of_rows(tensor: Tensor, n_samples: int) -> Route | None:
    """Return the route of rows that are still where they were in a tensor; None if it has no room for the samples.

    The last axis of real numbers holds features.
    """
    ways = narrow(candidates(tensor.shape, n_samples), tensor.shape, shape_before_view(tensor), n_samples)
    if tensor.is_floating_point() or tensor.is_complex():
        ways = [way for way in ways if way.axis < max(tensor.dim() - 1, 1)]
    found = {way: laid_out(way, tensor, n_samples) for way in ways}
    return Route(tensor.detach(), found) if found else None


def picked_by(by: Tensor, route: Route | None, output: Tensor, n_samples: int) -> Route | None:
    """Return the route of rows of a constant that a mask or counts of the batch pick: they are as these are.

    Nor are they taken for samples in their order where they happen to be: the constant stays in its own.

    Args:
        by: the mask, or the counts.
        route: its route.
        output: what was picked.
        n_samples: number of samples.
    """
    if route is LOST or route is NOBODY:
        return LOST
    if route is None:
        route = Route(by.detach(), {at: laid_out(at, by, n_samples) for at in candidates(by.shape, n_samples)})
    found: dict[SampleAxis, Owners] = {}
    for place, owners in route.owners.items():
        owners = laid_out(owners, by, n_samples) if isinstance(owners, SampleAxis) else owners
        found[place] = Fate.LOST
        if isinstance(owners, Tensor):
            rows = owners[by] if by.dtype is torch.bool else owners.repeat_interleave(by)
            found[place] = rows.view(-1, *[1] * (output.dim() - 1)).expand(output.shape)
    return as_route(route.source, found, is_hit=True) if found else LOST


def belonging_to(sample: int, tensor: Tensor) -> Tensor:
    """Return the owners of a tensor that one sample owns alone."""
    return torch.tensor(sample, dtype=torch.int16, device=tensor.device).expand(tensor.shape)


def laid_out(axis: SampleAxis, tensor: Tensor, n_samples: int) -> Tensor:
    """Return the owners of a tensor that holds the samples at a place."""
    numbers = torch.arange(n_samples, dtype=torch.int16, device=tensor.device)
    return axis.mark(numbers, tensor.shape).expand(tensor.shape)


def settled(owners: Tensor, n_samples: int) -> Owners:
    """Return the axis along which owners are in order, the owners themselves if there is none."""
    if owners.numel() < n_samples or sole_owner(owners) is not None:
        return owners
    ways = candidates(owners.shape, n_samples)
    fitting = [way for way in ways if torch.equal(owners, laid_out(way, owners, n_samples))]
    if not fitting:
        return owners
    return Fate.ORDINARY if len(ways) == 1 else fitting[0]


def filled(owners: Tensor, n_samples: int) -> Owners:
    """Return the axis that holds one row of each sample, in order, the owners themselves if there is none.

    Rows that nothing was written to (-1) are those of any sample, as where samples are padded to one length.
    """
    ways = candidates(owners.shape, n_samples)
    free = (owners < 0) if ways else owners
    fitting = [
        w for w in ways if w.factor == "whole" and bool((free | (owners == laid_out(w, owners, n_samples))).all())
    ]
    if len(fitting) != 1:
        return owners
    return Fate.ORDINARY if len(ways) == 1 else fitting[0]


def has_gaps(owners: Owners) -> bool:
    """Say whether there are rows that nothing was written to."""
    return isinstance(owners, Tensor) and bool((owners < 0).any())


def sole_owner(owners: Owners) -> int | None:
    """Return the sample that owns everything, None if there are several."""
    if not isinstance(owners, Tensor) or owners.numel() == 0:
        return None
    return int(owners.flatten()[0]) if all(constant(owners, axis) for axis in range(owners.dim())) else None


def constant(owners: Tensor, axis: int) -> bool:
    """Say whether owners do not change along an axis."""
    if owners.shape[axis] <= 1 or owners.stride(axis) == 0:
        return True
    return bool((owners == owners.narrow(axis, 0, 1)).all())
