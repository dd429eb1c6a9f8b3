"""Whose the entries of a product of two tensors are: tokens that a table of zeros and ones sends to experts and back.

An entry of the product is a sum of terms, and has an owner if all terms that are not zero have the same one. So a table
that sends every token to a slot of its own tells whose the slots are, and its zeros tell that the slots of others don't
come back to a token. A slot that nobody is sent to is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.routes.mixing import terms_of
from lightning_gradtrace.capture.routes.picking import Call
from lightning_gradtrace.capture.routes.rows import EMPTY, Fate, Owners, Route, as_route, constant, laid_out, of_rows

_MOST = torch.iinfo(torch.int16).max


def multiplied(call: Call, of: Mapping[int, Tensor | Fate], n_samples: int) -> Tensor | Fate:
    """Return the owners of a product, lost where terms of several samples meet in an entry.

    Args:
        call: a call of one of `mixing.PRODUCTS`.
        of: the owners of its batched factors, by identity; those of no other are asked for.
        n_samples: number of samples.
    """
    read = terms_of(call.name, call.args, call.kwargs)
    if read is None or len(read[0]) != 2 or len(set(read[1])) < len(read[1]):
        return Fate.LOST
    factors, kept = read
    batched = [(t, term, of.get(id(t), Fate.ORDINARY)) for t, term in factors if any(t is one for one in call.batched)]
    known = [(own, term) for _, term, own in batched if isinstance(own, Tensor)]
    ordinary = [(t, term) for t, term, own in batched if own is Fate.ORDINARY and candidates(t.shape, n_samples)]
    if not known or any(own is Fate.LOST for _, _, own in batched):
        return Fate.LOST
    owners = _met(known, factors, kept)
    if owners is None or not all(_agrees(owners, kept, t, term, n_samples) for t, term in ordinary):
        return Fate.LOST
    return owners


def sent(call: Call, n_samples: int) -> Route | None:
    """Return the route of rows that a table sends elsewhere; None for any other product.

    Args:
        call: a call of one of `mixing.PRODUCTS` whose factors hold the samples along an axis that is summed over.
        n_samples: number of samples.
    """
    read = terms_of(call.name, call.args, call.kwargs)
    if read is None or len(read[0]) != 2:
        return None
    (rows, term), (table, places) = sorted(read[0], key=lambda factor: _n_zeros(factor[0]) / factor[0].numel())
    if 2 * _n_zeros(table) < table.numel():
        return None
    route = of_rows(rows, n_samples)
    found: dict[SampleAxis, Owners] = {}
    for way, own in route.owners.items() if route is not None else ():
        found[way] = Fate.LOST
        if isinstance(own, Tensor) and term[way.axis] in places:
            there = replace(way, axis=places.index(term[way.axis]))
            met = _met([(own, term), (laid_out(there, table, n_samples), places)], *read)
            found[way] = Fate.LOST if met is None else met
    return as_route(rows.detach(), found, is_given=False, is_hit=True) if found else None


def _met(known: Sequence[tuple[Tensor, str]], factors: Sequence[tuple[Tensor, str]], kept: str) -> Tensor | None:
    """Return the owners of a product, of its shape; None if those of some entry differ.

    Args:
        known: owners of factors, each with the letters of its axes.
        factors: the factors, likewise.
        kept: letters of the axes of the product.
    """
    sizes = {a: size for t, term in factors for a, size in zip(term, t.shape, strict=True)}
    letters = kept + "".join(a for a in sizes if a not in kept)
    summed = list(range(len(kept), len(letters)))
    found = [_aligned(_brief(owners), term, letters) for owners, term in known]
    lowest, highest = found[0], found[0]
    for owners in found[1:]:
        lowest, highest = torch.minimum(lowest, owners), torch.maximum(highest, owners)
    if any(lowest.shape[axis] > 1 for axis in summed):
        table, term = max(factors, key=lambda factor: _n_zeros(factor[0]))
        is_zero = _aligned(table == 0, term, letters)
        lowest, highest = torch.where(is_zero, _MOST, lowest), torch.where(is_zero, -_MOST, highest)
    if summed:
        lowest, highest = lowest.amin(summed), highest.amax(summed)
    empty = highest == -_MOST
    if bool(((lowest != highest) & ~empty).any()):
        return None
    return torch.where(empty, EMPTY, lowest).to(torch.int16).expand([sizes[a] for a in kept])


def _agrees(owners: Tensor, kept: str, factor: Tensor, term: str, n_samples: int) -> bool:
    """Say whether a factor may hold the samples along an axis so that they are the owners of the product, too."""
    for way in candidates(factor.shape, n_samples):
        letter = term[way.axis]
        if letter in kept:
            laid = laid_out(replace(way, axis=kept.index(letter)), owners, n_samples)
            if bool(((owners == EMPTY) | (owners == laid)).all()):
                return True
    return False


def _aligned(tensor: Tensor, term: str, letters: str) -> Tensor:
    """Return a tensor with one axis for each of some letters, of size 1 where it has none."""
    ordered = tensor.permute([term.index(a) for a in letters if a in term])
    return ordered[tuple(slice(None) if a in term else None for a in letters)]


def _brief(owners: Tensor) -> Tensor:
    for axis in range(owners.dim()):
        if owners.shape[axis] > 1 and constant(owners, axis):
            owners = owners.narrow(axis, 0, 1)
    return owners


def _n_zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())
