"""Where the cotangent of a result arrives, whatever is written into the result later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_BATCHED = torch._C._dispatch_key_parse("Batched")
Hook = Callable[[Tensor | None], None]


def arriving(result: Tensor, hook: Hook, arguments: Iterable[Any], in_place: bool) -> tuple[Tensor, Hook]:
    """Return the tensor that a hook is to be put on, to receive the cotangent of a result, and the hook for it.

    That is the result itself, unless it is a view: `nn.Linear` with a bias returns one of what it computes of three
    axes. What is written into a view later (``nn.ReLU(inplace=True)``) makes it one of another history, and no gradient
    passes the view as it was. All gradients pass the tensor that it is a view of.

    Args:
        result: a result that needs a gradient, as the function returned it.
        hook: receives the cotangent of the result; None if nothing came to this one of several results.
        arguments: lineages and operands; with a view of one of them nothing is done.
        in_place: whether the result is what the function wrote into.
    """
    base = result._base
    if base is None or not base.requires_grad or not base.is_contiguous() or _kind(base) != _kind(result):
        return result, hook
    if any(size > 1 and not stride for size, stride in zip(result.shape, result.stride(), strict=True)):
        return result, hook  # expanded
    place = result.untyped_storage().data_ptr()
    given = (argument.tensor for argument in arguments if hasattr(argument, "tensor"))
    if not in_place and any(t.untyped_storage().data_ptr() == place for t in given if not t.is_sparse):
        return result, hook
    shape, strides, offset = result.shape, result.stride(), result.storage_offset() - base.storage_offset()

    def arrives(cotangent: Tensor | None) -> None:
        if cotangent is None or is_vectorised(cotangent):
            return hook(cotangent)
        cotangent = cotangent.contiguous()
        return hook(cotangent.as_strided(shape, strides, cotangent.storage_offset() + offset))

    return base, arrives


def is_vectorised(cotangent: Tensor) -> bool:
    """Say whether a cotangent stands for those of many backward passes at once."""
    return torch._C._dispatch_keys(cotangent).has(_BATCHED)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Return what entries are; those of a complex tensor may be seen as real ones, or as conjugated."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()
