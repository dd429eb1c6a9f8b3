"""States of the random generators that a forward pass may draw from, to draw from them again."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override


class _State(ABC):
    """States of generators at one moment."""

    @classmethod
    @abstractmethod
    def now(cls) -> Self:
        """Take down the present states."""

    @abstractmethod
    def restore(self) -> None:
        """Set the generators to these states."""

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from these states for a while, then go on as if nothing had been drawn."""
        before = self.now()
        self.restore()
        try:
            yield
        finally:
            before.restore()


@dataclass(frozen=True)
class TorchState(_State):
    """States of torch's generators at one moment.

    Attributes:
        cpu: the CPU's.
        devices: those of the accelerator's devices, by number; none while the accelerator hasn't been used.
    """

    cpu: Tensor
    devices: Mapping[int, Tensor]

    @classmethod
    @override
    def now(cls, device: torch.device | None = None) -> TorchState:
        """Take down the present states.

        Args:
            device: the only device that matters beside the CPU; None for all.
        """
        module = _accelerator()
        numbers = range(0 if module is None else module.device_count())
        wanted = [i for i in numbers if device is None or i == device.index]
        return cls(torch.get_rng_state(), {i: module.get_rng_state(i) for i in wanted})

    @override
    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        module = _accelerator()
        for number, state in self.devices.items():
            module.set_rng_state(state, number)


@dataclass(frozen=True)
class RandomState(_State):
    """States of the generators of torch, NumPy and Python at one moment."""

    torch: TorchState
    numpy: Any
    python: Any

    @classmethod
    @override
    def now(cls) -> RandomState:
        """Take down the present states."""
        return cls(TorchState.now(), np.random.get_state(), random.getstate())

    @override
    def restore(self) -> None:
        self.torch.restore()
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _accelerator() -> Any:
    """Return the module of the accelerator (``torch.cuda``, ``torch.mps``, ...), None while it hasn't been used."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    in_use = getattr(module, "is_initialized", None) or module.is_available
    return module if in_use() else None
