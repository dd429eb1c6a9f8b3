"""What a module keeps outside of its parameters and buffers: noted before a run, put back after it.

That is what hangs on its attributes, on those of its classes, and on the variables that its functions share with the
function in which they were defined.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradtrace.capture.probing.contents import LEFT_ALONE, content_of, iterators_in, root_of
from lightning_gradtrace.capture.probing.iterators import Iterators

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CODE = (type, FunctionType)
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


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are not torch's or the trainer's."""
    held = ("_parameters", "_buffers", "_modules", "_trainer")
    return {name: value for name, value in vars(module).items() if name not in held}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name in own_attributes(module).keys() - before.keys():
        del vars(module)[name]
    vars(module).update(before)
