"""What a model remembers from step to step, as it was when a step began: a run of the step begins with the same.

That is buffers - statistics, queues, codebooks - and what hangs on modules by name: counters, hidden states and lists
of them. A run gets copies, so that nothing is written that the real forward pass may have kept for its backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.placing.batch_axis import candidates
from lightning_gradtrace.capture.probing.attributes import own_attributes

_MOST_PARTS, _MOST_ENTRIES = 1000, 2**24
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Memory:
    """Copies of buffers and attributes of a module at one moment.

    Args:
        module: the module. Objects that hang on it, other than numbers, texts, tensors and containers of these, are no
            part of it, nor is what learns.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept = [(part, _copies(_attributes(part)), _copies(part._buffers)) for part in module.modules()]

    @torch.no_grad()
    def recall(self, order: Tensor | None = None, with_buffers: bool = False) -> None:
        """Hang copies where these things hung; who put something else there puts that back (`snapshot.py`).

        Args:
            order: an order of the samples; what has room for them follows it, such as hidden states.
            with_buffers: let buffers follow, too.
        """
        change = torch.clone if order is None else functools.partial(_permuted, order=order)
        for part, attributes, buffers in self._kept:
            for name in _attributes(part).keys() - attributes.keys():
                del vars(part)[name]
            vars(part).update((n, _mapped(v, change)) for n, (is_copy, v) in attributes.items() if is_copy)
            for name in part._buffers.keys() - buffers.keys():
                del part._buffers[name]
            to = change if with_buffers else torch.clone
            part._buffers.update((n, _mapped(v, to)) for n, (is_copy, v) in buffers.items() if is_copy)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module; whether it trains is for those to say who run it."""
    return {name: value for name, value in own_attributes(part).items() if name != "training"}


def _permuted(tensor: Tensor, order: Tensor) -> Tensor:
    places = [place for place in candidates(tensor.shape, len(order)) if place.factor == "whole"]
    return places[0].permute(tensor, order.to(tensor.device)) if places else tensor.clone()


def _copies(found: dict[str, Any]) -> dict[str, tuple[bool, Any]]:
    """Return copies by name, and whether they are: of other things only the names are kept."""
    with torch.no_grad():
        return {n: (True, _mapped(v, torch.clone)) if _is_simple(v) else (False, None) for n, v in found.items()}


def _is_simple(value: Any) -> bool:
    """Say whether a value is worth a copy for every run: larger ones, such as replay buffers, are as they are now."""
    if type(value) in (list, tuple, dict):
        parts = value.values() if isinstance(value, dict) else value
        return len(value) <= _MOST_PARTS and all(map(_is_simple, parts))
    if type(value) is not Tensor:
        return type(value) in _PLAIN
    if value.layout is not torch.strided or value.is_nested or (value.is_leaf and value.requires_grad):
        return False
    return value.numel() <= _MOST_ENTRIES


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value.detach())
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return value
