"""One training that is being recorded: which batch is under way, when the tape runs, and which step comes next.

The run knows nothing of Lightning; `callback.py` tells it what happens when, and the tracer does the work. The tape
runs from the beginning of a training step to the end of its last backward pass, because checkpointed layers run their
forward pass during backward; only optimizers must not be seen by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradtrace.capture.intake.arrival import BatchReader
from lightning_gradtrace.capture.passes import Passes, make_alone
from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.sharded import watch_unsharding
from lightning_gradtrace.ranks.checkpoint import joint_state, lone_state
from lightning_gradtrace.ranks.meeting import Ranks, held_back
from lightning_gradtrace.ranks.passing import pass_together
from lightning_gradtrace.ranks.probing import probe_together
from lightning_gradtrace.record import Schedule
from lightning_gradtrace.training import refusals
from lightning_gradtrace.training.numbering import StepNumbers
from lightning_gradtrace.training.open_batch import OpenBatch
from lightning_gradtrace.training.step import Position
from lightning_gradtrace.training.tracer import Tracer
from lightning_gradtrace.update.nesting import Moment, Removable, come_last, watch_steps
from lightning_gradtrace.update.scaling import held_scale, loss_scale, overflowed

Rehearsal = Callable[[int, Any], None]
STATE_VERSION = 1  # of what a checkpoint holds of a run


@dataclass
class Run:
    """The bookkeeping between the hooks of a training.

    Attributes:
        tracer: takes backward passes and steps.
        reader: reads the batches.
        optimizers: all optimizers of the training.
        manual: whether the training step itself calls backward and the optimizers.
        scaler: the GradScaler of the precision plugin, None without one.
        every_n_steps: record every n-th optimizer step; with several optimizers, every n-th of each.
        weights: before which steps all weights are stored, None for never.
        failure: an error that waits until the ranks meet, see `ranks.meeting.held_back`; None with a single process.
    """

    tracer: Tracer
    reader: BatchReader
    optimizers: Sequence[Optimizer]
    manual: bool = False
    scaler: Any = None
    every_n_steps: int = 1
    weights: Schedule | None = None
    failure: Exception | None = field(default=None, init=False)
    _hooks: list[Any] = field(default_factory=list, init=False)
    _n_batches: int = field(default=0, init=False)
    _open: OpenBatch = field(default_factory=OpenBatch, init=False)
    _taped: bool = field(default=False, init=False)  # whether the batch is to be taped, whatever may have failed
    _tokens: bool = field(default=False, init=False)
    _stepping: Optimizer | None = field(default=None, init=False)
    _announced: Optimizer | None = field(default=None, init=False)
    _recorded: bool = field(default=False, init=False)
    _scale: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        self._numbers = StepNumbers(self.optimizers, self.every_n_steps)

    @property
    def ranks(self) -> Ranks:
        """The processes that record together."""
        return self.tracer.ranks

    def fail(self, error: Exception) -> None:
        """Record nothing more, and say why when the ranks meet."""
        self.failure = error
        self._open.drop()

    def watch(
        self, before: Callable[..., None], final: Callable[[], None], made: Moment, after: Moment
    ) -> list[Removable]:
        """Watch the steps of all optimizers, see `watch_steps`, and return what ends that; not while one steps."""
        for optimizer in self.optimizers:
            self._hooks += watch_steps(optimizer, before, final, made, after)
        if self.tracer.sharded:
            self._hooks += watch_unsharding(self.tracer.module, [p.name for p in self.tracer.tracked])
        return self._hooks

    def begin_batch(self, batch: Any, number: int, step: int) -> None:
        """Read a batch and start the tape, if a step of this batch may be recorded.

        Args:
            batch: the batch.
            number: its index in the epoch.
            step: number of the coming optimizer step.
        """
        self._settle()
        come_last(self._hooks)
        self._taped = self.manual or not (step % self.every_n_steps or not self._due(step))
        self._tokens = any(record.wants_tokens and (self.manual or record.due(step)) for record in self.tracer.records)
        self._begin_batch(batch, number)

    @held_back
    def _begin_batch(self, batch: Any, number: int) -> None:
        arrival = self.reader.read(batch, number)
        self._n_batches += 1
        if not self._taped:
            return
        if (found := self.reader.new_inputs(arrival)) is not None:
            self.tracer.writer.append_samples(*found)
        tape = self.tracer.tape(arrival.batch, len(arrival.ids), arrival.axis)
        self._open.begin(arrival, tape, self.tracer.module)

    def before_backward(self, loss: Tensor, rehearse: Rehearsal) -> None:
        """Look at the gradients as the backward pass finds them.

        Args:
            loss: the loss that is about to be back-propagated.
            rehearse: see `after_backward`.

        Raises:
            ValueError: the loss needs no gradient.
        """
        self._open.suspend()
        probe = self._probe(rehearse)
        passes = functools.partial(self.tracer.passes, self._open.tape, loss)
        if self._taped and self._tokens and self.tracer.spread:
            pass_together(self, self.tracer.module, passes, probe)
        self._before_backward(loss, None if self.tracer.spread else probe, passes)

    @held_back
    def _before_backward(self, loss: Tensor, probe: Probe | None, passes: Callable[[Probe], Passes]) -> None:
        if not self._open.is_taped:
            return
        refusals.check_needs_gradient(loss)
        if self._tokens and probe is not None:
            make_alone(self.tracer.module, passes(probe), probe)
        self.tracer.begin_pass(self.optimizers)
        self._open.tape.forget_backward()  # `torch.autograd.grad` in the forward pass leaves nothing in `.grad`
        # Another optimizer's step may change the scale before its own.
        self._open.loss = loss.detach() / loss_scale(self.scaler)
        self._open.resume()

    def after_backward(self, rehearse: Rehearsal, factor: float = 1.0) -> None:
        """Take the shares of a backward pass that is done.

        Args:
            rehearse: runs the training step's forward pass on (index of the batch, batch), for the permutation probe.
            factor: what the user's loss was multiplied by before the backward pass.
        """
        probe: PermutationProbe | None = None
        if self._open.loss is not None:
            self._open.suspend()
            probe = self._probe(rehearse)
        asks = functools.partial(self.tracer.engine.asks, self._open.tape)
        joint = probe_together(self, probe, asks) if self._taped and self.tracer.spread else probe
        if joint is not None:
            self._after_backward(joint, factor)
        self._taped = self._taped and self.manual

    @held_back
    def _after_backward(self, probe: Probe, factor: float) -> None:
        tape, arrival, loss = self._open.tape, self._open.arrival, self._open.loss
        assert arrival is not None and loss is not None
        self.tracer.end_pass(tape, loss, arrival.ids, probe, self._n_batches, self.optimizers, factor)
        self._open.loss = None
        if self.manual:  # the training step goes on
            self._open.resume()
        else:
            self._open.drop()

    def _probe(self, rehearse: Rehearsal) -> PermutationProbe | None:
        arrival = self._open.arrival
        if arrival is None:
            return None
        of = (self.tracer.module, self.tracer.parameters(), rehearse)
        return arrival.probe(*of, self._open.tape, self._open.memory)

    def before_step(self, optimizer: Optimizer, step: int, epoch: int, rank: int = 0) -> None:
        """Keep what the division of the coming optimizer step needs; called before clipping.

        Args:
            optimizer: the optimizer.
            step: number of the step; if it was used already, the next free one is taken.
            epoch: number of the epoch.
            rank: rank of the process.

        Raises:
            ValueError: the optimizer evaluates its closure more than once per step, or a backward pass went unseen.
        """
        self._open.suspend()
        self._check_seen()
        if self._announced is not None and self._stepping is optimizer:
            refusals.refuse_second_closure(optimizer)
        self._settle()
        self._announced = optimizer
        number, is_turn = self._numbers.take(optimizer, step)
        self._recorded = is_turn and self._due(number)
        self.store_weights(number)
        self._before_step(optimizer, number, epoch, rank)
        if self._stepping is not optimizer:  # a GradScaler may skip the step, and what comes next is to be seen
            self._open.resume()

    @held_back
    def _before_step(self, optimizer: Optimizer, number: int, epoch: int, rank: int) -> None:
        self._scale = loss_scale(self.scaler)
        self.tracer.before_step(
            optimizer,
            Position(number, epoch, rank, self._numbers.place_of(optimizer)),
            record=self._recorded,
            alone=len(self.optimizers) == 1,
            loss_scale=self._scale,
            held_scale=held_scale(self.scaler, optimizer),
        )

    def step_begins(self, optimizer: Optimizer, kwargs: Mapping[str, Any], announce: Callable[[], None]) -> None:
        """Take note that an optimizer's `step` was called.

        Args:
            optimizer: the optimizer.
            kwargs: arguments of the call.
            announce: calls `before_step`, for a step that Lightning does not know of: of the bare optimizer.
        """
        self._stepping = optimizer
        if self.manual and self._announced is not optimizer and kwargs.get("closure") is None:
            announce()
        if self._announced is not None:
            self._open.suspend()

    @held_back
    def gradients_are_final(self) -> None:
        """Take note that clipping is over and the optimizer is about to use the gradients."""
        self.tracer.gradients_are_final()

    def step_made(self, optimizer: Optimizer) -> None:
        """Read off the step before other hooks after it, which may zero its gradients."""
        if self._announced is not None:
            self._complete_step(overflowed(optimizer))

    def step_ended(self, optimizer: Optimizer) -> None:
        """Record the optimizer step that was just made.

        Raises:
            ValueError: nobody said beforehand that it would be made.
        """
        self._stepping = None
        if self.manual and self._open.is_taped and self._announced is None:
            refusals.refuse_unannounced(optimizer)
        self._finish(skipped=overflowed(optimizer))
        self._open.resume()

    def finish_batch(self) -> None:
        """Take note that the training on a batch is over."""
        self.end_batch()
        self.reader.finish()

    def end_batch(self) -> None:
        """Stop the tape; the training step is over.

        Raises:
            ValueError: a backward pass went unseen.
        """
        self._settle()
        self._check_seen()
        self._open.drop()

    def state(self) -> dict[str, Any]:
        """Make everything recorded so far visible, and return what a later process needs to go on from here.

        With several ranks, all of which call this, it is the state of all.
        """
        return joint_state(self.ranks, self._own_state, self.failure)

    def lone_state(self) -> dict[str, Any]:
        """Return the state after an error, when the other ranks can't be asked any more."""
        return lone_state(self.ranks, self._own_state())

    def _own_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self.tracer.writer.cursor().state(),
            "n_steps": self._numbers.counts(),
            "next_step": self._numbers.next,
            "reader": self.reader.state(),
            "tracer": self.tracer.state(self.optimizers),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the writer has cut the trace back to it."""
        self._numbers.restore(state["n_steps"], state["next_step"])
        self.reader.restore(state["reader"], self.tracer.writer.stored_samples)
        self.tracer.restore(state["tracer"], self.optimizers)

    def store_weights(self, step: int, last: bool = False) -> None:
        """Store the weights as they are before a step, if it is time to."""
        if self.weights is not None and (last or self.weights.due(step)):
            if self.tracer.sharded:  # all ranks gather them, or none does
                self.ranks.agree(self.failure)
            self._store_weights(max(step, self._numbers.next) if last else step)

    @held_back
    def _store_weights(self, step: int) -> None:
        self.tracer.store_weights(step)

    def close(self, *, complete: bool, reason: str | None) -> None:
        """Leave no mode and no open store behind."""
        self._open.drop()
        if complete and self._n_batches and not self._numbers.next:
            refusals.warn_of_no_step()
        self.tracer.writer.close(complete=complete, end_reason=reason)

    def _check_seen(self) -> None:
        """Refuse a backward pass that Lightning did not announce: nobody looked at the gradients before it."""
        if self.manual and self._open.is_unseen:
            refusals.refuse_unseen_gradients()

    def _due(self, step: int) -> bool:
        return any(record.due(step) for record in self.tracer.records)

    def _settle(self) -> None:
        """Finish a step that was announced and whose end nobody saw; a GradScaler that skips one lowers its scale."""
        if self._announced is not None:
            self._finish(skipped=loss_scale(self.scaler) < self._scale)

    def _finish(self, *, skipped: bool) -> None:
        optimizer, self._announced = self._announced, None
        if optimizer is None:
            return
        self._complete_step(skipped)
        meets = self._recorded and self.ranks.size > 1
        told = self.ranks.agree(self.failure, self.tracer.tells()) if meets else None
        self._after_step(optimizer, skipped, told)

    @held_back
    def _complete_step(self, skipped: bool) -> None:
        self.tracer.complete_step(skipped)

    @held_back
    def _after_step(self, optimizer: Optimizer, skipped: bool, told: list[float] | None) -> None:
        self.tracer.after_step(optimizer, skipped, told)
