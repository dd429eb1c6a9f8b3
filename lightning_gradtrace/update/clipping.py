"""What clipping did to the gradients, measured rather than assumed.

Lightning clips by norm or by value, users override `configure_gradient_clipping`, and hooks change gradients as they
like. All of it is read off the gradients before and after (docs/concepts.md, 3: the factor c).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradtrace.capture.precision import double
from lightning_gradtrace.update.sharding import local

# Entries that are compared at a time on a CPU, so that what is compared stays in its cache.
_CHUNK = 1 << 16
# Two gradients are called proportional when they differ by less than this part of the larger, elementwise.
_PROPORTIONAL = {torch.float64: 1e-12, torch.float32: 2e-6}


def copy_gradient(gradient: Tensor) -> Tensor:
    """Return a dense copy of a gradient."""
    return dense(gradient).clone()


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient, detached: sparse ones (`nn.Embedding(sparse=True)`) written out, of spread ones the piece."""
    gradient = local(gradient).detach()
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def clip_factors(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float | Tensor | None]:
    """Return, for every parameter, the factor by which its gradient was changed.

    Args:
        before: gradients as the backward pass left them.
        after: gradients as the optimizer saw them, same shapes.

    Returns:
        For each parameter a number if the whole gradient was scaled; a tensor that broadcasts with it if each row,
        each column or (towards zero, as by value clipping or a mask) each entry was scaled; None if the change can't be
        told as factors: something was added.
    """
    factor = _common_factor(before, after)  # norm clipping gives all gradients one factor
    if factor is not None:
        return [factor] * len(before)
    return [_factor(b.detach(), a.detach()) for b, a in zip(before, after, strict=True)]


def projection(before: Tensor, after: Tensor) -> float:
    """Return the number c that brings ``c * before`` closest to ``after``: what is left is no sample's share."""
    before, after = double(before).flatten(), double(after).flatten()
    square = float(torch.dot(before, before))
    return float(torch.dot(before, after)) / square if square else 1.0


def _common_factor(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Return c if ``after = c * before`` for all of them up to rounding, None if there is no such number."""
    if len({(g.dtype, g.device) for g in (*before, *after)}) != 1:
        return None
    if _are_equal(before, after):
        return 1.0
    tolerance = _PROPORTIONAL.get(before[0].dtype, 1e-2)
    wide = torch.promote_types(before[0].dtype, torch.float32)
    flat = ([g.detach().flatten().to(wide) for g in gradients if g.numel()] for gradients in (before, after))
    pairs = list(zip(*flat, strict=True))
    squares = torch.stack([torch.stack([torch.dot(b, b), torch.dot(a, b)]) for b, a in pairs])
    square, cross = double(squares).sum(0).tolist()
    if not square:
        return None
    factor = cross / square
    difference, largest = _largest_difference(pairs, factor)
    return factor if difference <= tolerance * largest else None  # False if anything is not finite


def _are_equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    if before[0].device.type == "cpu":
        return all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    return bool(torch.stack([(b == a).all() for b, a in zip(before, after, strict=True)]).all())  # waits once


def _largest_difference(pairs: Sequence[tuple[Tensor, Tensor]], factor: float) -> tuple[float, float]:
    """Return the largest entry of ``|after - factor * before|`` and of ``|after|``, without a large temporary."""
    size = _CHUNK if pairs[0][0].device.type == "cpu" else max(len(b) for b, _ in pairs)
    spare = pairs[0][0].new_empty(size)
    found = []
    for pair in pairs:
        for b, a in zip(*(t.split(size) for t in pair), strict=True):
            found.append(torch.stack([*torch.sub(a, b, alpha=factor, out=spare[: len(b)]).aminmax(), *a.aminmax()]))
    difference, largest = torch.stack(found).abs().amax(0).view(2, 2).amax(1).tolist()
    return difference, largest


def _factor(before: Tensor, after: Tensor) -> float | Tensor | None:
    common = _common_factor([before], [after])
    if common is not None:
        return common
    tolerance = _PROPORTIONAL.get(before.dtype, 1e-2)
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    unknown = ((before == 0) & (after == 0)) | ~before.isfinite()
    ratio = torch.where(unknown, torch.ones_like(after), after / before)
    # Infinite where nothing became something; NaN where clipping made it so, and so it stays.
    if not bool(((ratio < 0) | (ratio > 1 + tolerance)).any()):
        return ratio
    for axis in range(before.dim()) if before.dim() > 1 else ():
        scaled = _factor_along(axis, before, after, tolerance)
        if scaled is not None:
            return scaled
    return None


def _factor_along(axis: int, before: Tensor, after: Tensor, tolerance: float) -> Tensor | None:
    """Return one factor for each place along an axis, of a shape that broadcasts, None if there are no such factors."""
    others = [other for other in range(before.dim()) if other != axis]
    square = before.square().sum(others, keepdim=True)
    factor = torch.where(square > 0, (before * after).sum(others, keepdim=True) / square, torch.ones_like(square))
    allowed = tolerance * after.abs().amax(others, keepdim=True)
    return factor if bool(((after - before * factor).abs() <= allowed).all()) else None
