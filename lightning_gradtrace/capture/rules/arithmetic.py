"""Sums, products and choices of a parameter and a tensor: position tables, scales, class tokens, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, Call, ShareFunction, Shares, register
from lightning_gradtrace.capture.rules._broadcast import sum_to
from lightning_gradtrace.capture.shares import accumulation_dtype


def _stretched(arguments: Arguments) -> torch.Size:
    """Return the shape of the output: that of all tensors, broadcast."""
    return torch.broadcast_shapes(*(a.shape for a in arguments.values() if isinstance(a, Tensor)))


def broadcast_axes(arguments: Arguments, name: str) -> Mapping[int, int]:
    """Return the axes of an argument that keep their size in the output, with their number there."""
    shape, sizes = _stretched(arguments), arguments[name].shape
    ahead = len(shape) - len(sizes)
    return {axis: axis + ahead for axis, size in enumerate(sizes) if size == shape[axis + ahead]}


def _elementwise(
    *names: str, arguments: str = "input other", reads: str = "input other"
) -> Callable[[ShareFunction], ShareFunction]:
    """Register the rule of an elementwise function under all of its names, as a function and as a method."""
    functions = [getattr(owner, name) for name in names for owner in (torch, torch.Tensor) if hasattr(owner, name)]
    return register(
        *functions,
        arguments=arguments,
        input="input other",
        parameters="input other",
        reads=reads,
        axes=broadcast_axes,
    )


def _sums(call: Call, **values: Callable[[], Tensor]) -> Shares:
    """Sum the values of every wanted parameter to its shape."""
    shares = {name: sum_to(call, values[name](), call.arguments[name]) for name in call.wanted}
    return None if None in shares.values() else {name: share for name, share in shares.items() if share is not None}


def _other_operand(call: Call) -> Tensor:
    """Return the operand that is no parameter, stretched to the output's shape, samples first."""
    return call.cut(call.arguments[call.source].expand(_stretched(call.arguments)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


@_elementwise("add", "add_", arguments="input other alpha", reads="")
def add(call: Call) -> Shares:
    """``y = a + alpha w``: ``g[i] = alpha d[i]``, summed to the shape of the parameter."""
    d, alpha = call.cotangent, call.arguments.get("alpha", 1)
    return _sums(call, input=lambda: d, other=lambda: d if alpha == 1 else d * alpha)


@_elementwise("sub", "sub_", "subtract", "subtract_", arguments="input other alpha", reads="")
def sub(call: Call) -> Shares:
    """``y = a - alpha w``."""
    d, alpha = call.cotangent, call.arguments.get("alpha", 1)
    return _sums(call, input=lambda: d, other=lambda: d * -alpha)


@_elementwise("rsub", arguments="input other alpha", reads="")
def rsub(call: Call) -> Shares:
    """``y = w - alpha a``, in this order of arguments: (a, w)."""
    d, alpha = call.cotangent, call.arguments.get("alpha", 1)
    return _sums(call, input=lambda: d * -alpha, other=lambda: d)


@_elementwise("mul", "mul_", "multiply", "multiply_")
def mul(call: Call) -> Shares:
    """``y = a w``: ``g[i] = d[i] a[i]``, summed to the shape of the parameter."""
    product = _wide(call.cotangent) * _other_operand(call)
    return _sums(call, input=lambda: product, other=lambda: product)


@_elementwise(
    *("div", "div_", "divide", "divide_", "true_divide", "true_divide_"), arguments="input other rounding_mode"
)
def div(call: Call) -> Shares:
    """``y = a / w``: ``g[i] = -d[i] a[i] / w^2``; ``y = w / a``: ``g[i] = d[i] / a[i]``."""
    if call.arguments.get("rounding_mode") is not None:
        return None
    d, below, shape = _wide(call.cotangent), _wide(call.arguments["other"].detach()), _stretched(call.arguments)
    return _sums(  # inverse numbers are cut, because zeros fill up the rows of the shorter samples
        call,
        input=lambda: d * call.cut(below.reciprocal().expand(shape)),
        other=lambda: -d * _other_operand(call) * call.cut(below.square().reciprocal().expand(shape)),
    )


@register(
    torch.Tensor.where,
    arguments="input condition other",
    input="input other condition",
    parameters="input other",
    reads="condition",
    axes=broadcast_axes,
)
@register(
    torch.where,
    arguments="condition input other",
    input="input other condition",
    parameters="input other",
    reads="condition",
    axes=broadcast_axes,
)
def where(call: Call) -> Shares:
    """``y = w where the condition holds, else a``: ``g[i] = d[i]`` where the parameter was chosen."""
    chosen = call.cut(call.arguments["condition"].expand(_stretched(call.arguments)))
    d = call.cotangent
    return _sums(call, input=lambda: d.masked_fill(~chosen, 0), other=lambda: d.masked_fill(chosen, 0))
