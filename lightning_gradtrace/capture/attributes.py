"""What a module keeps outside of its parameters and buffers: noted before a run, put back after it."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque)
_LEFT_ALONE = (nn.Module, type, Dataset, DataLoader, Optimizer)
_LIBRARIES = sys.stdlib_module_names | {"builtins", "torch", "lightning", "numpy"}


class Attributes:
    """Attributes of a module and of those in it, with what hangs on them: containers, tensors, generators, objects.

    Objects are put back themselves, not copies of them: a list may be shared, a tensor may be a parameter. Data sets
    and objects of libraries such as the trainer are left alone, files and global variables are not known.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._restorers: list[Callable[[], None]] = []
        self._met: dict[int, Any] = {}  # by identity, which lasts as long as the object is held
        for part in module.modules():
            own = _own(part)
            self._restorers.append(functools.partial(_put_back, part, own))
            for value in own.values():
                self._note(value)

    def restore(self) -> None:
        """Put back what has changed."""
        with torch.no_grad():
            for restore in self._restorers:
                restore()

    def _note(self, value: Any) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._met:
            return
        self._met[id(value)] = value
        restore = _restorer(value)
        if restore is not None:
            self._restorers.append(restore)
        for part in _parts(value):
            self._note(part)


def _own(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are not torch's or the trainer's."""
    held = ("_parameters", "_buffers", "_modules")
    return {k: value for k, value in vars(module).items() if k not in held and not k.startswith("_trainer")}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name in _own(module).keys() - before.keys():
        del vars(module)[name]
    vars(module).update(before)


def _is_users(value: Any) -> bool:
    """Say whether an object may be of the user's own making, such as one that keeps averages of weights."""
    library = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and library not in _LIBRARIES and not isinstance(value, _LEFT_ALONE)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    return list(vars(value).values()) if _is_users(value) else ()


def _restorer(value: Any) -> Callable[[], Any] | None:
    """Return what puts the present content of an object back, None for an object without any."""
    if isinstance(value, Tensor):
        is_state = not isinstance(value, nn.Parameter)
        return functools.partial(_refill_tensor, value, value.detach().clone()) if is_state else None
    if isinstance(value, np.ndarray):
        return functools.partial(np.copyto, value, value.copy())
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, _CONTAINERS):
        return functools.partial(_refill, value, list(value.items() if isinstance(value, dict) else value))
    if _is_users(value):
        return functools.partial(_refill, vars(value), list(vars(value).items()))
    return None


def _refill_tensor(tensor: Tensor, content: Tensor) -> None:
    if tensor.shape != content.shape or not torch.equal(tensor, content):  # writing would count as a change in place
        tensor.resize_(content.shape).copy_(content)


def _refill(container: Any, items: list[Any]) -> None:
    """Put the same items into a container again, if it holds others."""
    present = container.items() if isinstance(container, dict) else container
    pairs = zip(present, items, strict=False)
    if len(container) == len(items) and all(_is_same(one, other) for one, other in pairs):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)


def _is_same(one: Any, other: Any) -> bool:
    """Say whether two items of a container are one; those of a dictionary are pairs."""
    return one is other or (
        isinstance(one, tuple) and len(one) == len(other) == 2 and all(a is b for a, b in zip(one, other, strict=True))
    )
