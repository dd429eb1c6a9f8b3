"""Run a recorded call again, on other values, as it ran in the forward pass.

Shares without a closed form are vector-Jacobian products of calls that are long past. A second run must give the
numbers of the first: the same autocast, the same random numbers, and nothing written that the model owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lightning_gradtrace.capture.forward.functions import facts, names_of
from lightning_gradtrace.capture.probing.random_state import TorchState

# Its backward pass crashes the process on channels-last inputs whose gradient nobody asks for (seen in torch 2.13).
_NEEDS_CONTIGUOUS = names_of("group_norm native_group_norm")


@dataclass(frozen=True)
class Surroundings:
    """What a call depends on beside its arguments.

    Attributes:
        device: type of the device.
        autocast: dtype that autocast works in, None without autocast.
        random: states of torch's generators before the call; None if it draws nothing.
    """

    device: str
    autocast: torch.dtype | None
    random: TorchState | None

    @classmethod
    def now(cls, function: Callable[..., Any], device: torch.device) -> Surroundings:
        """Return the present surroundings of a call of a function."""
        kind = device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(kind, cast, TorchState.now(device) if facts(function).random else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore the surroundings for a while."""
        enabled = self.autocast is not None
        random = nullcontext() if self.random is None else self.random.replayed()
        with torch.autocast(self.device, dtype=self.autocast, enabled=enabled, cache_enabled=False), random:
            yield


def run(function: Callable[..., Any], leaves: Sequence[Any], structure: Any, around: Surroundings) -> list[Any]:
    """Call a function and return its outputs, the changed target among them if it works in place.

    Args:
        function: the torch function.
        leaves: flattened arguments, tensors among them; the target of a function in place is copied first.
        structure: pytree structure of the arguments.
        around: surroundings of the recorded call.

    Returns:
        The outputs; one for a function that returns a tensor.
    """
    known = facts(function)
    if known.in_place:
        leaves = [leaves[0].clone(), *leaves[1:]]
    if known.name in _NEEDS_CONTIGUOUS:
        leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(list(leaves), structure)
    with around.again():
        result = function(*args, **kwargs)
    return outputs_of(known.in_place, args, result)


def outputs_of(in_place: bool, args: Sequence[Any], result: Any) -> list[Any]:
    """Return the outputs of a call as a list; what is no tensor keeps its place."""
    if in_place:
        return [args[0]]
    if isinstance(result, Tensor):
        return [result]
    return list(result) if isinstance(result, (list, tuple)) else []
