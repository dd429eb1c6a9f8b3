"""What clipping did to the gradients, measured rather than assumed.

Lightning clips by norm or by value, users override `configure_gradient_clipping`, and callbacks change gradients as
they like. All of it is read off the gradients before and after (docs/concepts.md, 3: the factor c).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Two gradients are called proportional when they differ by less than this part of the larger, elementwise.
_PROPORTIONAL = {torch.float64: 1e-12, torch.float32: 2e-6}


def copy_gradients(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of gradients; those of one dtype and device lie in one block of memory, in order."""
    copies: dict[int, Tensor] = {}
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, gradient in enumerate(gradients):
        kinds.setdefault((gradient.dtype, gradient.device), []).append(i)
    for members in kinds.values():
        flat = torch.cat([gradients[i].detach().flatten() for i in members])
        for i, part in zip(members, flat.split([gradients[i].numel() for i in members]), strict=True):
            copies[i] = part.view(gradients[i].shape)
    return [copies[i] for i in range(len(gradients))]


def clip_factors(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float | Tensor]:
    """Return, for every parameter, the factor by which its gradient was changed.

    Args:
        before: gradients as the backward pass left them.
        after: gradients as the optimizer saw them, same shapes.

    Returns:
        For each parameter a number if the whole gradient was scaled, else a tensor of factors per entry: 1 where the
        entry is unchanged and where a change can't be expressed as a factor (from 0 to something: the ledger's
        residual shows it).
    """
    if before and len({(g.dtype, g.device) for g in (*before, *after)}) == 1:
        # Norm clipping gives all gradients one factor; finding that in one go costs a tenth of going one by one.
        factor = _common_factor(torch.cat([g.flatten() for g in before]), torch.cat([g.flatten() for g in after]))
        if factor is not None:
            return [factor] * len(before)
    return [_factor(b.detach(), a.detach()) for b, a in zip(before, after, strict=True)]


def _common_factor(before: Tensor, after: Tensor) -> float | None:
    """Return c if ``after = c * before`` up to rounding, None if there is no such number."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    tolerance = _PROPORTIONAL.get(before.dtype, 1e-2)
    before, after = before.detach().to(dtype), after.detach().to(dtype)
    square = float(torch.dot(before, before))
    if not square:
        return 1.0 if not bool(after.any()) else None
    factor = float(torch.dot(after, before)) / square
    difference = float(torch.sub(after, before, alpha=factor).abs_().max())
    largest = float(after.abs().max())
    return factor if difference <= tolerance * largest else None  # False if anything is not finite


def _factor(before: Tensor, after: Tensor) -> float | Tensor:
    common = _common_factor(before.flatten(), after.flatten())
    if common is not None:
        return common
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    unchanged = (after == before) | (after.isnan() & before.isnan()) | (before == 0)
    return torch.where(unchanged, torch.ones_like(after), after / before)
