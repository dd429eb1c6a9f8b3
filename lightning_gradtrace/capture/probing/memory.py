"""What a model remembers from step to step, as it was when a step began: a run of the step begins with the same.

That is buffers - statistics, queues, codebooks - and what hangs on modules by name: counters, hidden states and lists
of them. A run gets copies, so that nothing is written that the real forward pass may have kept for its backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.placing.batch_axis import candidates
from lightning_gradtrace.capture.probing.attributes import own_attributes

_MOST_PARTS, _MOST_ENTRIES, _DEEPEST = 1000, 2**24, 5
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Memory:
    """Copies of buffers and attributes of a module at one moment.

    Args:
        module: the module. Objects that hang on it, other than numbers, texts, tensors and containers of these, are no
            part of it, nor is what learns.
    """

    def __init__(self, module: nn.Module) -> None:
        copies = Copies(torch.clone)
        parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self._kept = [(part, copies.of(_attributes(part)), copies.of(part._buffers)) for part in parts]

    @torch.no_grad()
    def recall(self, order: Tensor | None = None, with_buffers: bool = False) -> None:
        """Hang copies where these things hung; who put something else there puts that back (`snapshot.py`).

        What was not there before stays: it may have been set up together with something that is no part of this.

        Args:
            order: an order of the samples; what has room for them follows it, such as hidden states.
            with_buffers: let buffers follow, too.
        """
        following = Copies(torch.clone if order is None else functools.partial(_permuted, order=order))
        to = following if with_buffers else Copies(torch.clone)
        for part, attributes, buffers in self._kept:
            for held, kept, copies in ((vars(part), attributes, following), (part._buffers, buffers, to)):
                held.update((name, copies(value)) for name, value in kept.items())


class Copies:
    """Makes copies of simple values; what hangs at several places is one thing there as well.

    Args:
        change: makes the copy of a tensor.
    """

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._made: dict[int, tuple[Any, Any]] = {}

    @torch.no_grad()
    def of(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of those values that are simple, by name."""
        return {name: self(value) for name, value in found.items() if _is_simple(value)}

    def __call__(self, value: Any) -> Any:
        """Return the copy of a value."""
        if not isinstance(value, (Tensor, list, tuple, dict)):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, self._copy(value)  # held, so that its id stays its own
        return self._made[id(value)][1]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._change(value.detach())
        if isinstance(value, dict):
            return {name: self(one) for name, one in value.items()}
        return type(value)(self(one) for one in value)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module; whether it trains is for those to say who run it."""
    return {name: value for name, value in own_attributes(part).items() if name != "training"}


def _permuted(tensor: Tensor, order: Tensor) -> Tensor:
    places = [place for place in candidates(tensor.shape, len(order)) if place.factor == "whole"]
    return places[0].permute(tensor, order.to(tensor.device)) if places else tensor.clone()


def _is_simple(value: Any, depth: int = 0) -> bool:
    """Say whether a value is worth a copy for every run: larger ones, such as replay buffers, are as they are now."""
    if type(value) in (list, tuple, dict):
        parts = value.values() if isinstance(value, dict) else value
        small = depth < _DEEPEST and len(value) <= _MOST_PARTS
        return small and all(_is_simple(part, depth + 1) for part in parts)
    if type(value) is not Tensor:
        return type(value) in _PLAIN
    if value.layout is not torch.strided or value.is_nested or (value.is_leaf and value.requires_grad):
        return False
    return value.numel() <= _MOST_ENTRIES
