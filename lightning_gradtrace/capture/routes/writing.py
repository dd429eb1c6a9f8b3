"""Whose the entries of a tensor are after a function wrote into it: `out[rows] = part`, `scatter`, `index_add`.

Into a new tensor of zeros, or into one that holds the samples in the ordinary way, every sample should be written
where it belongs. Reading owners (`rows.py`) back from the places that were written shows whether it was. Tokens that
are written into the slots of an expert are not where the sizes say: the tensor is *lost* (`routing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.routes.rows import EMPTY, LOST, MIXED, Fate, Owners, Route, as_route, laid_out

_BY_ROWS = names_of("index_add_ index_add index_copy_ index_copy")
_BY_ENTRIES = names_of("scatter_ scatter scatter_add_ scatter_add scatter_reduce scatter_reduce_")
_BY_BRACKETS = names_of("__setitem__ index_put_ index_put")
_BY_MASK = names_of("masked_scatter_ masked_scatter")
WRITES = _BY_ROWS | _BY_ENTRIES | _BY_BRACKETS | _BY_MASK
# Names of the arguments after the target, by their place.
_NAMES = {1: ("dim", "mask", "indices"), 2: ("index", "source", "values"), 3: ("source", "src", "value")}


def value_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a function of `WRITES` writes."""
    return _argument(args, kwargs, 2 if name in _BY_BRACKETS | _BY_MASK else 3)


def written(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], of: Mapping[int, Tensor | Fate], n_samples: int
) -> Tensor | Fate:
    """Return the owners of the target after a function of `WRITES`.

    Args:
        name: name of the function.
        args: its positional arguments, the target first.
        kwargs: its named arguments.
        of: owners of the batched arguments, by identity.
        n_samples: number of samples.

    Returns:
        What the target had before if every sample was written where it belongs; the owners of what was written to a
        constant; or `Fate.LOST`.
    """
    target, own = args[0], of.get(id(args[0]), Fate.ORDINARY)
    value = value_of(name, args, kwargs)
    if not isinstance(value, Tensor) or id(value) not in of:
        return own
    theirs = of[id(value)]
    if own is Fate.LOST or theirs is Fate.LOST:
        return Fate.LOST
    before, new = _ways(own, target, n_samples), _ways(theirs, value, n_samples)
    if not before or not new:
        return own
    pairs = (_both(name, args, kwargs, one, other) for one in before for other in new)
    if value.numel() and any(torch.equal(there, here.expand(there.shape)) for there, here in pairs):
        return own
    if id(target) in of and own is Fate.ORDINARY and _leaves_some(name, args, n_samples):
        return own  # rows of samples, into which parts of others were put
    is_constant = id(target) not in of or (isinstance(own, Tensor) and bool((own == EMPTY).any()))
    if not is_constant or not isinstance(theirs, Tensor):
        return Fate.LOST
    return _laid_down(name, args, kwargs, own if isinstance(own, Tensor) else None, theirs)


def _leaves_some(name: str, args: Sequence[Any], n_samples: int) -> bool:
    """Say whether brackets write to no more than parts of the rows of every sample, wherever sizes allow these."""
    if name not in _BY_BRACKETS:
        return False
    target, index = args[:2]
    is_written = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
    is_written[index if name == "__setitem__" else tuple(index)] = True
    whole = [axis for axis in candidates(target.shape, n_samples) if axis.factor == "whole"]
    rest = [is_written.movedim(axis.axis, 0).flatten(1) for axis in whole if axis.axis < target.dim() - 1]
    return bool(rest) and not any(bool(rows.all(1).any()) for rows in rest)


