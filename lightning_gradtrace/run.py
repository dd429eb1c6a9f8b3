"""One training that is being recorded: which batch is under way, and whether the tape is running.

The run knows nothing of Lightning; `callback.py` tells it what happens when, and the tracer does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.arrival import Arrival, BatchReader
from lightning_gradtrace.capture.probe import PermutationProbe
from lightning_gradtrace.capture.tape import Tape, deactivate
from lightning_gradtrace.tracer import Position, Tracer


@dataclass
class Run:
    """The bookkeeping between the hooks of a training.

    Attributes:
        tracer: takes micro-batches and steps.
        reader: reads the batches.
        every_n_steps: record every n-th optimizer step.
        weights_every_n_steps: store all weights every n-th step, None for never.
    """

    tracer: Tracer
    reader: BatchReader
    every_n_steps: int = 1
    weights_every_n_steps: int | None = None
    hooks: list[Any] = field(default_factory=list, init=False)
    _tape: Tape | None = field(default=None, init=False)
    _arrival: Arrival | None = field(default=None, init=False)
    _loss: Tensor | None = field(default=None, init=False)
    _position: Position | None = field(default=None, init=False)

    def begin_batch(self, batch: Any, number: int, step: int) -> None:
        """Read a batch and start the tape, if the coming optimizer step is to be recorded."""
        arrival = self.reader.read(batch, number)
        if step % self.every_n_steps or not any(record.due(step) for record in self.tracer.records):
            return
        self.store_weights(step)
        found = self.reader.new_inputs(arrival)
        if found is not None:
            self.tracer.writer.append_samples(*found)
        self._arrival = arrival
        self._tape = self.tracer.tape(arrival.batch, len(arrival.ids))
        self._tape.__enter__()

    def before_backward(self, loss: Tensor) -> None:
        """Stop the tape: the forward pass is done.

        Raises:
            ValueError: the loss needs no gradient.
        """
        if self._tape is None:
            return
        deactivate(self._tape)
        if not loss.requires_grad:
            raise ValueError(
                "GradTrace: the loss needs no gradient: `training_step` returned a tensor that no trainable parameter "
                "led to. Return the loss itself, not a detached copy, and compute it with gradients enabled."
            )
        self._loss = loss.detach()

    def after_backward(self, rehearse: Callable[[int, Any], None]) -> None:
        """Take the shares of a micro-batch whose backward pass is done.

        Args:
            rehearse: runs the training step's forward pass on (index of the batch, batch), for the permutation probe.
        """
        if self._tape is None or self._arrival is None or self._loss is None:
            return
        arrival, tracer = self._arrival, self.tracer
        probe = PermutationProbe(
            tracer.module,
            tracer.parameters(),
            lambda batch: rehearse(arrival.number, batch),
            arrival.batch,
            len(arrival.ids),
            arrival.axis,
        )
        tracer.add_micro_batch(self._tape, self._loss, arrival.ids, probe)
        self._tape, self._arrival, self._loss = None, None, None

    def before_step(self, optimizer: Any, position: Position) -> None:
        """Keep what the division of the coming optimizer step needs; called before clipping."""
        self._position = position
        self.tracer.before_step(optimizer, position)

    def after_step(self, optimizer: Any, args: Any = (), kwargs: Any = None) -> None:
        """Record the optimizer step that was just made; the arguments are those of the optimizer's step hook."""
        if self._position is not None:
            self.tracer.after_step(self._position)
            self._position = None

    def end_batch(self) -> None:
        """Stop the tape, which is still running if `training_step` returned None."""
        if self._tape is not None:
            deactivate(self._tape)
        self._tape, self._arrival, self._loss = None, None, None

    def store_weights(self, step: int, last: bool = False) -> None:
        """Store the weights as they are before a step, if it is time to."""
        every = self.weights_every_n_steps
        if every is not None and (last or step % every == 0):
            self.tracer.store_weights(step)

    def close(self, *, complete: bool, reason: str | None) -> None:
        """Leave nothing behind: no mode, no hook, no open store."""
        self.end_batch()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.tracer.writer.close(complete=complete, end_reason=reason)
