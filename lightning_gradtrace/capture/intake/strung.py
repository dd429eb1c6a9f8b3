"""Samples of unlike size that a collate function strings together along one axis, as graphs and packed texts are.

The nodes of all graphs lie one after the other, with an *index vector* that says whose each node is (0, 0, 0, 1, 1, 2)
or with offsets (0, 3, 5, 6). Whatever is as long belongs to the same samples. Whole numbers may be *pointers*: the ends
of an edge are numbers of nodes, counted through all graphs. If the samples come in another order, so do rows, and
pointers are other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.intake.batch import parts_of, tensors

_WHOLE = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True)
class _Part:
    """A tensor of the batch whose rows are those of strung samples.

    Attributes:
        tensor: the tensor.
        axis: the axis that holds the rows.
        owners: whose they are, shape (row,).
        targets: for pointers, the number of the layout of what they point to, one for each line of pointers.
    """

    tensor: Tensor
    axis: int
    owners: Tensor
    targets: tuple[int, ...] = ()


class Strung:
    """Knows which tensors of a batch hold samples that are strung together, and whose their rows are.

    Args:
        batch: a batch.
        n_samples: its number of samples.

    Attributes:
        n_samples: number of samples.
        layouts: whose rows are, int64 of shape (row,), for every kind of rows: nodes, edges, the samples themselves.
        by_size: the same by the number of rows, if that leaves no doubt, but for the samples themselves.
    """

    def __init__(self, batch: Any, n_samples: int) -> None:
        self.n_samples = n_samples
        self.layouts: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {}
        self._parts: dict[int, _Part] = {}
        self._offsets: list[Tensor] = []
        found = [t for t in tensors(batch) if t.layout is torch.strided and not t.is_nested and t.dim()]
        whole = [t for t in found if t.dtype in _WHOLE and t.dim() < 3]
        if n_samples < 2 or not any(t.dim() == 1 and len(t) > n_samples for t in whole):  # so in most batches
            return
        rows = {size for tensor in found for size in tensor.shape[:2]}
        self._device = max(found, key=Tensor.numel).device  # what stays on the CPU is small
        named = {id(tensor): self._told(offsets) for tensor, offsets in _named(batch)}
        kinds = [*named.values(), *self._told_by_vectors(whole, rows)]
        if not any(len(owners) > n_samples for owners in kinds):
            return
        kinds.append(torch.arange(n_samples, device=self._device))
        self._add(kinds)
        self._add(self._told_by_pointers(whole))
        sizes = [len(owners) for owners in self.layouts]
        self.by_size = {
            size: owners
            for size, owners in zip(sizes, self.layouts, strict=True)
            if sizes.count(size) == 1 and size != n_samples
        }
        for tensor in found:
            part = self._part(tensor, named.get(id(tensor)))
            if part is not None and not any(tensor is offsets for offsets in self._offsets):
                self._parts[id(tensor)] = part

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._parts

    @property
    def is_confirmed(self) -> bool:
        """Whether more than one tensor shows that the samples are strung together: pointers, or offsets."""
        return bool(self._offsets) or sum(bool(part.targets) for part in self._parts.values()) > 1

    def owners(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors, each with the owners of its entries, int16 of its shape."""
        for part in self._parts.values():
            sizes = [1] * part.tensor.dim()
            sizes[part.axis] = -1
            owners = part.owners.to(part.tensor.device, torch.int16)
            yield part.tensor, owners.view(sizes).expand(part.tensor.shape)

    def pointers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors of pointers, each with the number of the layout that each points into, int16 of its shape."""
        for part in self._parts.values():
            if part.targets:
                kinds = torch.tensor(part.targets, dtype=torch.int16, device=part.tensor.device)
                kinds = kinds if part.axis == 0 else kinds[:, None]
                yield part.tensor, kinds.expand(part.tensor.shape)

    def permuted(self, tensor: Tensor, order: Tensor) -> Tensor | None:
        """Return a tensor with the samples in another order, None if it holds none that are strung together.

        Args:
            tensor: a tensor of the batch.
            order: which samples the permuted batch holds.
        """
        if self._parts and any(tensor is offsets for offsets in self._offsets):
            return permuted_offsets(tensor, order)
        part = self._parts.get(id(tensor))
        if part is None:
            return None
        order = order.to(self._device)
        rows = torch.cat([(part.owners == sample).nonzero().flatten() for sample in order])
        moved = tensor.index_select(part.axis, rows.to(tensor.device))
        if part.targets:
            counts = torch.bincount(part.owners, minlength=self.n_samples)[order]
            slots = torch.arange(len(order), device=self._device).repeat_interleave(counts)
            shifts = torch.stack([self._shifts(self.layouts[to], order)[slots] for to in part.targets]).to(tensor)
            lines = moved.movedim(part.axis, -1)
            moved = (lines + (shifts if lines.dim() == 2 else shifts[0])).movedim(-1, part.axis)
        return moved

    def _shifts(self, owners: Tensor, order: Tensor) -> Tensor:
        """Return by how much pointers grow, for each place in the permuted batch."""
        counts = torch.bincount(owners, minlength=self.n_samples)
        before = counts.cumsum(0) - counts
        return counts[order].cumsum(0) - counts[order] - before[order]

    def _told_by_vectors(self, whole: list[Tensor], rows: set[int]) -> Iterator[Tensor]:
        """Yield the owners that index vectors and offsets tell."""
        for vector in whole:
            if vector.dim() != 1 or len(vector) <= self.n_samples:
                continue
            if int(vector[-1]) == self.n_samples - 1 and _counts(vector):
                yield vector.to(self._device).long()
            elif len(vector) == self.n_samples + 1 and _are_offsets(vector) and int(vector[-1]) in rows:
                self._offsets.append(vector)
                yield self._told(vector)

    def _add(self, kinds: Iterable[Tensor]) -> None:
        for owners in kinds:
            if not any(torch.equal(owners, other) for other in self.layouts):
                self.layouts.append(owners)

    def _told_by_pointers(self, whole: list[Tensor]) -> list[Tensor]:
        """Return the owners of lines of pointers that no layout explains, such as edges: two must agree."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for tensor in whole:
            for line in [] if any(tensor is offsets for offsets in self._offsets) else _lines(tensor):
                pointed = {to: own for to, at in enumerate(self.layouts) if (own := _pointed(line, at)) is not None}
                fitting = [own for own in self.layouts if len(own) == len(line)]
                if not len(line) or any(torch.equal(own, one) for own in fitting for one in pointed.values()):
                    continue
                for to, owners in pointed.items():
                    is_in_order = len(self.layouts[to]) != self.n_samples and bool((owners.diff() >= 0).all())
                    if is_in_order and (not fitting or int(owners[0]) != int(owners[-1])):  # not a column of zeros
                        found.setdefault((len(line), to), []).append(owners)
        agreed = [(first, others) for first, *others in found.values() if others]
        return [first for first, others in agreed if all(torch.equal(first, other) for other in others)]

    def _told(self, offsets: Tensor) -> Tensor:
        """Return the owners that offsets tell."""
        counts = offsets.to(self._device).diff().long()
        return torch.arange(len(counts), device=self._device).repeat_interleave(counts)

    def _part(self, tensor: Tensor, own: Tensor | None) -> _Part | None:
        for axis in range(min(tensor.dim(), 2)):
            fitting = [owners for owners in self.layouts if len(owners) == tensor.shape[axis]]
            if own is not None:
                fitting = [owners for owners in fitting if torch.equal(owners, own)]
            if tensor.dtype in _WHOLE and tensor.dim() < 3:
                lines = tensor.movedim(axis, -1)
                for owners in fitting:
                    targets = [self._target(line, owners) for line in (lines if lines.dim() == 2 else [lines])]
                    if targets and None not in targets:
                        return _Part(tensor, axis, owners, tuple(t for t in targets if t is not None))
            is_told = own is not None or axis == 0 or tensor.shape[0] != self.n_samples
            if len(fitting) == 1 and len(fitting[0]) != self.n_samples and is_told:
                return _Part(tensor, axis, fitting[0])
        return None

    def _target(self, line: Tensor, own: Tensor) -> int | None:
        """Return the number of the layout that whole numbers point into: each to a row of its own sample."""
        for number, owners in enumerate(self.layouts):
            pointed = _pointed(line, owners)
            if pointed is not None and torch.equal(pointed, own):
                return number
        return None


