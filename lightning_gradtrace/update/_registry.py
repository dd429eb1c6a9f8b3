"""Which rule explains an optimizer."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from typing import Any

from torch.optim import Optimizer

from lightning_gradtrace.update._base import UpdateRule

# What a subclass may define anew without changing what a step does to the weights.
_HARMLESS = frozenset(
    {"__init__", "__repr__", "__str__", "__getstate__", "__setstate__", "zero_grad", "state_dict", "load_state_dict"}
)
_TORCH_OPTIMIZER_FILE = inspect.getfile(Optimizer)  # of the wrapper that torch puts around `step`


def rule_for(optimizer: Optimizer) -> UpdateRule | None:
    """Return the rule of an optimizer's family, None if there is none.

    A subclass gets the rule of its nearest ancestor that has one, if it takes the ancestor's steps: it may have
    methods of its own and another ``__init__``, but if it overrides `step` or anything else that a step may call, it
    may be another optimizer.
    """
    owners = {cls: rule for rule in _subclasses(UpdateRule) for cls in rule.optimizers}  # type: ignore[type-abstract]
    for cls in type(optimizer).__mro__:
        if cls in owners:
            return owners[cls]() if _steps_alike(type(optimizer), cls) else None
    return None


def _steps_alike(cls: type, ancestor: type[Optimizer]) -> bool:
    """Say whether no class between a class and its ancestor overrides anything that may matter to a step."""
    between = cls.__mro__[: cls.__mro__.index(ancestor)]
    new = {name: value for one in between for name, value in vars(one).items() if hasattr(ancestor, name)}
    # What every class has of its own: __module__, __doc__, and the like.
    own = set(vars(type("Empty", (), {}))) | {
        "__annotations__",
        "__firstlineno__",
        "__static_attributes__",
        "__slots__",
    }
    return all(name in _HARMLESS | own or _same_step(name, value, ancestor) for name, value in new.items())


def _same_step(name: str, value: Any, ancestor: type[Optimizer]) -> bool:
    """Recognise the ancestor's `step` in the wrapper that torch puts on the class of the first instance."""
    code = getattr(value, "__code__", None)
    if name != "step" or code is None or code.co_filename != _TORCH_OPTIMIZER_FILE:
        return False
    return inspect.unwrap(value) is inspect.unwrap(ancestor.step)


def _subclasses(cls: type[UpdateRule]) -> list[type[UpdateRule]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def load_rules(package: str) -> None:
    """Import every family's file, which registers it."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
