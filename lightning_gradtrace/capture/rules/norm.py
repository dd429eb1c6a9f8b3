"""Normalisations whose statistics are taken within a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, register
from lightning_gradtrace.capture.shares import DenseShare, Share, accumulation_dtype


def _sum_to(tensor: Tensor, n_features: int) -> Tensor:
    """Sum over everything between the samples and the last ``n_features`` axes."""
    positions = tuple(range(1, tensor.dim() - n_features))
    return tensor.sum(positions) if positions else tensor


@register(
    torch.layer_norm,
    arguments="input normalized_shape weight bias eps cudnn_enable",
    input="input",
    parameters="weight bias",
    n_features=lambda arguments: len(arguments["normalized_shape"]),
)
def layer_norm(arguments: Arguments, input: Tensor, cotangent: Tensor, wanted: frozenset[str]) -> dict[str, Share]:
    """``g[i] = sum_t d[i, t] * xhat[i, t]`` for the weight and ``sum_t d[i, t]`` for the bias."""
    shape = tuple(arguments["normalized_shape"])
    dtype = accumulation_dtype(torch.promote_types(input.dtype, cotangent.dtype))
    cotangent = cotangent.to(dtype)
    shares: dict[str, Share] = {}
    if "weight" in wanted:
        normal = torch.nn.functional.layer_norm(input.to(dtype), shape, eps=arguments.get("eps", 1e-5))
        shares["weight"] = DenseShare(_sum_to(cotangent * normal, len(shape)))
    if "bias" in wanted:
        shares["bias"] = DenseShare(_sum_to(cotangent, len(shape)))
    return shares