def slices_of(part: Any) -> Mapping[str, Any] | None:
    """Return the offsets that a batch of graphs of `torch_geometric` keeps of its tensors, None of anything else."""
    slices = getattr(part, "_slice_dict", None)
    return slices if isinstance(slices, Mapping) else None


def permuted_offsets(offsets: Any, order: Tensor) -> Any:
    """Return offsets, or a mapping of offsets, with the samples in another order."""
    if isinstance(offsets, Mapping):
        return {name: permuted_offsets(part, order) for name, part in offsets.items()}
    if not isinstance(offsets, Tensor):
        return offsets
    counts = offsets.diff()[order.to(offsets.device)]
    return torch.cat([offsets[:1], counts.cumsum(0).to(offsets)])


def _named(batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of a batch, and of its parts, of which it keeps offsets, with these."""
    slices = slices_of(batch)
    if slices is not None:
        yield from _told_by(batch, slices)
    elif not isinstance(batch, Tensor):
        for part in (parts_of(batch) or {}).values():
            yield from _named(part)


def _told_by(holder: Any, slices: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for name, offsets in slices.items():
        if isinstance(offsets, Mapping):
            yield from _told_by(holder[name], offsets)
        elif isinstance(offsets, Tensor) and isinstance(holder[name], Tensor):
            yield holder[name], offsets


def _lines(tensor: Tensor) -> Iterable[Tensor]:
    """Return the lines of a tensor of whole numbers, such as both ends of edges of shape (2, edge) or (edge, 2)."""
    if tensor.dim() == 1:
        return [tensor]
    return tensor if tensor.shape[0] <= max(tensor.shape[1], 2) else tensor.T


def _pointed(line: Tensor, owners: Tensor) -> Tensor | None:
    """Return whose the rows are that a line of whole numbers points to, None if it points to others than there are."""
    if len(line) and (int(line.min()) < 0 or int(line.max()) >= len(owners)):
        return None
    return owners[line.to(owners.device).long()]


def strung_in(batch: Any, n_ids: int | None) -> Strung:
    """Return what is strung together in a batch.

    Args:
        batch: a batch.
        n_ids: number of sample ids that are known for it; without them, an index vector as long as the first tensor
            tells the number, if pointers or offsets show that it is none of sorted labels.
    """
    if n_ids is not None:
        return Strung(batch, n_ids)
    first = next((t for t in tensors(batch) if t.dim()), None)
    for vector in tensors(batch):
        if first is not None and vector.dtype in _WHOLE and vector.shape == first.shape[:1] and _counts(vector):
            found = Strung(batch, int(vector[-1]) + 1)
            if found.is_confirmed:
                return found
    return Strung(batch, 1)


def _counts(vector: Tensor) -> bool:
    """Say whether a vector counts samples up, staying with each one for a while."""
    steps = vector.diff()
    return len(steps) > 0 and int(vector[0]) == 0 < int(vector[-1]) and bool(((steps == 0) | (steps == 1)).all())


def _are_offsets(vector: Tensor) -> bool:
    return int(vector[0]) == 0 and int(vector.diff().min()) >= 0
