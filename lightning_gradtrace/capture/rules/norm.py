"""Normalisations: ``y = xhat w + b`` with statistics taken within a sample or, in batch norm, over all of them.

The share of the weight is ``sum of d[i] * xhat[i]`` over all axes but the weight's, that of the bias ``sum of d[i]``.
In batch norm ``xhat[i]`` depends on the other samples: the shares still add up to the gradient exactly, but are not
those of a model that sees sample i alone (docs/concepts.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, Call, Shares, register
from lightning_gradtrace.capture.rules._broadcast import sum_to
from lightning_gradtrace.capture.shares import DenseShare, Share, accumulation_dtype


def _scale_and_shift(call: Call, shape: tuple[int, ...], normal: Callable[[Tensor], Tensor]) -> Shares:
    """Return the shares of weight and bias.

    Args:
        call: the use.
        shape: shape of weight and bias as they are broadcast to the output.
        normal: normalises the whole input.
    """
    x = call.arguments["input"]
    dtype = accumulation_dtype(torch.promote_types(x.dtype, call.cotangent.dtype))
    cotangent = call.cotangent.to(dtype)
    values: dict[str, Tensor] = {}
    if "weight" in call.wanted:
        values["weight"] = cotangent * call.cut(normal(x.to(dtype)))
    if "bias" in call.wanted:
        values["bias"] = cotangent
    shares: dict[str, Share] = {}
    for name, value in values.items():
        share = sum_to(call, value, call.arguments[name].reshape(shape))
        if share is None:
            return None
        shares[name] = DenseShare(share.values.reshape(call.n_samples, *call.arguments[name].shape))
    return shares


def _per_channel(arguments: Arguments) -> tuple[int, ...]:
    x = arguments["input"]
    return (1, x.shape[1], *[1] * (x.dim() - 2))


def _all_but_channels(arguments: Arguments, name: str) -> Mapping[int, int]:
    return {axis: axis for axis in range(arguments[name].dim()) if axis != 1}


def _first(arguments: Arguments, name: str) -> Mapping[int, int]:
    return {0: 0}


@register(
    torch.layer_norm,
    arguments="input normalized_shape weight bias eps cudnn_enable",
    input="input",
    parameters="weight bias",
    n_features=lambda arguments: len(arguments["normalized_shape"]),
)
def layer_norm(call: Call) -> Shares:
    """``xhat = (a - mean) / sqrt(var + eps)`` over the last axes."""
    shape, eps = tuple(call.arguments["normalized_shape"]), call.arguments.get("eps", 1e-5)
    return _scale_and_shift(call, shape, lambda x: torch.layer_norm(x, shape, eps=eps))


@register(
    torch.rms_norm,
    arguments="input normalized_shape weight eps",
    input="input",
    parameters="weight",
    n_features=lambda arguments: len(arguments["normalized_shape"]),
)
def rms_norm(call: Call) -> Shares:
    """``xhat = a / rms(a)`` over the last axes."""
    shape, eps = tuple(call.arguments["normalized_shape"]), call.arguments.get("eps")
    if eps is None:  # torch takes that of the dtype in which it computes
        eps = torch.finfo(accumulation_dtype(call.arguments["input"].dtype)).eps
    return _scale_and_shift(call, shape, lambda x: torch.rms_norm(x, shape, eps=eps))


@register(
    torch.group_norm,
    arguments="input num_groups weight bias eps cudnn_enabled",
    input="input",
    parameters="weight bias",
    axes=_first,
)
def group_norm(call: Call) -> Shares:
    """Mean and variance over a group of channels and all positions of a sample."""
    groups, eps = call.arguments["num_groups"], call.arguments.get("eps", 1e-5)
    return _scale_and_shift(call, _per_channel(call.arguments), lambda x: torch.group_norm(x, groups, eps=eps))


@register(
    torch.instance_norm,
    arguments="input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    input="input",
    parameters="weight bias",
    reads="input",
    axes=_first,
)
def instance_norm(call: Call) -> Shares:
    """Mean and variance over the positions of one channel of a sample, or the running ones."""
    if call.arguments["use_input_stats"]:
        eps = call.arguments["eps"]
        return _scale_and_shift(
            call,
            _per_channel(call.arguments),
            lambda x: torch.instance_norm(x, None, None, None, None, True, 0.0, eps, False),
        )
    return _scale_and_shift(call, _per_channel(call.arguments), lambda x: _by_running_statistics(call, x))


@register(
    torch.batch_norm,
    arguments="input weight bias running_mean running_var training momentum eps cudnn_enabled",
    input="input",
    parameters="weight bias",
    reads="input",
    axes=_all_but_channels,
)
def batch_norm(call: Call) -> Shares:
    """Mean and variance over samples and positions of the batch, or the running ones in evaluation mode."""
    if call.arguments["training"]:
        eps = call.arguments["eps"]
        return _scale_and_shift(
            call,
            _per_channel(call.arguments),
            lambda x: torch.batch_norm(x, None, None, None, None, True, 0.0, eps, False),
        )
    return _scale_and_shift(call, _per_channel(call.arguments), lambda x: _by_running_statistics(call, x))


def _by_running_statistics(call: Call, x: Tensor) -> Tensor:
    mean, var = call.arguments["running_mean"], call.arguments["running_var"]
    return torch.batch_norm(x, None, None, mean.to(x.dtype), var.to(x.dtype), False, 0.0, call.arguments["eps"], False)
