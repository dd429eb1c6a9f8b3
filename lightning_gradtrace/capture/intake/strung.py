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
from lightning_gradtrace.capture.intake.packed import packed_in

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
        doubtful: tensors that hold a row for each sample, or for each of as many rows of another kind.
        is_confirmed: whether more than the length of a tensor shows that samples are strung together: pointers, an
            index vector and offsets that agree, or what the batch keeps of itself.
    """

    def __init__(self, batch: Any, n_samples: int) -> None:
        self.n_samples = n_samples
        self.layouts: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {}
        self._parts: dict[int, _Part] = {}
        self._offsets: list[Tensor] = []
        self.doubtful: list[Tensor] = []
        self.is_confirmed = False
        packed = {id(part) for one in packed_in(batch) for part in one}
        found = [
            t
            for t in tensors(batch)
            if t.layout is torch.strided and not t.is_nested and t.dim() and id(t) not in packed
        ]
        whole = [t for t in found if t.dtype in _WHOLE and t.dim() < 3]
        if n_samples < 2 or not any(t.dim() == 1 and len(t) > n_samples for t in whole):  # so in most batches
            return
        rows = {size for tensor in found for size in tensor.shape[:2]}
        self._device = max(found, key=Tensor.numel).device  # what stays on the CPU is small
        named = {id(tensor): self._told(offsets) for tensor, offsets in _named(batch)}
        vectors = list(self._told_by_vectors(whole, rows))
        self._vectors = [vector for vector, _ in vectors]
        kinds = [owners for vector, owners in vectors if named or self._is_supported(vector, owners, vectors, found)]
        kinds += named.values()
        self.is_confirmed |= bool(named)
        if not any(len(owners) > n_samples for owners in kinds):
            return
        self._samples = torch.arange(n_samples, device=self._device)
        self._add([self._samples, *kinds])
        self._add(self._told_by_pointers(whole))
        sizes = [len(owners) for owners in self.layouts]
        self.by_size = {
            size: owners
            for size, owners in zip(sizes, self.layouts, strict=True)
            if sizes.count(size) == 1 and size != n_samples
        }
        for tensor in found:
            own = named.get(id(tensor))
            if self._is_offsets(tensor) or (named and own is None and not self._is_vector(tensor)):
                continue
            part = self._part(tensor, own)
            if part is not None:
                self._parts[id(tensor)] = part
            elif sizes.count(n_samples) > 1 and n_samples in tensor.shape[:1]:
                self.doubtful.append(tensor)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._parts

    def says_of(self, tensor: Tensor) -> bool:
        """Say whether a tensor of the batch tells or holds whose rows are, or might."""
        return tensor in self or self._is_offsets(tensor) or any(tensor is one for one in self.doubtful)

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
        if self._parts and self._is_offsets(tensor):
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

    def _told_by_vectors(self, whole: list[Tensor], rows: set[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield index vectors and offsets, each with the owners that it tells."""
        for vector in whole:
            if vector.dim() != 1 or len(vector) <= self.n_samples:
                continue
            if int(vector[-1]) == self.n_samples - 1 and _counts(vector):
                yield vector, vector.to(self._device).long()
            elif len(vector) == self.n_samples + 1 and _are_offsets(vector) and int(vector[-1]) in rows:
                self._offsets.append(vector)
                yield vector, self._told(vector)

    def _is_supported(
        self, vector: Tensor, owners: Tensor, vectors: list[tuple[Tensor, Tensor]], found: list[Tensor]
    ) -> bool:
        """Say whether anything else shows that a vector is one of strung samples, and nothing speaks against it.

        Numbers that count up may as well be months, views, segments of a text or sorted classes.
        """
        n, size = self.n_samples, len(owners)
        others = [t for t in found if not any(t is one for one, _ in vectors)]
        is_told_twice = any(len(one) != len(vector) and torch.equal(owners, other) for one, other in vectors)
        if is_told_twice or any(map(_agree, _lines_into(owners, others).values())):
            self.is_confirmed = True
            return True
        counts = torch.bincount(owners, minlength=n)
        if any(tuple(t.shape[:2]) in ((n, size), (size, n)) for t in others) or bool((counts == n).all()):
            return False
        lengths = [t for t in others if t.dtype in _WHOLE and t.shape == (n,) and int(t.sum()) == size]
        if any(not torch.equal(t.to(counts), counts) for t in lengths):
            return False
        return any(size in t.shape[:2] and n not in t.shape[:2] for t in others)

    def _is_vector(self, tensor: Tensor) -> bool:
        return any(tensor is vector for vector in self._vectors)

    def _is_offsets(self, tensor: Tensor) -> bool:
        return any(tensor is offsets for offsets in self._offsets)

    def _add(self, kinds: Iterable[Tensor]) -> None:
        for owners in kinds:
            if not any(torch.equal(owners, other) for other in self.layouts):
                self.layouts.append(owners)

    def _told_by_pointers(self, whole: list[Tensor]) -> Iterator[Tensor]:
        """Yield the owners of lines of pointers that no layout explains, such as edges: two must agree."""
        others = [t for t in whole if not self._is_vector(t)]
        for target in list(self.layouts):
            for size, lines in _lines_into(target, others).items():
                if len(target) != self.n_samples and _agree(lines):
                    known = [own for own in self.layouts if len(own) == size]
                    yield from (owners for owners in lines[:1] if not any(torch.equal(owners, own) for own in known))

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
                    if targets and None not in targets and (own is not None or _varies(owners)):
                        return _Part(tensor, axis, owners, tuple(t for t in targets if t is not None))
            is_told = own is not None or self.n_samples not in tensor.shape[:2]
            is_told |= axis == 0 and self.is_confirmed and tensor.shape[0] != self.n_samples
            if len(fitting) == 1 and is_told and not torch.equal(fitting[0], self._samples):
                return _Part(tensor, axis, fitting[0])
        return None

    def _target(self, line: Tensor, own: Tensor) -> int | None:
        """Return the number of the layout that whole numbers point into: each to a row of its own sample."""
        is_each = torch.equal(own, self._samples)
        for number, owners in enumerate(self.layouts):
            pointed = _pointed(line, owners)
            if pointed is not None and torch.equal(pointed, own) and not (is_each and number == 0):  # labels in order
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


def _lines_into(owners: Tensor, whole: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Return whose the rows are that lines of whole numbers point to, sample after sample, by the lengths of lines."""
    found: dict[int, list[Tensor]] = {}
    for tensor in whole:
        for line in _lines(tensor) if tensor.dtype in _WHOLE and tensor.dim() < 3 else []:
            pointed = _pointed(line, owners)
            if pointed is not None and _varies(pointed) and bool((pointed.diff() >= 0).all()):
                found.setdefault(len(line), []).append(pointed)
    return found


def _agree(lines: list[Tensor]) -> bool:
    return len(lines) > 1 and all(torch.equal(lines[0], line) for line in lines)


def _varies(owners: Tensor) -> bool:
    return len(owners) > 1 and bool((owners != owners[0]).any())


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
