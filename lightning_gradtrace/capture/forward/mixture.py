"""Tensors made of parameters and of the batch as a whole: they belong to the samples that they meet later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.derived import Derived
from lightning_gradtrace.capture.forward.use import Use


@dataclass(eq=False)
class Mixture:
    """A tensor that is computed from parameters and from the batch as a whole, so that no axis holds the samples.

    Attributes:
        function: the function that returned it.
        parameters: names of the parameters.
        readers: calls that use it.
        reached: whether the backward pass came here.
    """

    function: str
    parameters: tuple[str, ...]
    readers: list[Use | Mixture] = field(default_factory=list)
    reached: bool = False

    @property
    def meets_samples(self) -> bool:
        """Whether the loss depends on it through a use, that is, through samples."""
        pending: list[Use | Mixture] = list(self.readers)
        met: set[int] = set()
        while pending:
            reader = pending.pop()
            if isinstance(reader, Use):
                if reader.reached:
                    return True
            elif reader.reached and id(reader) not in met:
                met.add(id(reader))
                pending += reader.readers
        return False

    def reach(self, cotangent: Tensor | None) -> None:
        """Take note of the backward pass, unless nothing came to this one of several results."""
        self.reached |= cotangent is not None


class Mixtures:
    """The mixtures of one forward pass."""

    def __init__(self) -> None:
        self._by: dict[Derived, Mixture] = {}

    def among(self, leaves: Iterable[Any]) -> list[Mixture]:
        """Return the mixtures among the arguments of a call."""
        return [self._by[leaf] for leaf in leaves if isinstance(leaf, Derived) and leaf in self._by]

    def add(self, derived: Derived, function: str, before: Iterable[Mixture]) -> Mixture:
        """Take what a function returned for a mixture, which reads those before it."""
        mixture = self._by[derived] = Mixture(function, tuple(derived.roots))
        for earlier in before:
            earlier.readers.append(mixture)
        return mixture

    def unattributable(self) -> Mixture | None:
        """Return one from which the loss is computed directly, without meeting samples; None if there is none."""
        return next((m for m in self._by.values() if m.reached and not m.meets_samples), None)

    def forget_backward(self) -> None:
        """Forget that backward passes came."""
        for mixture in self._by.values():
            mixture.reached = False

    def clear(self) -> None:
        """Forget everything."""
        self._by.clear()
