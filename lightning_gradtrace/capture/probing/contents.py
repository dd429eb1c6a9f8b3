"""What an object holds, kind by kind: what puts it back, which objects are in it, and where they hang."""

from __future__ import annotations

import functools
import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_gradtrace.capture.probing.iterators import Place, is_iterator

LEFT_ALONE = (Dataset, DataLoader, Sampler, Optimizer, np.memmap)
_BASES = (OrderedDict, dict, list, set, deque)
_OPEN = (SimpleNamespace, Namespace, UserDict, UserList, SobolEngine)  # objects of libraries that hold a user's state
_TRAINERS = frozenset(("torch", "lightning", "pytorch_lightning", "lightning_fabric", __name__.partition(".")[0]))
_EMPTY = object()
_LIBRARIES = sys.stdlib_module_names | _TRAINERS | {"builtins", "numpy"}


@dataclass
class Content:
    """What was found in an object.

    Attributes:
        restorers: what puts it back as it was.
        inside: the objects in it.
        iterators: where iterators hang.
    """

    restorers: list[Callable[[], Any]] = field(default_factory=list)
    inside: list[Any] = field(default_factory=list)
    iterators: list[Place] = field(default_factory=list)


def content_of(value: Any, left_alone: tuple[type, ...] = LEFT_ALONE) -> Content:
    """Look into an object.

    Args:
        value: any object.
        left_alone: kinds of objects in which nothing is looked for.
    """
    if isinstance(value, left_alone):
        return Content()
    if isinstance(value, Tensor):
        return Content([] if value.is_meta else [functools.partial(_refill_tensor, value, value.detach().clone())])
    if isinstance(value, np.ndarray):
        return Content([functools.partial(_refill_array, value, value.copy())] if value.flags.writeable else [])
    generator = _generator(value)
    if generator is not None:
        return Content([generator])
    if isinstance(value, tuple):
        return Content(inside=list(value))
    if isinstance(value, functools.partial):
        return Content(inside=[value.func, *value.args, *value.keywords.values()])
    if isinstance(value, MethodType):
        return Content(inside=[value.__self__, value.__func__])
    if isinstance(value, (staticmethod, classmethod)):
        return Content(inside=[value.__func__])
    if isinstance(value, property):
        return Content(inside=[value.fget, value.fset, value.fdel])
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, type):
        return _of_class(value)
    return _of_object(value)


def _generator(value: Any) -> Callable[[], Any] | None:
    """Return what sets a generator of random numbers back, None for anything else."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and type(value) is not random.SystemRandom:
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _of_function(function: FunctionType) -> Content:
    """Look at what a user's function shares with the one in which it was defined, its defaults, and its attributes."""
    if root_of(function) in _LIBRARIES:
        return Content()
    named = function.__kwdefaults__ or {}
    found = Content(inside=[*(function.__defaults__ or ()), *named.values(), vars(function)])
    for cell in function.__closure__ or ():
        place = _cell(cell)
        content = place.get()
        found.restorers.append(functools.partial(_hang, place, content))
        found.inside.append(content)
        if _is_taken_from(content):
            found.iterators.append(place)
    return found


def _of_class(cls: type) -> Content:
    """Look at the attributes of a user's class, and at those of the classes above and of its own class."""
    above = [*cls.__bases__, type(cls)]
    if root_of(cls) in _LIBRARIES:
        return Content(inside=above)
    before = {name: value for name, value in vars(cls).items() if not _is_of_python(name)}
    iterators = [_class_attribute(cls, name) for name, value in before.items() if _is_taken_from(value)]
    return Content([functools.partial(_refill_class, cls, before)], [*before.values(), *above], iterators)


def _of_object(value: Any) -> Content:
    """Look at the items of a container, and at the attributes of a user's object."""
    found = Content()
    base: Any = next((base for base in _BASES if isinstance(value, base)), None)
    if base is not None:
        items = list(base.items(value) if issubclass(base, dict) else base.__iter__(value))
        found.restorers.append(functools.partial(_refill, base, value, items))
        pairs = items if issubclass(base, dict) else list(enumerate(items))
        found.inside += [item for _, item in pairs]
        if base is not set:
            found.iterators += iterators_in(base, value, pairs)
    if _is_users(value) or isinstance(value, Optimizer):
        attributes = getattr(value, "__dict__", {})
        found.restorers.append(functools.partial(_refill, dict, attributes, list(attributes.items())))
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        found.restorers.append(functools.partial(_refill_slots, value, slots))
        found.inside += [*attributes.values(), *slots.values(), type(value)]
        found.iterators += iterators_in(dict, attributes, attributes.items())
        found.iterators += [_slot(value, name) for name, held in slots.items() if _is_taken_from(held)]
    return found


def iterators_in(base: Any, container: Any, pairs: Iterable[tuple[Any, Any]]) -> list[Place]:
    """Return the places of the iterators among entries; they are put there by the methods of the container's base."""
    return [
        Place(functools.partial(_entry, base, container, key), functools.partial(base.__setitem__, container, key))
        for key, value in pairs
        if _is_taken_from(value)
    ]


def root_of(of: Any) -> str:
    """Return the package that a class or a function is of."""
    return str(getattr(of, "__module__", None)).partition(".")[0]


def _is_of_python(name: str) -> bool:
    """Say whether an attribute of a class is none of the user's."""
    return name.startswith(("__", "_abc_"))


def _is_users(value: Any) -> bool:
    """Say whether an object may be of the user's own making, such as one that keeps averages of weights."""
    if isinstance(value, (nn.Module, *_OPEN)):  # a module that hides from the one that holds it
        return True
    roots = [root_of(cls) for cls in type(value).__mro__]
    return roots[0] not in _LIBRARIES and _TRAINERS.isdisjoint(roots)


def _is_taken_from(value: Any) -> bool:
    return is_iterator(value) and not _is_users(value)


def _slots(of: type) -> Iterator[str]:
    for cls in of.__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            yield f"_{cls.__name__.lstrip('_')}{name}" if is_private else name


def _entry(base: Any, container: Any, key: Any) -> Any:
    try:
        return base.__getitem__(container, key)
    except LookupError:
        return None


def _slot(value: Any, name: str) -> Place:
    return Place(functools.partial(getattr, value, name, None), functools.partial(object.__setattr__, value, name))


def _class_attribute(cls: type, name: str) -> Place:
    return Place(lambda: vars(cls).get(name), functools.partial(type.__setattr__, cls, name))


def _cell(cell: CellType) -> Place:
    """Return the place of a variable that functions share; it may have no value."""

    def get() -> Any:
        try:
            return cell.cell_contents
        except ValueError:
            return _EMPTY

    def put(content: Any) -> None:
        if content is _EMPTY:
            del cell.cell_contents
        else:
            cell.cell_contents = content

    return Place(get, put)


def _hang(place: Place, content: Any) -> None:
    if place.get() is not content:
        place.put(content)


def _refill_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if not _is_of_python(name) and name not in before]:
        type.__delattr__(cls, name)
    for name, content in before.items():
        if vars(cls).get(name) is not content:
            type.__setattr__(cls, name, content)


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
