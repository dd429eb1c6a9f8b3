"""The batch under way: its tape, which is active while the training step runs and not while an optimizer does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_gradtrace.capture.forward.modes import deactivate
from lightning_gradtrace.capture.intake.arrival import Arrival
from lightning_gradtrace.capture.probing.memory import Memory


@dataclass
class OpenBatch:
    """What is known of the batch under way; empty between batches, and while none is taped.

    Attributes:
        arrival: the batch and its samples.
        tape: the recording of its forward pass, see `capture.engines`.
        memory: what the model remembered when the batch began; None where its forward pass leaves no question.
        loss: the loss whose backward pass is under way, without the loss scale.
    """

    arrival: Arrival | None = field(default=None, init=False)
    tape: Any = field(default=None, init=False)
    memory: Memory | None = field(default=None, init=False)
    loss: Tensor | None = field(default=None, init=False)

    @property
    def is_taped(self) -> bool:
        """Whether there is a tape."""
        return self.tape is not None

    @property
    def is_unseen(self) -> bool:
        """Whether cotangents came to the tape that nobody announced."""
        return self.is_taped and any(use.cotangents for use in self.tape.uses)

    def begin(self, arrival: Arrival, tape: Any, module: nn.Module) -> None:
        """Begin to record a batch; a model that may have to be run again is looked at."""
        self.arrival, self.tape = arrival, tape
        self.memory = None if tape.state is None else Memory(module)
        self.resume()

    def suspend(self) -> None:
        """Take the tape off for a while."""
        if self.is_taped:
            deactivate(self.tape)

    def resume(self) -> None:
        """Put the tape on again."""
        if self.is_taped:
            self.tape.__enter__()

    def drop(self) -> None:
        """Forget the batch, and keep no tensor of its forward pass alive."""
        self.suspend()
        if self.is_taped:
            self.tape.clear()
        self.tape, self.arrival, self.memory, self.loss = None, None, None, None
