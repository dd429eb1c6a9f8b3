"""Losses that return a sum or a mean: their elements, in which samples have parts.

`mse_loss(p, y)` of a tracked `p` returns one number, and no axis of it holds the samples. It is a factor times the sum
of what ``reduction="none"`` returns; so such a use is taken for that of the elements, each with the cotangent of the
number times the factor (docs/concepts.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import facts, names_of

_NONE, _MEAN = 0, 1  # torch's numbers of reductions
_IGNORED = -100  # the class that torch leaves out by default
_OVER_CLASSES = names_of("cross_entropy_loss nll_loss_nd")
LOSSES = _OVER_CLASSES | names_of(
    "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits "
    "kl_div poisson_nll_loss hinge_embedding_loss margin_ranking_loss cosine_embedding_loss triplet_margin_loss "
    "multi_margin_loss multilabel_margin_loss"
)


@dataclass(frozen=True)
class Elements:
    """The elements of a loss that returned their sum or mean.

    Attributes:
        args: positional arguments of the call that returns the elements.
        kwargs: its named arguments.
        value: the elements.
        factor: what their sum is multiplied by.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Tensor
    factor: float | Tensor

    def spread(self) -> Callable[[Tensor], Tensor]:
        """Return the function that gives the cotangent of the elements for that of the loss."""
        factor, shape = self.factor, self.value.shape
        return lambda cotangent: (cotangent * factor).expand(shape)


def elements_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Elements | None:
    """Return the elements of a loss.

    Args:
        function: a torch function.
        args: its positional arguments.
        kwargs: its named arguments.

    Returns:
        None for other functions than losses and for losses that return elements.
    """
    name = facts(function).name
    if name not in LOSSES:
        return None
    names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    reduction, place = given.get("reduction", _MEAN), names.index("reduction")
    if reduction == _NONE:
        return None
    if place < len(args):
        args = (*args[:place], _NONE, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "reduction": _NONE}
    with torch.no_grad():
        value = function(*args, **kwargs)
        factor = _factor_of_mean(name, given, value) if reduction == _MEAN else 1.0
    return Elements(args, kwargs, value, factor)


def _factor_of_mean(name: str, given: Mapping[str, Any], value: Tensor) -> float | Tensor:
    """Return what the sum of the elements is multiplied by to give their mean, as torch defines it for each loss.

    Classes that are ignored don't count, others by their weights. Probabilities of the classes count alike.
    """
    target = given.get("target")
    if name not in _OVER_CLASSES or target is None or target.is_floating_point():
        return 1 / max(value.numel(), 1)
    counted = target != given.get("ignore_index", _IGNORED)
    weight = given.get("weight")
    n_counted = counted.sum() if weight is None else (weight[target.where(counted, 0)] * counted).sum()
    return value.new_ones(()) / n_counted
