"""`torch.nn.Bilinear`: ``y_o = x1^T W_o x2 + b_o``."""

from __future__ import annotations

import torch

from lightning_gradtrace.capture.rules._base import Call, Shares, register
from lightning_gradtrace.capture.rules.linear import sum_positions
from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share
from lightning_gradtrace.capture.shares.contraction import Contraction, OuterView


@register(
    torch.bilinear,
    arguments="input1 input2 weight bias",
    input="input1",
    parameters="weight bias",
    n_features=1,
)
def bilinear(call: Call) -> Shares:
    """``g[i][o, j, k] = sum_t d[i, t, o] x1[i, t, j] x2[i, t, k]``, ``sum_t d[i, t]`` for the bias."""
    shares: dict[str, Share] = {}
    if "weight" in call.wanted:
        second = call.cut(call.arguments["input2"])
        d, one, two = (t.reshape(call.n_samples, -1, t.shape[-1]) for t in (call.cotangent, call.input, second))
        n_positions, sizes = d.shape[1], (d.shape[2], one.shape[2], two.shape[2])
        if n_positions <= sizes[0]:  # the products of the inputs are no larger than the share
            products = (one.unsqueeze(-1) * two.unsqueeze(-2)).flatten(2)
            shares["weight"] = OuterView(OuterShare(d, products), sizes, (0, 1, 2))
        else:
            shares["weight"] = Contraction((d, one, two), ("to", "tj", "tk"), "ojk")
    if "bias" in call.wanted:
        shares["bias"] = DenseShare(sum_positions(call.cotangent))
    return shares
