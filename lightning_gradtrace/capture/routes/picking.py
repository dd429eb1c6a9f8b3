"""Calls as `routing.py` sees them, and which of them pick from a tensor along an axis that may hold the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradtrace.capture.forward.functions import Facts, names_of, tensors_among
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.routes.orders import PLACES, SORTS

# Functions that pick along one axis: place of the axis among the arguments, and its default (None: all axes).
_BY_INDEX = {"index_select": (1, 0), "gather": (1, 0), "take_along_dim": (2, None), "repeat_interleave": (2, None)}
_BY_PLACE = {
    **SORTS,
    **{"select": (1, 0), "narrow": (1, 0), "unbind": (1, 0), "__iter__": (1, 0)},
    **{"split": (2, 0), "chunk": (2, 0), "tensor_split": (2, 0), "split_with_sizes": (2, 0)},
    **{"flip": (1, None), "roll": (2, None), "flipud": (1, 0), "fliplr": (1, 1), "rot90": (2, (0, 1))},
}
AXES = {**_BY_INDEX, **_BY_PLACE}
"""Place of the axis among the arguments of these functions, and its default."""
_ANYWHERE = names_of("masked_select _pack_padded_sequence") | PLACES
_CUTS = names_of("select narrow unbind __iter__ split chunk tensor_split split_with_sizes")
_MASKS = (torch.bool, torch.uint8)
PICKS = {"__getitem__", *_BY_INDEX, *_BY_PLACE, *_ANYWHERE}


@dataclass
class Call:
    """One call of a function with batched arguments.

    Attributes:
        name: name of the function.
        known: facts about it.
        function: the function.
        args: its positional arguments.
        kwargs: its named arguments.
        outputs: the tensors among its results.
        batched: the batched tensors among its arguments, but for those that hold no samples.
        is_noise: whether the first argument was drawn.
        features: axes of the first argument that hold features and no samples, if it picks from a batched tensor.
    """

    name: str
    known: Facts
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]
    batched: list[Tensor]
    is_noise: bool
    features: frozenset[int] = frozenset()

    @property
    def picks_from_batch(self) -> bool:
        """Whether it picks from a batched tensor, along whatever axis."""
        return self.name in PICKS and bool(self.args) and any(t is self.args[0] for t in self.batched)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument, wherever it stands."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def places(self, n_samples: int) -> list[SampleAxis]:
        """Return where the first argument may hold the samples."""
        return [place for place in candidates(self.args[0].shape, n_samples) if place.axis not in self.features]

    def on(self, first: Any) -> list[Tensor | None]:
        """Call the function with another first argument, and return its tensors."""
        moved = list(tensors_among((self.function(first, *self.args[1:], **self.kwargs),)))
        return [*moved, *[None] * (len(self.outputs) - len(moved))]


def picks_samples(call: Call, n_samples: int) -> bool:
    """Say whether a function selects along an axis that may hold samples.

    Slices and loops are everywhere; they count where an axis has as many entries as there are samples, or where none
    has and samples can only be a factor of one.
    """
    name = call.name
    if name not in PICKS:
        return False
    if name in _ANYWHERE:
        return True
    shape = call.args[0].shape
    options = call.places(n_samples)
    by_index = {option.axis for option in options}
    by_place = {option.axis for option in options if option.factor == "whole"} or by_index
    if name == "__getitem__":
        return _index_hits(call.args[1], shape, by_index, by_place)
    place, default = AXES[name]
    dim = call.argument(place, "dim", call.argument(place, "dims", default))
    if name == "flip":  # its axes may stand one by one
        dim = call.args[1:] or dim
    hit = by_index if name in _BY_INDEX else by_place
    return any(d is None or d % max(len(shape), 1) in hit for d in tree_leaves(dim, is_leaf=lambda one: one is None))


def picks_samples_by_batch(call: Call, n_samples: int, is_nobodys: Callable[[Tensor], bool]) -> bool:
    """Say whether numbers of the batch tell which samples are picked, as an order of texts by their lengths does.

    Those that pick something else of each sample, as its last word, are none of these.

    Args:
        call: a call.
        n_samples: number of samples.
        is_nobodys: says whether a tensor comes from the batch and holds no samples, as an order of them.
    """
    if not call.picks_from_batch:
        return False
    first, index = call.args[0], call.argument(1, "index")

    def from_batch(part: Any) -> bool:
        return isinstance(part, Tensor) and (is_nobodys(part) or any(part is t for t in call.batched))

    if call.name == "__getitem__":
        parts = index if isinstance(index, tuple) else (index,)
        kept = [part if from_batch(part) or not isinstance(part, (Tensor, list)) else slice(None) for part in parts]
        axes = {place.axis for place in call.places(n_samples)}
        return any(map(from_batch, parts)) and _index_hits(tuple(kept), first.shape, axes, set())
    if call.name in ("index_select", "gather", "take_along_dim"):
        named = (call.argument(2, "index"), call.argument(1, "indices"))
        return any(map(from_batch, (index, *named))) and picks_samples(call, n_samples)
    return False


def cuts_out(call: Call) -> bool:
    """Say whether a function returns parts as they lie in the first argument, wherever these are told to be."""
    if call.name == "__getitem__":
        return not any(isinstance(part, (Tensor, list)) for part in tree_leaves(call.args[1], is_leaf=_is_list))
    return call.name in _CUTS


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def picks_by_batch(call: Call) -> bool:
    """Say whether masks or counts of the batch tell how many rows are picked from something else."""
    by = [t for t in call.batched if t is not call.args[0]] if call.args else []
    if call.name == "repeat_interleave":
        return bool(by)
    return call.name in ("__getitem__", "masked_select") and any(t.dtype in _MASKS for t in by)


def lays_out(call: Call) -> bool:
    """Say whether a function gives what was picked an axis of its own for the samples, so that order is no chance."""
    if call.name == "_pad_packed_sequence":
        return True
    return call.name in ("view", "reshape", "unflatten") and call.outputs[0].dim() > call.args[0].dim()


def picker(call: Call) -> Tensor | None:
    """Return the mask or the counts that pick all rows of the result, of `picks_by_batch`; None if it can't be told."""
    by = call.argument(1, "repeats") if call.name == "repeat_interleave" else call.argument(1, "mask")
    if isinstance(by, tuple) and by and all(_is_whole(part) for part in by[1:]):
        by = by[0]
    first = call.args[0]
    if not isinstance(by, Tensor) or not any(by is t for t in call.batched) or not isinstance(first, Tensor):
        return None
    if call.name == "repeat_interleave":
        at = call.argument(2, "dim")
        along = first.dim() == 1 if at is None else at % max(first.dim(), 1) == 0
        return by if along and by.dim() == 1 and by.dtype is not torch.bool else None
    return by if by.dtype is torch.bool and first.shape[: by.dim()] == by.shape else None


def _is_whole(part: Any) -> bool:
    return part is Ellipsis or (isinstance(part, slice) and part == slice(None))


def _index_hits(index: Any, shape: Sequence[int], by_index: set[int], by_place: set[int]) -> bool:
    """Say whether an index in brackets selects along one of the axes."""
    parts = index if isinstance(index, tuple) else (index,)
    n_used = sum(
        part.dim() if isinstance(part, Tensor) and part.dtype in _MASKS else part is not None
        for part in parts
        if part is not Ellipsis
    )
    axis = 0
    for part in parts:
        if part is Ellipsis:
            axis += len(shape) - n_used
        elif isinstance(part, Tensor) and part.dtype in _MASKS:
            if any(a in by_index for a in range(axis, axis + max(part.dim(), 1))):
                return True
            axis += part.dim()
        elif part is not None and not isinstance(part, bool):
            whole = isinstance(part, slice) and len(range(*part.indices(shape[axis]))) == shape[axis]
            many = isinstance(part, list) or (isinstance(part, Tensor) and part.dim() > 0)
            if not whole and axis in (by_index if many else by_place):
                return True
            axis += 1
    return False
