"""What a module keeps outside of its parameters and buffers: noted before a run, put back after it.

That is what hangs on its attributes, on those of its classes, and on the variables that its functions share with the
function in which they were defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gradtrace.capture.probing.contents import LEFT_ALONE, content_of, entry, is_installed
from lightning_gradtrace.capture.probing.iterators import Iterators

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CODE = (type, FunctionType)


class Attributes:
    """Attributes of a module and of those in it, with what hangs on them: containers, tensors, generators, objects.

    What is written back goes into the same objects: a list may be shared, a tensor may be a parameter elsewhere. Data
    sets and objects of libraries, such as the trainer, are left alone; what can't be looked at is too. Iterators give
    way to others until `end`, see `iterators.py`.

    Args:
        module: the module; its parameters and buffers are not among its attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._left_alone: tuple[type, ...] = LEFT_ALONE
        self._iterators: Iterators | None = Iterators()
        parts = list(module.modules())
        # By identity, which lasts as long as the object is held.
        self._met: dict[int, Any] = {id(one): one for one in (*parts, *module.parameters(), *module.buffers())}
        self._restorers: list[Callable[[], Any]] = []
        found: list[Any] = []
        for part in parts:
            self._iterators.look(entry(dict, vars(part), name) for name in _own(part))
            own = _own(part)
            self._restorers.append(functools.partial(_put_back, part, own))
            found += own.values()
        self._note([*found, *map(type, parts)])

    def _note(self, found: Iterable[Any]) -> None:
        """Look into objects and into those in them; at last into code, which may lead to half of the world."""
        code: list[Any] = []
        self._follow(found, lambda value: not isinstance(value, _CODE), code)
        self._follow(code, lambda value: isinstance(value, nn.Module) or not is_installed(value))

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
                if self._iterators is not None and self._iterators.look(content.places):
                    content = content_of(value, self._left_alone)  # with those that stand in
                self._restorers += content.restorers
                pending += content.inside

    def restore(self) -> None:
        """Put back what has changed.

        Raises:
            Exception: something could not be put back, after everything else was.
        """
        with torch.no_grad(), ExitStack() as stack:
            for restore in self._restorers:
                stack.callback(restore)
            if self._iterators is not None:
                stack.callback(self._iterators.rewind)

    def end(self) -> None:
        """Let the training go on: what iterators gave to runs is kept for it."""
        if self._iterators is not None:
            self._iterators.end()


class OptimizerStates(Attributes):
    """The same of optimizers of a user's own, and of those in them, whose methods may do more than steps.

    Args:
        optimizers: optimizers; those of torch are left alone.
        module: the module; its parameters are none of the optimizers' state.
    """

    def __init__(self, optimizers: Iterable[Optimizer], module: nn.Module) -> None:
        self._left_alone = tuple(kind for kind in LEFT_ALONE if kind is not Optimizer)
        self._iterators = None
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
