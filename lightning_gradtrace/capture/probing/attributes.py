"""What a module keeps outside of its parameters and buffers: noted before a run, put back after it.

That is what hangs on its attributes, on those of its classes, and on the variables that its functions share with the
function in which they were defined.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradtrace.capture.probing.contents import LEFT_ALONE, content_of, iterators_in, root_of
from lightning_gradtrace.capture.probing.iterators import Iterators

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CODE = (type, FunctionType)
_MISSING = object()
_LARGE = 2**26
_DATA = (Tensor, np.ndarray, nn.Module, torch.Generator, np.random.Generator, np.random.RandomState)


class Attributes:
    """Attributes of a module and of those in it, with what hangs on them: containers, tensors, generators, objects.

    What is written back goes into the same objects: a list may be shared, a tensor may be a parameter elsewhere. Data
    sets and objects of libraries, such as the trainer, are left alone; what can't be looked at is too. From `lend` to
    `end` nothing takes from iterators, see `iterators.py`.

    Args:
        module: the module; its parameters and buffers are not among its attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._begin((*parts, *module.parameters(), *module.buffers()), LEFT_ALONE, type(module).__mro__)
        found: list[Any] = []
        for part in parts:
            own = own_attributes(part)
            self._restorers.append(functools.partial(_put_back, part, own))
            self._iterators.add(iterators_in(dict, vars(part), own.items()))
            found += own.values()
        self._note([*found, *map(type, parts)])

    def _begin(self, known: Iterable[Any], left_alone: tuple[type, ...], classes: Iterable[type] = ()) -> None:
        self._left_alone = left_alone
        self._met: dict[int, Any] = {id(one): one for one in known}  # lasts as long as the object is held
        self._restorers: list[Callable[[], Any]] = []
        self._iterators = Iterators()
        self._packages = set(map(root_of, classes))

    def _note(self, found: Iterable[Any]) -> None:
        """Look into objects and into those in them; at last into code, which may lead to half of the world."""
        code: list[Any] = []
        self._follow(found, lambda value: not isinstance(value, _CODE), code)
        self._follow(code, lambda value: isinstance(value, _DATA) or not self._is_installed(value))

    def _follow(self, found: Iterable[Any], wanted: Callable[[Any], bool], unwanted: list[Any] | None = None) -> None:
        pending = list(found)
        while pending:
            value = pending.pop()
            if isinstance(value, _PLAIN) or id(value) in self._met:
                continue
            if not wanted(value):
                if unwanted is not None:
                    unwanted.append(value)
                continue
            self._met[id(value)] = value
            with suppress(Exception):  # an object of a class that does not let itself be looked at
                content = content_of(value, self._left_alone)
                self._restorers += content.restorers
                self._iterators.add(content.iterators)
                pending += content.inside

    def _is_installed(self, value: Any) -> bool:
        """Say whether something is of a package that is installed, and not of the one that the model is of."""
        of = value if isinstance(value, _CODE) else type(value)
        if root_of(of) in self._packages:
            return False
        file = getattr(sys.modules.get(of.__module__), "__file__", None) or ""
        return "site-packages" in file or "dist-packages" in file

    def restore(self) -> None:
        """Put back what has changed.

        Raises:
            Exception: something could not be put back, after everything else was.
        """
        with torch.no_grad(), ExitStack() as stack:
            for restore in self._restorers:
                stack.callback(restore)

    def lend(self) -> None:
        """Let others stand in the places of iterators, for one run."""
        self._iterators.replace()

    def end(self) -> None:
        """Let the training take from iterators again."""
        self._iterators.put_back()


class OptimizerStates(Attributes):
    """The same of optimizers of a user's own, and of those in them, whose methods may do more than steps.

    Args:
        optimizers: optimizers; those of torch are left alone.
        module: the module; its parameters are none of the optimizers' state.
    """

    def __init__(self, optimizers: Iterable[Optimizer], module: nn.Module) -> None:
        self._begin(module.parameters(), tuple(kind for kind in LEFT_ALONE if kind is not Optimizer))
        self._note([one for one in optimizers if root_of(type(one)) != "torch"])


class StateOf(Attributes):
    """The same of a function or a callable object, with the global variables that its code names.

    Of a data set whose method it is the attributes are put back, and nothing in them; tables of more than 64 MB are
    left alone.

    Args:
        function: the function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._begin((), LEFT_ALONE)
        of = [function, getattr(function, "__self__", None)]
        for one in of:
            if hasattr(one, "__dict__"):
                self._restorers.append(functools.partial(_refill, vars(one), dict(vars(one))))
        named = list(_globals_of(function))
        for module, name, value in named:
            self._restorers.append(functools.partial(_rebind, module, name, value))
        self._note([*of, *(value for _, _, value in named if value is not _MISSING)])

    @override
    def _follow(self, found: Iterable[Any], wanted: Callable[[Any], bool], unwanted: list[Any] | None = None) -> None:
        super()._follow(found, lambda value: wanted(value) and not _is_large(value), unwanted)


def _is_large(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.nbytes > _LARGE


def _globals_of(function: Callable[..., Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield the global variables that the code of a function names, or that of functions of its module among them."""
    pending, met = list[Any]([function]), set[int]()
    while pending:
        one = pending.pop()
        while isinstance(one, functools.partial):
            one = one.func
        one = getattr(one, "__func__", one)
        if not isinstance(one, FunctionType):
            one = vars(type(one)).get("__call__")
        if not isinstance(one, FunctionType) or id(one) in met:
            continue
        met.add(id(one))
        for name in one.__code__.co_names:
            value = one.__globals__.get(name, _MISSING)
            if isinstance(value, FunctionType) and value.__globals__ is one.__globals__:
                pending.append(value)
            elif not isinstance(value, (ModuleType, *_CODE)) and not hasattr(builtins, name):
                yield one.__globals__, name, value


def _rebind(module: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        module.pop(name, None)
    else:
        module[name] = value


def _refill(attributes: Any, before: dict[str, Any]) -> None:
    if isinstance(attributes, dict):  # those of a class can't be written to
        attributes.clear()
        attributes.update(before)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are not torch's or the trainer's."""
    held = ("_parameters", "_buffers", "_modules", "_trainer")
    return {name: value for name, value in vars(module).items() if name not in held}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name in own_attributes(module).keys() - before.keys():
        del vars(module)[name]
    vars(module).update(before)
