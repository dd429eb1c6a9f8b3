"""What a module keeps outside of its parameters and buffers: noted before a run, put back after it."""

from __future__ import annotations

import functools
import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, Dataset, Sampler

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_BASES = (OrderedDict, dict, list, set, deque)
_LEFT_ALONE = (type, Dataset, DataLoader, Sampler, Optimizer, np.memmap)
_OPEN = (SimpleNamespace, Namespace, UserDict, UserList, SobolEngine)  # objects of libraries that hold a user's state
_TRAINERS = frozenset(("torch", "lightning", "pytorch_lightning", "lightning_fabric", __name__.partition(".")[0]))
_LIBRARIES = sys.stdlib_module_names | _TRAINERS | {"builtins", "numpy"}


class Attributes:
    """Attributes of a module and of those in it, with what hangs on them: containers, tensors, generators, objects.

    What is written back goes into the same objects: a list may be shared, a tensor may be a parameter elsewhere. Data
    sets and objects of libraries, such as the trainer, are left alone; what can't be looked at is too.

    Args:
        module: the module; its parameters and buffers are not among its attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._left_alone: tuple[type, ...] = _LEFT_ALONE
        parts = list(module.modules())
        # By identity, which lasts as long as the object is held.
        self._met: dict[int, Any] = {id(one): one for one in (*parts, *module.parameters(), *module.buffers())}
        self._restorers: list[Callable[[], Any]] = []
        pending: list[Any] = []
        for part in parts:
            own = _own(part)
            self._restorers.append(functools.partial(_put_back, part, own))
            pending += own.values()
        self._note(pending)

    def _note(self, pending: list[Any]) -> None:
        while pending:
            value = pending.pop()
            if isinstance(value, _PLAIN) or id(value) in self._met:
                continue
            self._met[id(value)] = value
            with suppress(Exception):  # an object of a class that does not let itself be looked at
                restorers, inside = _look_into(value, self._left_alone)
                self._restorers += restorers
                pending += inside

    def restore(self) -> None:
        """Put back what has changed.

        Raises:
            Exception: something could not be put back, after everything else was.
        """
        with torch.no_grad(), ExitStack() as stack:
            for restore in self._restorers:
                stack.callback(restore)


class OptimizerStates(Attributes):
    """The same of optimizers of a user's own, and of those in them, whose methods may do more than steps.

    Args:
        optimizers: optimizers; those of torch are left alone.
        module: the module; its parameters are none of the optimizers' state.
    """

    def __init__(self, optimizers: Iterable[Optimizer], module: nn.Module) -> None:
        self._left_alone = tuple(kind for kind in _LEFT_ALONE if kind is not Optimizer)
        self._met = {id(p): p for p in module.parameters()}
        self._restorers = []
        self._note([one for one in optimizers if type(one).__module__.partition(".")[0] != "torch"])


def _own(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are not torch's or the trainer's."""
    held = ("_parameters", "_buffers", "_modules", "_trainer")
    return {name: value for name, value in vars(module).items() if name not in held}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name in _own(module).keys() - before.keys():
        del vars(module)[name]
    vars(module).update(before)


def _is_users(value: Any) -> bool:
    """Say whether an object may be of the user's own making, such as one that keeps averages of weights."""
    if isinstance(value, (nn.Module, *_OPEN)):  # a module that hides from the one that holds it
        return True
    roots = [cls.__module__.partition(".")[0] for cls in type(value).__mro__]
    return roots[0] not in _LIBRARIES and _TRAINERS.isdisjoint(roots)


def _look_into(value: Any, left_alone: tuple[type, ...] = _LEFT_ALONE) -> tuple[list[Callable[[], Any]], list[Any]]:
    """Return what puts the present content of an object back, and the objects in it."""
    if isinstance(value, left_alone):
        return [], []
    if isinstance(value, Tensor):
        return ([] if value.is_meta else [functools.partial(_refill_tensor, value, value.detach().clone())]), []
    if isinstance(value, np.ndarray):
        return ([functools.partial(_refill_array, value, value.copy())] if value.flags.writeable else []), []
    if isinstance(value, torch.Generator):
        return [functools.partial(value.set_state, value.get_state())], []
    if isinstance(value, random.Random):
        return ([] if type(value) is random.SystemRandom else [functools.partial(value.setstate, value.getstate())]), []
    if isinstance(value, np.random.RandomState):
        return [functools.partial(value.set_state, value.get_state())], []
    if isinstance(value, np.random.Generator):
        return [functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)], []
    if isinstance(value, tuple):
        return [], list(value)
    restorers: list[Callable[[], Any]] = []
    inside: list[Any] = []
    base: Any = next((base for base in _BASES if isinstance(value, base)), None)
    if base is not None:
        items = list(base.items(value) if issubclass(base, dict) else base.__iter__(value))
        restorers.append(functools.partial(_refill, base, value, items))
        inside += [item for _, item in items] if issubclass(base, dict) else items
    if _is_users(value) or isinstance(value, Optimizer):
        attributes = getattr(value, "__dict__", {})
        restorers.append(functools.partial(_refill, dict, attributes, list(attributes.items())))
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        restorers.append(functools.partial(_refill_slots, value, slots))
        inside += [*attributes.values(), *slots.values()]
    return restorers, inside


def _slots(of: type) -> Iterator[str]:
    for cls in of.__mro__:
        names = vars(cls).get("__slots__", ())
        yield from (names,) if isinstance(names, str) else names


def _refill_tensor(tensor: Tensor, content: Tensor) -> None:
    if is_same_tensor(tensor, content):  # writing would count as a change in place
        return
    if tensor.shape != content.shape:
        tensor.resize_(content.shape)
    tensor.copy_(content)


def is_same_tensor(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same, not-a-number included; sparse ones are compared as dense ones."""
    if one.layout != torch.strided or other.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and one.allclose(other, 0, 0, equal_nan=True))


def _refill_array(array: np.ndarray, content: np.ndarray) -> None:
    if array.shape != content.shape or array.tobytes() != content.tobytes():
        np.copyto(array, content)


def _refill(base: Any, container: Any, items: list[Any]) -> None:
    """Put the same items into a container again, if it holds others; by the methods of its base, not by its own."""
    is_dict = issubclass(base, dict)
    present = list(base.items(container) if is_dict else base.__iter__(container))
    if len(present) == len(items) and all(_is_one(a, b, is_dict) for a, b in zip(present, items, strict=True)):
        return
    base.clear(container)
    if is_dict:
        for name, value in items:
            base.__setitem__(container, name, value)
    else:
        (base.update if base is set else base.extend)(container, items)


def _is_one(one: Any, other: Any, is_pair: bool) -> bool:
    return (one[0] is other[0] and one[1] is other[1]) if is_pair else one is other


def _refill_slots(value: Any, before: dict[str, Any]) -> None:
    for name, content in before.items():
        if getattr(value, name, None) is not content:
            object.__setattr__(value, name, content)