def _laid_down(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], own: Tensor | None, theirs: Tensor
) -> Tensor | Fate:
    """Return the owners of a target that nobody owned where it was written to.

    Args:
        name: name of the function.
        args: its positional arguments.
        kwargs: its named arguments.
        own: owners of the target before; None of a constant.
        theirs: owners of what is written.
    """
    own = torch.full(args[0].shape, EMPTY, dtype=torch.int16, device=theirs.device) if own is None else own
    axis, index = 0, _argument(args, kwargs, 2)
    if name in _BY_BRACKETS:
        parts = _numbered(args[1])
        if parts is None:
            return Fate.LOST
        index = parts[0]
        for part, size in zip(parts[1:], own.shape[1:], strict=False):
            index = index * size + part
        flat, theirs = own.flatten(0, len(parts) - 1), theirs.expand(*index.shape, *own.shape[len(parts) :])
        index, theirs = index.flatten(), theirs.flatten(0, index.dim() - 1)
    elif name in _BY_ROWS | _BY_ENTRIES:
        flat, axis = own, _argument(args, kwargs, 1) % max(own.dim(), 1)
    else:
        return Fate.LOST
    if name not in _BY_ENTRIES:
        index = index.view([-1 if i == axis else 1 for i in range(flat.dim())]).expand(theirs.shape)
    theirs = theirs[tuple(slice(size) for size in index.shape)]
    lowest, highest = (flat.scatter_reduce(axis, index, theirs, how, include_self=False) for how in ("amin", "amax"))
    there = flat.gather(axis, index)
    if not bool(((there == EMPTY) | (there == theirs)).all()):
        return Fate.LOST
    return torch.where(lowest == highest, lowest, MIXED).view(own.shape)


def led(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], of: Callable[[Tensor], Route | None]) -> Route:
    """Return the route of a target into which a constant was written, where rows of samples tell.

    Args:
        name: name of the function, one of `WRITES`.
        args: its positional arguments, the target first.
        kwargs: its named arguments.
        of: returns the route of the index.
    """
    read, value = index_of(name, args, kwargs), value_of(name, args, kwargs)
    if read is None or not isinstance(value, Tensor) or value.dim() != args[0].dim():
        return LOST
    axis, index = read
    by = of(index)
    if by is None:
        return LOST
    sizes = [-1 if one == axis else 1 for one in range(value.dim())]
    found: dict[SampleAxis, Owners] = {}
    for place, owners in by.owners.items():
        found[place] = Fate.LOST
        if isinstance(owners, Tensor) and owners.dim() == index.dim() == 1 and value.shape[axis] == len(index):
            found[place] = _laid_down(name, args, kwargs, None, owners.view(sizes).expand(value.shape))
    return as_route(by.source, found, by.is_given, is_hit=True) or LOST


def _numbered(index: Any) -> list[Tensor] | None:
    """Return the numbers that brackets pick along the first axes, None if they hold anything else."""
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    if len(parts) == 1 and isinstance(parts[0], Tensor) and parts[0].dtype is torch.bool:
        parts = list(parts[0].nonzero(as_tuple=True))
    like = next((part for part in parts if isinstance(part, Tensor)), None)
    if like is not None:
        parts = [like.new_tensor(part) if type(part) is int and part >= 0 else part for part in parts]
    if like is None or not all(isinstance(part, Tensor) and part.dtype is torch.int64 for part in parts):
        return None
    return list(torch.broadcast_tensors(*parts))


def index_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, Tensor] | None:
    """Return the axis along which a function of `WRITES` writes, and where; None if that can't be read."""
    if name in _BY_BRACKETS:
        index = args[1][0] if isinstance(args[1], (tuple, list)) and len(args[1]) == 1 else args[1]
        return (0, index) if isinstance(index, Tensor) and index.dim() == 1 and index.dtype is torch.int64 else None
    axis, index = _argument(args, kwargs, 1), _argument(args, kwargs, 2)
    return (axis % max(args[0].dim(), 1), index) if name in _BY_ROWS | _BY_ENTRIES else None


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in _NAMES[place] if name in kwargs), None)


def _ways(owners: Tensor | Fate, tensor: Tensor, n_samples: int) -> list[Tensor]:
    if isinstance(owners, Tensor):
        return [owners]
    axes = candidates(tensor.shape, n_samples)
    if tensor.is_floating_point():  # the last axis holds features, as wide as the samples are many by chance
        axes = [axis for axis in axes if axis.axis < tensor.dim() - 1] or axes
    whole = [axis for axis in axes if axis.factor == "whole"]
    return [laid_out(axis, tensor, n_samples) for axis in whole or axes]


def _both(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the owners at the places that were written, before and as the value has them."""
    first, second = (_argument(args, kwargs, place) for place in (1, 2))
    if name in _BY_ROWS:
        return target.index_select(first, second), value
    if name in _BY_ENTRIES:
        return target.gather(first, second), value[tuple(slice(size) for size in second.shape)]
    if name in _BY_MASK:
        there = target.masked_select(first)
        return there, value.flatten()[: len(there)]
    return target[first if name == "__setitem__" else tuple(first)], value
