"""What every axis of an activation holds, as far as functions tell: the samples, or something else.

The batch says it of its own tensors. Views, entry-by-entry functions, layers, products and cuts carry it on, so that
three stacked projections (3, position, sample, feature), a picture as high as the batch is large, or one of three
experts of a batch of three are not taken for samples. An axis may be merged of several, so it is kept as factors.

Nothing is worked out before somebody asks: a pass only leaves notes of where its tensors came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from torch import Tensor

from lightning_gradtrace.capture.placing.batch_axis import SampleAxis


class Holds(Enum):
    """What a factor of an axis holds."""

    SAMPLES = "a row for each sample, or one that was mixed from others into its place"
    PICKED = "rows of samples, in an order of somebody's own"
    OTHER = "features, positions, classes: no samples"
    ALIKE = "the same again and again"
    UNKNOWN = "nobody knows"


Factor = tuple[int, Holds]
Axis = tuple[Factor, ...]
"""Factors of an axis, outermost first, none of size 1."""
Layout = tuple[Axis, ...]


_ROWS = {Holds.SAMPLES, Holds.PICKED}
_FREE = {Holds.OTHER, Holds.ALIKE}


def one(size: int, holds: Holds) -> Axis:
    """Return an axis that holds one thing."""
    return ((size, holds),) if size != 1 else ()


def size_of(axis: Axis) -> int:
    """Return how many entries lie along an axis."""
    size = 1
    for own, _ in axis:
        size *= own
    return size


def is_free(axis: Axis) -> bool:
    """Say whether an axis leaves no room for samples."""
    return all(holds in _FREE for _, holds in axis)


class Note:
    """Where a tensor came from.

    Args:
        tensor: the tensor.
        sources: notes on the tensors that it came from, None for one of which nothing is known.
        carry: returns its layout for theirs.
    """

    __slots__ = ("_carry", "_layout", "_place", "_shape", "_sources", "tensor", "version")

    def __init__(
        self, tensor: Tensor, sources: Sequence[Note | None], carry: Callable[..., Layout | None] | None
    ) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self._place = tensor.data_ptr()
        self._shape = tuple(tensor.shape)
        self._sources: tuple[Note | None, ...] = tuple(sources)
        self._carry = carry
        self._layout: Layout | None = None

    @classmethod
    def of(cls, tensor: Tensor, layout: Layout | None) -> Note:
        """Return a note on a tensor whose layout is known."""
        note = cls(tensor, (), None)
        note._layout = layout
        return note

    def is_of(self, tensor: Tensor, n_writes: int = 0) -> bool:
        """Say whether it is a note on a tensor that was written to so many times since, and lies where it did."""
        is_it = self.tensor() is tensor and self.version == tensor._version - n_writes
        return is_it and self._place == tensor.data_ptr()

    @property
    def layout(self) -> Layout | None:
        """What its axes hold; None if nothing is known."""
        waiting = [self]
        while waiting:  # the way back to the batch may be longer than Python's stack
            last = waiting[-1]
            ahead = [note for note in last._sources if note is not None and note._carry is not None]
            if ahead and last._carry is not None:
                waiting += ahead
                continue
            last._work_out()
            waiting.pop()
        return self._layout

    def _work_out(self) -> None:
        if self._carry is None:
            return
        try:
            found = self._carry(*(None if note is None else note._layout for note in self._sources))
        except Exception:  # of a call that can't be read
            found = None
        if found is not None and tuple(map(size_of, found)) != self._shape:
            found = None
        self._layout, self._carry, self._sources = found, None, ()


def free_axes(note: Note | None) -> frozenset[int]:
    """Return the axes of a tensor that leave no room for samples; none if nothing is known."""
    layout = None if note is None else note.layout
    return frozenset() if layout is None else frozenset(i for i, axis in enumerate(layout) if is_free(axis))


def known_place(note: Note | None) -> SampleAxis | None:
    """Return where the samples are, if it is known of every axis what it holds; None else."""
    layout = None if note is None else note.layout
    holding = [] if layout is None else [i for i, axis in enumerate(layout) if not is_free(axis)]
    if layout is None or len(holding) != 1:
        return None
    (number,) = holding
    axis = layout[number]
    kinds = [holds for _, holds in axis]
    if kinds.count(Holds.SAMPLES) != 1 or not set(kinds) <= {Holds.SAMPLES, *_FREE}:
        return None
    at = kinds.index(Holds.SAMPLES)
    before, after = size_of(axis[:at]), size_of(axis[at + 1 :])
    if before == after == 1:
        return SampleAxis(number)
    if before == 1 or after == 1:
        return SampleAxis(number, "outer" if before == 1 else "inner")
    return SampleAxis(number, "middle", after)


def allowed(options: list[SampleAxis], note: Note | None) -> list[SampleAxis]:
    """Of several places of the samples in a tensor keep those that what is known of its axes allows.

    Args:
        options: the places.
        note: the note on the tensor, None if there is none.

    Returns:
        The places that remain; all of them if none would.
    """
    known, free = known_place(note), free_axes(note)
    if known in options:
        return [option for option in options if option == known]
    return [option for option in options if option.axis not in free] or options


def together(met: Sequence[Axis], size: int) -> Axis:
    """Return what an axis holds in which several tensors meet entry by entry.

    Args:
        met: the axis in each of the tensors of the batch that have it; none if constants alone do.
        size: its size.
    """
    if not met:
        return one(size, Holds.OTHER)
    met = [axis for axis in met if any(holds is not Holds.ALIKE for _, holds in axis)] or met[:1]
    if len(met) == 1:
        return met[0]
    if len({tuple(own for own, _ in axis) for axis in met}) > 1:
        kinds = {holds for axis in met for _, holds in axis}
        return one(size, Holds.OTHER if any(map(is_free, met)) and not kinds & _ROWS else Holds.UNKNOWN)
    return tuple((factors[0][0], _both({holds for _, holds in factors})) for factors in zip(*met, strict=True))


def _both(kinds: set[Holds]) -> Holds:
    kinds = kinds - {Holds.ALIKE} or kinds
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds == _ROWS:
        return Holds.SAMPLES
    return Holds.OTHER if kinds == {Holds.OTHER, Holds.UNKNOWN} else Holds.UNKNOWN


def stretched(
    shape: Sequence[int],
    arguments: Iterable[tuple[Layout | None, Sequence[int]]],
    holds: Holds = Holds.OTHER,
    drawn: Sequence[Sequence[int]] = (),
) -> Layout:
    """Return the layout of what came of tensors of the batch that were stretched to each other, and to constants.

    Args:
        shape: shape of the result.
        arguments: layout and shape of each of the tensors of the batch.
        holds: what axes hold that none of them has.
        drawn: shapes of random numbers beside them, which fit themselves to the samples that they meet.
    """
    given, found = list(arguments), []

    def along(axis: int, sizes: Sequence[int]) -> int | None:
        own = axis - len(shape) + len(sizes)
        return own if own >= 0 and sizes[own] == shape[axis] != 1 else None

    for axis, size in enumerate(shape):
        places = [(layout, own) for layout, sizes in given if (own := along(axis, sizes)) is not None]
        met = [one(size, Holds.UNKNOWN) if layout is None else layout[own] for layout, own in places]
        is_drawn = not met and any(along(axis, sizes) is not None for sizes in drawn)
        found.append(together(met, size) if met else one(size, Holds.UNKNOWN if is_drawn else holds))
    return tuple(found)


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Return the layout after a view as another shape, None if axes were cut where they do not part."""
    left = [factor for axis in layout for factor in axis]
    left.reverse()
    found: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            if not left:
                return None
            own, holds = left.pop()
            if own > size:
                if own % size:
                    return None
                holds = Holds.UNKNOWN if holds in _ROWS else holds
                left.append((own // size, holds))
                own = size
            if size % own:
                return None
            axis.append((own, holds))
            size //= own
        found.append(_merged(axis))
    return tuple(found) if not left else None


def _merged(factors: Sequence[Factor]) -> Axis:
    """Return the factors of an axis with neighbours of the same kind, but samples, in one."""
    found: list[Factor] = []
    for size, holds in factors:
        if found and found[-1][1] is holds and holds not in _ROWS:
            found[-1] = (found[-1][0] * size, holds)
        else:
            found.append((size, holds))
    return tuple(found)


def cut(axis: Axis, size: int) -> Axis:
    """Return what is left of an axis of which some entries were taken, or in another order."""
    if is_free(axis):
        return one(size, Holds.OTHER)
    return one(size, Holds.PICKED if len(axis) == 1 and axis[0][1] in _ROWS else Holds.UNKNOWN)


def beside(axis: Axis, times: int, *, outside: bool) -> Axis:
    """Return an axis that is repeated, as a whole or entry by entry."""
    more = one(times, Holds.ALIKE)
    return _merged((*more, *axis) if outside else (*axis, *more))


def by_letters(
    result: Sequence[int], kept: str, terms: Sequence[tuple[Layout | None, Sequence[int], str]]
) -> Layout | None:
    """Return the layout of a product, a sum, a layer: of a function that `terms_of` can read.

    Args:
        result: shape of the result.
        kept: the letters of its axes.
        terms: layout, shape and letters of each of the tensors of the batch.
    """
    if len(kept) != len(result) or any(len(set(term)) < len(term) for _, _, term in terms):
        return None
    found = []
    for letter, size in zip(kept, result, strict=True):
        met = []
        for layout, sizes, term in terms:
            at = term.find(letter)
            if at >= 0 and sizes[at] == size != 1:
                met.append(one(size, Holds.UNKNOWN) if layout is None else layout[at])
        found.append(together(met, size))
    return tuple(found)
