"""Are tensors of two runs equal up to rounding, or equal with their samples in another order?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates

# Entries that are as large, and so many times larger than most, tell nothing of the rounding of others.
_LARGE, _FAR_LARGER = 1e3, 1e4
# An error so many times larger than another is no rounding, if it is so many units of rounding.
_CLEARLY, _ROUNDING = 100, 64


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal."""
    return a.shape == b.shape and bool(close(a, b).all())


def close(a: Tensor, b: Tensor) -> Tensor:
    """Compare entry by entry, up to the rounding that another order of samples brings.

    The largest entry tells how large it is; one that is far larger than usual, as in a mask, only that of its own.
    """
    if not (b.is_floating_point() or b.is_complex()) or not b.numel():
        return a == b
    sizes = b.abs()
    some = sizes[(sizes > 0) & sizes.isfinite()].float()
    usual = some[some <= (_FAR_LARGER * some.median()).clamp(min=_LARGE)].amax() if some.numel() else some.new_zeros(())
    rounding = (1e-4 if b.element_size() >= 4 else 3e-2) * torch.where(sizes > usual, sizes, usual.to(sizes.dtype))
    return (a == b) | (((a - b).abs() <= rounding) & sizes.isfinite())


def is_permuted(before: Tensor, after: Tensor, order: Tensor) -> bool:
    """Say whether a tensor is another one with its samples in an order, wherever sizes allow them."""
    order = order.to(before.device)
    ways = candidates(before.shape, len(order))
    return before.shape == after.shape and any(same(way.permute(before, order), after) for way in ways)


def closest(ways: Sequence[SampleAxis], before: Tensor, after: Tensor, order: Tensor) -> list[SampleAxis]:
    """Of several places along which a tensor is permuted keep those where it is so up to the least error.

    Where attention is nearly even all positions are nearly the same, in any order. Rounding is not told from rounding.
    """
    if len(ways) < 2 or not after.is_floating_point():
        return list(ways)
    errors = [_error(way.permute(before, order.to(before.device)), after) for way in ways]
    return [way for way, error in zip(ways, errors, strict=True) if not _clearly_more(error, min(errors), after)]


def moves(way: SampleAxis, before: Tensor, after: Tensor, order: Tensor) -> bool:
    """Say whether a tensor that hardly changed is clearly closer to itself with its samples in an order."""
    if not after.is_floating_point():
        return False
    return _clearly_more(_error(before, after), _error(way.permute(before, order.to(before.device)), after), after)


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().nan_to_num(0.0).amax()) if one.numel() else 0.0


def _clearly_more(error: float, least: float, of: Tensor) -> bool:
    largest = float(of.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0).amax()) if of.numel() else 0.0
    return error > max(_CLEARLY * least, _ROUNDING * torch.finfo(of.dtype).eps * largest)


def stays_or_moves(before: Tensor, after: Tensor, order: Tensor) -> bool:
    """Say whether every entry of a tensor is as it was, or as it is with its samples in an order."""
    order = order.to(before.device)
    ways, stays = candidates(before.shape, len(order)), close(before, after)
    return bool(stays.all()) or any(bool((stays | close(way.permute(before, order), after)).all()) for way in ways)


def both(before: Tensor, after: Tensor, order: Tensor) -> Iterator[SampleAxis]:
    """Yield the first of any two axes along both of which a tensor is permuted: samples against samples."""
    order = order.to(before.device)
    whole = [way for way in candidates(before.shape, len(order)) if way.factor == "whole"]
    for one, other in itertools.combinations(whole, 2):
        if same(other.permute(one.permute(before, order), order), after):
            yield one
