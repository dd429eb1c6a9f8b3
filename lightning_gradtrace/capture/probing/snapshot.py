"""A model as it was: what a run of it may change is put back, so that the training goes on as if it had not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.probing.attributes import Attributes
from lightning_gradtrace.capture.probing.contents import is_same_tensor
from lightning_gradtrace.capture.probing.random_state import RandomState
from lightning_gradtrace.capture.sharded import GradientSettings, bring_to_rest, is_spread


@dataclass(frozen=True)
class Weight:
    """A parameter and its gradient, which a forward pass may change: a teacher that follows, a constraint, SAM."""

    parameter: nn.Parameter
    place: Tensor
    value: Tensor
    gradient: Tensor | None
    held: Tensor | None

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Weight:
        """Keep the present values."""
        gradient = parameter.grad
        held = None if gradient is None else gradient.clone()
        return cls(parameter, parameter.data, parameter.detach().clone(), gradient, held)

    def restore(self) -> None:
        """Write the values back where they have changed; writing would count as a change in place.

        After ``p.data = kept`` a parameter lies where something else does, which must not be written to.
        """
        if self.parameter.data_ptr() != self.place.data_ptr():
            self.parameter.data = self.place
        if not is_same_tensor(self.parameter, self.value):
            self.parameter.copy_(self.value)
        if self.parameter.grad is not self.gradient:
            self.parameter.grad = self.gradient
        if self.gradient is not None and self.held is not None and not is_same_tensor(self.gradient, self.held):
            self.gradient.copy_(self.held)


class Names:
    """Which tensors or modules a module holds under which names, which a step that assigns one changes.

    Args:
        held: the dictionary in which it holds them.
    """

    def __init__(self, held: dict[str, Any]) -> None:
        self._held, self._before = held, dict(held)

    def restore(self) -> None:
        """Put back what stands under other names, or no longer where it stood."""
        held, before = self._held, self._before
        if held.keys() != before.keys() or any(held[name] is not value for name, value in before.items()):
            held.clear()
            held.update(before)


class Snapshot:
    """A module at one moment: its weights, gradients, buffers, attributes and random states.

    Attributes include the states of torchmetrics metrics. Not among them are files, global variables and objects of
    libraries beside the model.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        spread = is_spread(module)  # then other tensors stand for the parameters while a run gathers them
        held = ("_buffers", "_modules") if spread else ("_buffers", "_modules", "_parameters")
        parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self._names = [Names(getattr(part, name)) for part in parts for name in held]
        self._weights = [] if spread else [Weight.of(parameter) for parameter in module.parameters()]
        self._buffers = {buffer: buffer.clone() for buffer in module.buffers()}
        self._settings = GradientSettings(module)
        self._random = RandomState.now()
        self._attributes = Attributes(module)
        self.lend()

    def lend(self) -> None:
        """Let nothing take from iterators until it has `ended`."""
        self._attributes.lend()

    def restore(self) -> None:
        """Put everything back that has changed, whatever fails; another run may come."""
        with ExitStack() as stack:
            stack.callback(self.lend)
            stack.callback(self._restore_tensors)
            for names in self._names:
                stack.callback(names.restore)
            stack.callback(self._random.restore)
            stack.callback(self._settings.restore)
            # Weights that were gathered for a run would be taken for those after the next step.
            stack.callback(bring_to_rest, self._module)
            stack.callback(self._attributes.restore)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Let the training go on afterwards, whatever fails."""
        try:
            yield
        finally:
            self._attributes.end()

    @torch.no_grad()
    def _restore_tensors(self) -> None:
        for weight in self._weights:
            weight.restore()
        for buffer, value in self._buffers.items():
            if not is_same_tensor(buffer, value):  # writing would count as a change in place
                buffer.copy_(value)


@contextmanager
def undisturbed(module: nn.Module, keeps_mode: bool = True) -> Iterator[Snapshot]:
    """Let a module run some times, and put everything back at the end.

    Args:
        module: the module.
        keeps_mode: leave it in training mode where it is, but for what would talk with other processes, else put it in
            evaluation mode.

    Yields:
        What puts everything but the mode back between two runs.
    """
    modes = {part: part.training for part in module.modules()}
    for part in modes:  # by hand: a `train` of the user's own may merge weights
        # In training it waits for other processes, which may run nothing now.
        part.training = part.training and keeps_mode and not isinstance(part, nn.SyncBatchNorm)
    try:
        before = Snapshot(module)
        try:
            yield before
        finally:
            with before.ended():
                before.restore()
    finally:
        for part, mode in modes.items():
            part.training = mode
