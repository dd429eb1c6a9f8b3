"""torch.optim.Muon: momentum whose singular values are all pulled towards one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.update._base import Split, UpdateRule, number, wide


class MuonRule(UpdateRule):
    """``dW = -rate NS(B) - lr w W`` with ``B = k c g + ...``; the Newton-Schulz map NS acts as one realised matrix.

    Each iteration multiplies from one side, ``X <- (a I + b G + c G^2) X`` with ``G = X X'``. Their product P depends
    on all samples; the split holds it fixed at its realised value, as Adam's denominators: ``NS(B) = P B`` is linear in
    the samples then, and shares, carry and decay add up. (The directional derivative of NS would not do: NS hardly
    depends on the length of B, so that its derivative along B itself, the sum of all shares, is about zero.)

    With nesterov ``B = (1 - m)(1 + m) c g + m^2 buf_prev``, else ``(1 - m) c g + m buf_prev``. The optimizer iterates
    in bfloat16 and pulls small singular values up several hundred times, and with them its own rounding errors: these
    belong to no sample, and the residual shows them. It is 1e-2 where B has no small singular values, and some tenths
    where B has nearly low rank (docs/concepts.md, 3). Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers
    in neural networks".
    """

    optimizers: ClassVar = (torch.optim.Muon,)
    carried: ClassVar = ("momentum_buffer",)
    elementwise: ClassVar = False
    caution: ClassVar = (
        "the orthogonalised step of `Muon` is not linear in the samples: it is divided by holding its matrix at the "
        "value of the step. Muon iterates in bfloat16, and what it makes of its own rounding errors belongs to no "
        "sample: expect a ledger `residual` of 1e-2 to some tenths"
    )
    tolerance: ClassVar = 0.7
    half_tolerance: ClassVar = 0.7

    @override
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        gradient: Tensor,
        before: Tensor | None,
    ) -> Split:
        momentum, buffer = number(group["momentum"]), state["momentum_buffer"].detach()
        nesterov = group["nesterov"]
        updated = gradient.detach().lerp(buffer, momentum) if nesterov else buffer
        matrix = newton_schulz_matrix(updated, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = _rate(number(group["lr"]), group["adjust_lr_fn"], gradient.shape)
        split = Split(gain=-rate * (1 - momentum) * (1 + momentum if nesterov else 1.0))
        matrix = matrix.to(wide(gradient).dtype)
        tall = gradient.shape[0] > gradient.shape[1]
        split.left, split.right = (None, matrix.T) if tall else (matrix, None)
        if before is not None:
            split.decay = wide(before) * (-number(group["lr"]) * number(group["weight_decay"]))
            if memory["momentum_buffer"] is not None:
                kept = wide(memory["momentum_buffer"]) * (-rate * momentum * (momentum if nesterov else 1.0))
                split.carry = kept @ matrix.T if tall else matrix @ kept
        return split


def newton_schulz_matrix(
    updated: Tensor,
    coefficients: tuple[float, float, float],
    n_steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the matrix P with ``NS(B) = P B``, or ``B P'`` if B has more rows than columns, as realised.

    The iterations are repeated as the optimizer makes them; their matrices are multiplied in at least float32.

    Args:
        updated: B, shape (out, in).
        coefficients: a, b, c of the iteration.
        n_steps: number of iterations.
        eps: smallest norm to divide by.
        dtype: in what the optimizer iterates.

    Returns:
        P, in at least float32, shape (n, n) with n the shorter side of B.
    """
    a, b, c = coefficients
    x = updated.to(dtype)
    x = x.T if x.shape[0] > x.shape[1] else x
    norm = x.norm().clamp(min=eps)
    x = x / norm
    wide_dtype = torch.promote_types(dtype, torch.float32)
    product = torch.eye(x.shape[0], device=x.device, dtype=wide_dtype) / norm
    for _ in range(n_steps):
        gram = x @ x.T
        gram_update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram_update, x, beta=a)
        product = a * product + gram_update.to(wide_dtype) @ product
    return product


def _rate(rate: float, adjust: str | None, shape: torch.Size) -> float:
    """Return the learning rate as adjusted to the shape of the weight."""
    rows, columns = shape
    if adjust in (None, "original"):
        return rate * max(1, rows / columns) ** 0.5
    return rate * 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else rate
