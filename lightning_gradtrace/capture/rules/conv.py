"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, Call, Shares, register
from lightning_gradtrace.capture.rules._broadcast import sum_to
from lightning_gradtrace.capture.shares import DenseShare, Share
from lightning_gradtrace.capture.shares.convolution import ConvolutionShare, pad


def _batched(arguments: Arguments, name: str) -> Mapping[int, int]:
    """Say that axis 0 holds the samples; an input without that axis has none to tell."""
    return {0: 0} if arguments[name].dim() == arguments["weight"].dim() else {}


def _numbers(value: Any, n: int) -> tuple[int, ...]:
    """Return one number per spatial axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * n if len(values) == 1 else values


@register(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    arguments="input weight bias stride padding dilation groups",
    input="input",
    parameters="weight bias",
    axes=_batched,
)
def conv(call: Call) -> Shares:
    """``g[i][o, c, k] = sum_p d[i, o, p] a[i, c, stride p + dilation k]``, ``sum_p d[i, o, p]`` for the bias."""
    weight = call.arguments["weight"]
    kernel = weight.shape[2:]
    stride, dilation = (_numbers(call.arguments.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padding = call.arguments.get("padding", 0)
    if padding == "same":  # where it doesn't divide evenly torch pads more at the end
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    elif padding == "valid":
        before = (0,) * len(kernel)
    else:
        before = _numbers(padding, len(kernel))
    return _shares(call, call.cotangent, call.input, stride, before, dilation)


@register(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    input="input",
    parameters="weight bias",
    axes=_batched,
)
def conv_transpose(call: Call) -> Shares:
    """The transposed convolution is the adjoint: the share is that of `conv` with input and cotangent exchanged."""
    n = call.arguments["weight"].dim() - 2
    stride, padding, dilation = (
        _numbers(call.arguments.get(name, default), n)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    return _shares(call, call.input, call.cotangent, stride, padding, dilation)


def _shares(
    call: Call, left: Tensor, right: Tensor, stride: tuple[int, ...], before: tuple[int, ...], dilation: tuple[int, ...]
) -> Shares:
    """Return the shares; ``left`` has the places of the windows, ``right`` is what the windows see."""
    weight, groups = call.arguments["weight"], call.arguments.get("groups", 1)
    shares: dict[str, Share] = {}
    if "weight" in call.wanted:
        if call.axis.factor == "whole":
            left, right = left.unsqueeze(1), right.unsqueeze(1)
        kernel = tuple(weight.shape[2:])
        padded = pad(right.flatten(0, 1), kernel, stride, before, dilation, left.shape[3:])
        padded = padded.unflatten(0, right.shape[:2])
        shares["weight"] = ConvolutionShare(left, padded, kernel, stride, dilation, groups).compact()
    if "bias" in call.wanted:
        bias = call.arguments["bias"]
        share = sum_to(call, call.cotangent, bias.view(-1, *[1] * (weight.dim() - 2)))
        assert share is not None  # axis 0 holds the samples, and a bias has no entries along it
        shares["bias"] = DenseShare(share.values.reshape(call.n_samples, -1))
    return shares
