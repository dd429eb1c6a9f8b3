"""Ways to set weights to zero for a while."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING

from lightning_gradtrace.analysis import _access

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def zero_ablation(model: nn.Module, param: str, neuron: int, axis: str = "in") -> Iterator[None]:
    """Set one column or row of a weight to zero inside a `with` block.

    Afterwards, also after an exception, the weight is what it was, bit for bit. Nothing else is touched: no bias, no
    gradient, no training mode. A tied weight is ablated in all its uses.

    Args:
        model: the model.
        param: name in `model.named_parameters()`, shape (out, in).
        neuron: column (`axis="in"`) or row (`axis="out"`).
        axis: "in" or "out".

    Raises:
        ValueError: the model has no such parameter, or it is not a matrix with such a column or row.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with zero_ablation(model, "weight", 1):
        ...     model.weight[0, 1].item()
        0.0
    """
    _access.check_axis(axis)
    weight = named_parameter(model, param)
    if weight.ndim != 2:
        raise ValueError(f"`{param}` has shape {tuple(weight.shape)}; only parameters of shape (out, in) have neurons")
    size = weight.shape[1] if axis == "in" else weight.shape[0]
    if not isinstance(neuron, Integral) or not 0 <= neuron < size:
        what = "columns" if axis == "in" else "rows"
        raise ValueError(f"`{param}` of this model has {size} {what} (0 to {size - 1}), but `neuron` is {neuron!r}")
    with zeroed(model, [(param, (slice(None), neuron) if axis == "in" else (neuron,))]):
        yield


@contextmanager
def zeroed(model: nn.Module, parts: Sequence[tuple[str, tuple[slice | int, ...]]]) -> Iterator[None]:
    """Set parts of weights to zero inside a `with` block and put them back, bit for bit.

    Args:
        model: the model.
        parts: names of parameters and indices into them, as in `Switch.parts`.
    """
    import torch

    kept = []
    try:
        with torch.no_grad():
            for name, index in parts:
                part = named_parameter(model, name).detach()[index]
                kept.append((part, part.clone()))
                part.zero_()
        yield
    finally:
        with torch.no_grad():
            for part, values in reversed(kept):
                part.copy_(values)


def named_parameter(model: nn.Module, param: str) -> Tensor:
    """Return a parameter by its name in `model.named_parameters()`, tied ones under each of their names.

    Raises:
        ValueError: the model has none of this name.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    if param not in names:
        near = difflib.get_close_matches(param, names, n=3, cutoff=0.5)
        hint = f"; similar names: {', '.join(f'`{n}`' for n in near)}" if near else ""
        raise ValueError(
            f"`{type(model).__name__}` has no parameter `{param}`{hint}; pass the model whose parameter names the "
            "trace holds (the LightningModule that was trained)"
        )
    return names[param]
