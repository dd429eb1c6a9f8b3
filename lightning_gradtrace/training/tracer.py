"""The way of the data through one training step: capture, update, record, store.

The tracer knows the stages and their order; it knows nothing of Lightning. `callback.py` tells it what happens when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradtrace.capture.accumulation import Accumulation
from lightning_gradtrace.capture.check import check_known, check_used, warn_of_edits
from lightning_gradtrace.capture.engines._base import Engine
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.forward.use import part_from_gradients
from lightning_gradtrace.capture.parameters import TrackedParameter
from lightning_gradtrace.capture.passes import Passes
from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.precision import double
from lightning_gradtrace.capture.sharded import waiting_gradients
from lightning_gradtrace.ranks.meeting import Ranks
from lightning_gradtrace.ranks.sums import compare_over_ranks, gather_factors, gather_weights
from lightning_gradtrace.record import Record, StepShifts
from lightning_gradtrace.record.parameters import parameter_infos
from lightning_gradtrace.store.writer import TraceWriter
from lightning_gradtrace.training.refusals import check_needs_gradient
from lightning_gradtrace.training.step import Position, Quantity, Step
from lightning_gradtrace.training.sums import SumCheck
from lightning_gradtrace.update._base import UpdateRule, first_momentum, setting
from lightning_gradtrace.update.division import StepDivision, explain, gradient_norm
from lightning_gradtrace.update.ledger import Balance
from lightning_gradtrace.update.sharding import is_sharded


@dataclass
class Tracer:
    """Takes the micro-batches and optimizer steps of a training and appends them to a trace.

    Attributes:
        module: the model, for its current parameters.
        tracked: the tracked parameters.
        records: what is kept.
        writer: where it is kept.
        quantity: "shift" or "gradient".
        ledger_every_n_steps: schedule of the ledger and of the check of the sums; the first captured step always.
        low_precision: whether the forward pass runs in half precision, where sums agree less closely.
        n_groups: number of parameter groups that the steps table has columns for.
        engine: the way to per-sample gradients.
        ranks: the processes that the gradients are averaged over.
        accumulation: which backward passes the gradients hold.
        residual: of the last ledger, NaN before the first one.
    """

    module: nn.Module
    tracked: Sequence[TrackedParameter]
    records: Sequence[Record]
    writer: TraceWriter
    quantity: Quantity = "shift"
    ledger_every_n_steps: int | None = 50
    low_precision: bool = False
    n_groups: int = 1
    engine: Engine[Any] = field(default_factory=TapeEngine)
    ranks: Ranks = field(default_factory=Ranks)
    accumulation: Accumulation = field(default_factory=Accumulation, init=False)
    _step: Step | None = field(default=None, init=False)
    _met: set[int] = field(default_factory=set, init=False)
    _edited: bool = field(default=False, init=False)
    _rules: dict[int, UpdateRule] = field(default_factory=dict, init=False)
    _last_ledger: dict[int, int] = field(default_factory=dict, init=False)
    _stored_step: int | None = field(default=None, init=False)
    residual: float = field(default=float("nan"), init=False)

    def __post_init__(self) -> None:
        self.infos = parameter_infos(self.tracked)
        self._sums = SumCheck(self.engine, self.low_precision)
        self.sharded = any(is_sharded(p.tensor) for p in self.tracked)
        self.spread = self.sharded and self.ranks.size > 1  # a forward pass needs all ranks
        if self.sharded:
            self.accumulation.waiting = functools.partial(waiting_gradients, self.module)

    def parameters(self) -> dict[str, Tensor]:
        """Return the tracked parameters by name, as the module holds them now; spread ones as it holds them at rest."""
        if self.sharded:
            return {p.name: p.tensor for p in self.tracked}
        current = dict(self.module.named_parameters(remove_duplicate=False))
        return {p.name: current.get(p.name, p.tensor) for p in self.tracked}

    def tape(self, batch: Any, n_samples: int, batch_axis: int) -> Any:
        """Return what is to be active during the forward pass of a micro-batch: see `capture.engines`."""
        return self.engine.tape(self.parameters(), batch, n_samples, batch_axis)

    def passes(self, tape: Any, loss: Tensor, probe: Probe) -> Passes:
        """Return the backward passes that the loss tokens of a micro-batch need before the real one."""
        check_needs_gradient(loss)
        passes = self.engine.passes(tape, loss, probe.n_samples)
        assert passes is not None
        return passes

    def begin_pass(self, optimizers: Sequence[Optimizer]) -> None:
        """Look at the gradients; called after the forward pass, right before the backward pass."""
        self.accumulation.begin_pass(self._held(optimizers))

    def _held(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Return the tracked parameters that optimizers hold now; those of nobody are never zeroed and never moved."""
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.parameters().items() if id(p) in held}

    def end_pass(
        self,
        tape: Any,
        loss: Tensor,
        sample_ids: np.ndarray,
        probe: Probe,
        batch: int,
        optimizers: Sequence[Optimizer],
        factor: float = 1.0,
    ) -> None:
        """Take the shares of a backward pass that is done.

        Args:
            tape: the tape that was active in its forward pass.
            loss: the loss that was back-propagated, without the loss scale.
            sample_ids: int64, shape (sample,), in slot order.
            probe: runs the model on the batch and on the batch permuted, see `capture.probing.probe.PermutationProbe`.
            batch: running number of the batch; passes of one batch are one micro-batch of a step.
            optimizers: all optimizers of the training.
            factor: what the user's loss was multiplied by before the backward pass.
        """
        part_from_gradients(tape, self.module.parameters())
        micro_batch = self.engine.collect(tape, len(sample_ids), probe, factor)
        micro_batch.sample_ids = sample_ids
        self.accumulation.end_pass(batch, micro_batch, loss, self._held(optimizers), list(map(id, optimizers)))

    def before_step(
        self,
        optimizer: Optimizer,
        position: Position,
        *,
        record: bool = True,
        alone: bool = True,
        loss_scale: float = 1.0,
        held_scale: float = 1.0,
    ) -> None:
        """Keep what the division of the step needs; called before clipping.

        Args:
            optimizer: the optimizer about to step.
            position: where the step stands.
            record: whether the step is to be recorded; if not, its shares are used up all the same.
            alone: whether this is the training's only optimizer; the steps of one among several are recorded only if
                it holds a tracked parameter.
            loss_scale: factor by which the losses were scaled (fp16 AMP); the gradients may be unscaled already.
            held_scale: what is left of it in the gradients.

        Raises:
            UnattributableError: the shares of a parameter don't add up to its gradient, or its gradient holds
                something that no recorded backward pass left.
        """
        tracked = self._held([optimizer])
        micro_batches, losses = self.accumulation.of(id(optimizer), tracked)
        reference = {n: g / loss_scale if loss_scale != 1 else g for n, g in self.accumulation.reference.items()}
        unknown = self.accumulation.not_captured(tracked)
        self.accumulation.spend(id(optimizer), [name for name, p in tracked.items() if p.grad is not None])
        self._sums.forget(micro_batches)
        self._step = None
        if not record or not (micro_batches or unknown) or not (tracked or alone):
            return
        check_known(unknown, bool(micro_batches))
        every, last = self.ledger_every_n_steps, self._last_ledger.get(id(optimizer))
        scheduled = every is not None and (last is None or position.step - last >= every)
        ledger = scheduled or any(record.wants_ledger and record.due(position.step) for record in self.records)
        rule = self._rules[id(optimizer)] = self._rules.get(id(optimizer)) or explain(optimizer, self.sharded)
        division = StepDivision.begin(optimizer, rule, tracked, ledger, loss_scale * self.ranks.size, reference)
        self._step = Step(position, division, micro_batches, losses)
        self._step.norm = gradient_norm(optimizer) / held_scale
        if id(optimizer) not in self._met:
            self._met.add(id(optimizer))
            used = {name for name, p in self.parameters().items() if p.grad is not None}
            check_used([p for p in self.tracked if alone or p.name in tracked], used)
        self._step.check = self._sums.due(division.gradients, micro_batches, scheduled)
        if self._step.check and self.ranks.size == 1:
            self._step.sum_error = self._sums.compare(self._step)
        if scheduled:
            self._last_ledger[id(optimizer)] = position.step

    def tells(self) -> tuple[float, ...]:
        """Return what the other ranks must know of the step that was made, see `Step.tells`."""
        return (0.0,) * 4 if self._step is None else self._step.tells(self.sharded)

    def gradients_are_final(self) -> None:
        """Take note that clipping is over and the optimizer is about to use the gradients."""
        if self._step is not None:
            self._step.division.keep_gradients()

    def complete_step(self, skipped: bool = False) -> None:
        """Read off the step that was just made; see `after_step`."""
        step = self._step
        if step is None:
            return
        if skipped:
            self._last_ledger.pop(id(step.division.optimizer), None)
        elif not step.division.is_complete:
            step.division.complete(forget=self.ranks.size == 1)
            if step.division.unexplained and not self._edited:
                self._edited = True
                warn_of_edits(step.division.unexplained)

    def after_step(self, optimizer: Optimizer, skipped: bool = False, told: Sequence[float] | None = None) -> None:
        """Divide the step that was just made, reduce it, and append it to the trace.

        Args:
            optimizer: the optimizer that made it.
            skipped: the optimizer left the weights as they are (overflow under fp16 AMP): all shifts are zero.
            told: sums of what all ranks `tells`; None with a single process.
        """
        step, self._step = self._step, None
        joint = None if told is None else self._meet(optimizer, step, skipped, told)
        if step is None:
            return
        kind = next((p.tensor.device.type for p in self.tracked), "cpu")
        with torch.no_grad(), torch.autocast(kind, enabled=False):  # manual steps are made where the loss is computed
            self._record(step, joint, skipped)

    def _record(self, step: Step, joint: Balance | None, skipped: bool) -> None:
        division, position = step.division, step.position
        shifts = step.shifts(self.infos, self.quantity, skipped)
        if division.ledger and not skipped:
            shifts.ledger = functools.partial(division.entries, self._totals(step, shifts))
        ledger = Balance() if skipped else self._balance(step, shifts) if joint is None else joint
        if not any(record.wants_ledger and record.due(position.step) for record in self.records):
            division.forget_before()  # so that it is not held while records work on their own copies
        first = self.writer.n_occurrences
        rows: dict[str, np.ndarray] = {}
        # By name, so that TopK per step comes after TopK per sample and takes over what that found.
        for record in sorted(self.records, key=lambda record: record.group):
            if record.due(position.step):
                self.writer.declare(record.later_specs(shifts))
                rows.update(record.rows(shifts, first))
        nonfinite = sum(int((~np.isfinite(r)).sum()) for r in rows.values() if np.issubdtype(r.dtype, np.floating))
        row = {
            "step": position.step,
            "epoch": position.epoch,
            "optimizer": position.optimizer,
            "loss": float(torch.stack([double(loss) for loss in step.losses]).sum()),
            "lr": self._by_group([setting(group.get("lr")) for group in division.optimizer.param_groups]),
            "momentum": self._by_group([first_momentum(group) for group in division.optimizer.param_groups]),
            "grad_norm": step.norm,
            "clip_factor": float("nan") if skipped else division.clip_factor(),
            "residual": ledger.residual,
            "rounding": ledger.rounding,
            "sum_error": step.sum_error,
            "half_precision": self.low_precision or step.is_half,
            "nonfinite": nonfinite,
            "skipped": skipped,
            "n_occurrences": shifts.n_occurrences,
        }
        self.writer.append_step(row, step.occurrences(), rows)

    def _by_group(self, values: list[float]) -> list[float]:
        """Fit values of the optimizer's groups into the columns of the steps table."""
        return (values + [float("nan")] * self.n_groups)[: self.n_groups]

    def state(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Return what a later process needs to go on with the same schedules."""
        return {
            "last_ledger": [self._last_ledger.get(id(optimizer)) for optimizer in optimizers],
            "checked": sorted(self._sums.right),
            "met": self.engine.state(),
            "stored_step": self._stored_step,
            "records": {record.group: record.state() for record in self.records},
        }

    def restore(self, state: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Go on where `state` was taken."""
        last = zip(optimizers, state["last_ledger"], strict=True)
        self._last_ledger = {id(optimizer): step for optimizer, step in last if step is not None}
        self._sums.right, self._stored_step = set(state["checked"]), state["stored_step"]
        self.engine.restore(state["met"])
        for record in self.records:
            record.restore(state["records"][record.group])

    def store_weights(self, step: int) -> None:
        """Append all weights of the model as they are before optimizer step ``step``, once; rank 0 does it for all."""
        if step == self._stored_step:
            return
        parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        if self.sharded:
            parameters = gather_weights(self.ranks, parameters)
        if self.ranks.rank == 0:
            values = {}
            for name, p in parameters.items():
                dtype = torch.float32 if p.dtype == torch.bfloat16 else p.dtype  # NumPy has no bfloat16
                values[name] = p.detach().to("cpu", dtype, copy=True).numpy()
            self.writer.append_weights(step, values)
        self._stored_step = step

    def _meet(self, optimizer: Optimizer, step: Step | None, skipped: bool, told: Sequence[float]) -> Balance:
        """Do on all ranks together what a single process does by `SumCheck.compare` and `_balance`."""
        compare, spread, clipped, square = told
        tracked = self._held([optimizer])
        if spread:
            gather_factors(self.ranks, None if step is None else step.division, tracked, bool(clipped))
        if step is not None and self.sharded:
            step.norm = square**0.5
        if not compare:
            return Balance()
        errors, ledger = compare_over_ranks(self.ranks, step, tracked, skipped)
        if step is not None:
            step.sum_error = self._sums.judge(step, errors, step.division.gradients)
            self.residual = ledger.residual if step.division.ledger and not skipped else self.residual
        return ledger

    def _balance(self, step: Step, shifts: StepShifts) -> Balance:
        if not step.division.ledger:
            return Balance()
        ledger = step.division.balance(self._totals(step, shifts))
        self.residual = ledger.residual
        return ledger

    def _totals(self, step: Step, shifts: StepShifts) -> Callable[[str], Tensor | None]:
        """Return what sums the shifts of a parameter, whatever quantity is recorded."""
        shifts = shifts if self.quantity == "shift" else step.shifts(self.infos, "shift")
        by_name = {p.info.name: p for p in shifts.parameters}
        return lambda name: by_name[name].total()
