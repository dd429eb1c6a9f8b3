"""Matrix products with a parameter on either side; `torch.addmm` is the layer of Hugging Face's Conv1D."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, Axes, Call, Shares, register
from lightning_gradtrace.capture.rules._broadcast import sum_to
from lightning_gradtrace.capture.rules._contract import Equation, contract, shared_axes


def letters(first: Tensor, second: Tensor) -> Equation:
    """Return the letters of ``first @ second``: of the first, the second and the product."""
    batch = "abcdefgh"[: max(first.dim(), second.dim(), 2) - 2]
    one = "j" if first.dim() == 1 else batch[len(batch) - first.dim() + 2 :] + "ij"
    two = "j" if second.dim() == 1 else batch[len(batch) - second.dim() + 2 :] + "jk"
    return one, two, batch + ("i" if first.dim() > 1 else "") + ("k" if second.dim() > 1 else "")


def _axes_of(first: str, second: str) -> Axes:
    def axes(arguments: Arguments, name: str) -> Mapping[int, int]:
        one, two, product = letters(arguments[first], arguments[second])
        return shared_axes(one if name == first else two, product)

    return axes


def _product(call: Call, first: str, second: str, scale: float = 1.0) -> Shares:
    """Return the share of the factor that is a parameter, if one is wanted."""
    one, two, product = letters(call.arguments[first], call.arguments[second])
    if call.source == first:
        name, equation = second, (two, one, product)
    else:
        name, equation = first, (one, two, product)
    if name not in call.wanted:
        return {}
    share = contract(call, call.arguments[name], equation, scale)
    return None if share is None else {name: share}


@register(
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.linalg.matmul,
    arguments="input other",
    input="input other",
    parameters="input other",
    axes=_axes_of("input", "other"),
)
def matmul(call: Call) -> Shares:
    """``y = a W``: ``g[i] = a[i]^T d[i]``; ``y = W a``: ``g[i] = d[i] a[i]^T``."""
    return _product(call, "input", "other")


@register(
    torch.mv, torch.Tensor.mv, arguments="input vec", input="input", parameters="vec", axes=_axes_of("input", "vec")
)
def mv(call: Call) -> Shares:
    """``y = a w``: ``g[i] = sum over the sample's rows of d a``."""
    return _product(call, "input", "vec")


@register(
    torch.addmm,
    torch.Tensor.addmm,
    arguments="input mat1 mat2 beta alpha",
    input="mat1 mat2",
    parameters="input mat1 mat2",
    reads="mat1 mat2",
    axes=_axes_of("mat1", "mat2"),
)
def addmm(call: Call) -> Shares:
    """``y = beta b + alpha a W``: the product's share times alpha, the summand's ``beta sum_t d[i, t]``."""
    return _with_summand(call, "mat1", "mat2")


@register(
    torch.baddbmm,
    torch.Tensor.baddbmm,
    arguments="input batch1 batch2 beta alpha",
    input="batch1 batch2",
    parameters="input batch1 batch2",
    reads="batch1 batch2",
    axes=_axes_of("batch1", "batch2"),
)
def baddbmm(call: Call) -> Shares:
    """`addmm` for a batch of matrices."""
    return _with_summand(call, "batch1", "batch2")


@register(
    torch.addmv,
    torch.Tensor.addmv,
    arguments="input mat vec beta alpha",
    input="mat",
    parameters="input vec",
    reads="mat",
    axes=_axes_of("mat", "vec"),
)
def addmv(call: Call) -> Shares:
    """``y = beta b + alpha a w``."""
    return _with_summand(call, "mat", "vec")


def _with_summand(call: Call, first: str, second: str) -> Shares:
    shares = _product(call, first, second, call.arguments.get("alpha", 1))
    if shares is not None and "input" in call.wanted:
        summand = sum_to(call, call.cotangent * call.arguments.get("beta", 1), call.arguments["input"])
        if summand is None:
            return None
        shares["input"] = summand
    return shares
