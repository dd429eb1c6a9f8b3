"""Linear uses: ``y = x W^T + b`` with any leading axes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Call, Shares, register
from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share, accumulation_dtype


def sum_positions(cotangent: Tensor) -> Tensor:
    """Sum a cotangent over everything between samples and features, shape (sample, features)."""
    positions = tuple(range(1, cotangent.dim() - 1))
    if not positions:
        return cotangent
    return cotangent.sum(positions, dtype=accumulation_dtype(cotangent.dtype))


@register(
    torch.nn.functional.linear, arguments="input weight bias", input="input", parameters="weight bias", n_features=1
)
def linear(call: Call) -> Shares:
    """``g[i] = d[i]^T a[i]`` for the weight, ``sum_t d[i, t]`` for the bias (docs/concepts.md, 2)."""
    shares: dict[str, Share] = {}
    if call.arguments["weight"].dim() != 2:
        return None
    if "weight" in call.wanted:
        n, out, features = call.n_samples, call.cotangent.shape[-1], call.input.shape[-1]
        shares["weight"] = OuterShare(call.cotangent.reshape(n, -1, out), call.input.reshape(n, -1, features))
    if "bias" in call.wanted:
        shares["bias"] = DenseShare(sum_positions(call.cotangent))
    return shares
