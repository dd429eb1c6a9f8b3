"""How an optimizer's step divides into shifts, carry and decay, and the registry of optimizer families."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

Number = float | Tensor


@dataclass
class Split:
    """Division of one parameter's change in one optimizer step (docs/concepts.md, 3).

    ``W_after - W_before = sum_i gain * e[i] + carry + decay``, where ``e[i]`` is the clipped, unscaled per-sample
    gradient.

    Attributes:
        gain: factor from a clipped gradient to its shift: a number, or a tensor of the parameter's shape.
        carry: what earlier steps contribute through the optimizer's memory, None for nothing or when not asked for.
        decay: what weight decay contributes, None for nothing or when not asked for.
    """

    gain: Number
    carry: Tensor | None = None
    decay: Tensor | None = None


class UpdateRule(ABC):
    """One family of optimizers.

    A subclass names the optimizers it explains and is registered by being defined in a file of this folder.
    """

    optimizers: ClassVar[tuple[type[Optimizer], ...]] = ()

    @abstractmethod
    def remember(self, group: Mapping[str, Any], state: Mapping[str, Any], ledger: bool) -> dict[str, Any]:
        """Keep what `split` needs from before the step.

        Args:
            group: the parameter group.
            state: the parameter's optimizer state before the step; empty before its first step.
            ledger: whether carry will be asked for, so that copies of the state are worth their memory.

        Returns:
            Anything, handed to `split`.
        """

    @abstractmethod
    def split(
        self,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        before: Tensor | None,
    ) -> Split:
        """Divide a step that has been made.

        Args:
            group: the parameter group, with the learning rate of the step.
            state: the parameter's optimizer state after the step.
            memory: what `remember` returned.
            before: the weights before the step; None if the ledger is not computed, then carry and decay may be None.

        Returns:
            The division.
        """


def _subclasses(cls: type[UpdateRule]) -> list[type[UpdateRule]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def rule_for(optimizer: Optimizer) -> UpdateRule | None:
    """Return the rule of an optimizer's family, None if there is none.

    Only the exact class counts: a subclass may have another step.
    """
    for cls in _subclasses(UpdateRule):  # type: ignore[type-abstract]
        if type(optimizer) in cls.optimizers:
            return cls()
    return None


def load_rules(package: str, path: list[str]) -> None:
    """Import every family's file, which registers it."""
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")


def number(value: Any) -> float:
    """Return a hyperparameter as a float; learning rates may be tensors."""
    return float(value)
