"""Activations with parameters."""

from __future__ import annotations

import torch

from lightning_gradtrace.capture.rules._base import Call, Shares, register
from lightning_gradtrace.capture.rules._broadcast import sum_to
from lightning_gradtrace.capture.shares import DenseShare


@register(torch.prelu, arguments="input weight", input="input", parameters="weight")
def prelu(call: Call) -> Shares:
    """``y = max(a, 0) + w min(a, 0)``: ``g[i] = sum of d[i] min(a[i], 0)`` over all axes but the channels, axis 1."""
    weight, n_axes = call.arguments["weight"], call.arguments["input"].dim()
    values = call.cotangent * call.input.clamp(max=0)
    channels = min(1, n_axes - 1)
    shape = [weight.numel() if axis == channels else 1 for axis in range(n_axes)]
    share = sum_to(call, values, weight.reshape(shape))
    return None if share is None else {"weight": DenseShare(share.values.reshape(call.n_samples, *weight.shape))}
