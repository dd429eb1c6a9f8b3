"""The way of the data through one training step: capture, update, record, store.

The tracer knows the stages and their order; it knows nothing of Lightning. `callback.py` tells it what happens when.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engine import MicroBatch, TapeEngine
from lightning_gradtrace.capture.parameters import TrackedParameter
from lightning_gradtrace.capture.placement import Probe, UnattributableError
from lightning_gradtrace.capture.shares import Share, accumulation_dtype
from lightning_gradtrace.capture.tape import Tape
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.store.writer import TraceWriter
from lightning_gradtrace.update._base import UpdateRule, first_momentum, setting
from lightning_gradtrace.update.clipping import copy_gradients
from lightning_gradtrace.update.division import StepDivision, explain, gradient_norm
from lightning_gradtrace.update.ledger import Balance

Quantity = Literal["shift", "gradient"]


def parameter_infos(tracked: Sequence[TrackedParameter]) -> list[ParameterInfo]:
    """Number the entries of the tracked parameters: the rows of the params table."""
    infos, offset = [], 0
    for p in tracked:
        dtype = str(accumulation_dtype(p.tensor.dtype)).removeprefix("torch.")
        infos.append(ParameterInfo(p.name, tuple(p.tensor.shape), offset, p.kind, p.module, dtype))
        offset += infos[-1].numel
    return infos


def parameter_table(infos: Sequence[ParameterInfo]) -> pd.DataFrame:
    """Return the params table as the store keeps it: name, shape, numel, offset, kind, module."""
    columns = ("name", "shape", "numel", "offset", "kind", "module")
    return pd.DataFrame([{column: getattr(info, column) for column in columns} for info in infos], columns=columns)


@dataclass
class Position:
    """Where a step stands in the training.

    Attributes:
        step: number of the optimizer step, counted from 0.
        epoch: number of the epoch.
        rank: rank of the process.
    """

    step: int
    epoch: int
    rank: int = 0


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
        residual: of the last ledger, NaN before the first one.
    """

    module: nn.Module
    tracked: Sequence[TrackedParameter]
    records: Sequence[Record]
    writer: TraceWriter
    quantity: Quantity = "shift"
    ledger_every_n_steps: int | None = 50
    low_precision: bool = False
    _engine: TapeEngine = field(default_factory=TapeEngine, init=False)
    _pending: list[MicroBatch] = field(default_factory=list, init=False)
    _losses: list[Tensor] = field(default_factory=list, init=False)
    _reference: dict[str, Tensor] = field(default_factory=dict, init=False)
    _division: StepDivision | None = field(default=None, init=False)
    _edited: bool = field(default=False, init=False)
    _rules: dict[int, UpdateRule] = field(default_factory=dict, init=False)
    _last_ledger: int | None = field(default=None, init=False)
    _stored_step: int | None = field(default=None, init=False)
    _norm: float = field(default=float("nan"), init=False)
    _sum_error: float = field(default=float("nan"), init=False)
    residual: float = field(default=float("nan"), init=False)

    def __post_init__(self) -> None:
        self.infos = parameter_infos(self.tracked)

    def parameters(self) -> dict[str, Tensor]:
        """Return the tracked parameters by name, as the module holds them now."""
        current = dict(self.module.named_parameters(remove_duplicate=False))
        return {p.name: current.get(p.name, p.tensor) for p in self.tracked}

    def tape(self, batch: Any, n_samples: int) -> Tape:
        """Return a tape to be active during the forward pass of a micro-batch of ``n_samples`` samples."""
        return self._engine.tape(self.parameters(), batch, n_samples)

    def add_micro_batch(self, tape: Tape, loss: Tensor, sample_ids: np.ndarray, probe: Probe) -> None:
        """Take a micro-batch whose backward pass is done.

        Args:
            tape: the tape that was active in its forward pass.
            loss: the loss that was back-propagated.
            sample_ids: int64, shape (sample,), in slot order.
            probe: runs the model on the batch and on the batch permuted, see `capture.probe.PermutationProbe`.
        """
        micro_batch = self._engine.collect(tape, len(sample_ids), probe)
        micro_batch.sample_ids = sample_ids
        self._pending.append(micro_batch)
        self._losses.append(loss.detach())
        # Here, before hooks of the user change the gradients: what they do is measured together with clipping.
        reached = {name: p.grad for name, p in self.parameters().items() if p.grad is not None}
        self._reference = dict(zip(reached, copy_gradients(list(reached.values())), strict=True))

    def drop_pending(self) -> None:
        """Forget micro-batches whose gradients were thrown away (a new accumulation begins)."""
        self._pending.clear()
        self._losses.clear()
        self._reference = {}
        self._division = None

    def before_step(self, optimizer: Optimizer, position: Position, loss_scale: float = 1.0) -> None:
        """Keep what the division of the step needs; called before clipping.

        Raises:
            UnattributableError: the shares of a parameter don't add up to its gradient.
        """
        if not self._pending:
            return
        if id(optimizer) not in self._rules:
            self._rules[id(optimizer)] = explain(optimizer)
        every = self.ledger_every_n_steps
        first = self._last_ledger is None
        ledger = every is not None and (self._last_ledger is None or position.step - self._last_ledger >= every)
        rule = self._rules[id(optimizer)]
        reference = self._reference
        if loss_scale != 1.0:
            reference = {name: gradient / loss_scale for name, gradient in reference.items()}
        self._division = StepDivision.begin(optimizer, rule, self.parameters(), ledger, loss_scale, reference)
        self._norm = gradient_norm(optimizer)
        self._sum_error = self._check(self._division.gradients, loss_scale) if first or ledger else float("nan")
        if first or ledger:
            self._last_ledger = position.step

    def after_step(self, position: Position) -> None:
        """Divide the step that was just made, reduce it, and append it to the trace."""
        division, self._division = self._division, None
        if division is None:
            return
        division.complete()
        self._say_if_edited(division.unexplained)
        shifts = self._shifts(division, self.quantity)
        shifts.number = position.step
        first = self.writer.n_occurrences
        rows: dict[str, np.ndarray] = {}
        # By name, so that TopK per step comes after TopK per sample and takes over what that found.
        for record in sorted(self.records, key=lambda record: record.group):
            if record.due(position.step):
                self.writer.declare(record.later_specs(shifts))
                rows.update(record.rows(shifts, first))
        ledger = self._balance(division, shifts if self.quantity == "shift" else None)
        nonfinite = sum(int((~np.isfinite(r)).sum()) for r in rows.values() if np.issubdtype(r.dtype, np.floating))
        row = {
            "step": position.step,
            "epoch": position.epoch,
            "loss": float(torch.stack([loss.double() for loss in self._losses]).sum()) / division.loss_scale,
            "lr": [setting(group.get("lr")) for group in division.optimizer.param_groups],
            "momentum": [first_momentum(group) for group in division.optimizer.param_groups],
            "grad_norm": self._norm,
            "clip_factor": division.clip_factor(),
            "residual": ledger.residual,
            "rounding": ledger.rounding,
            "sum_error": self._sum_error,
            "nonfinite": nonfinite,
            "skipped": False,
            "n_occurrences": shifts.n_occurrences,
        }
        self.writer.append_step(row, self._occurrences(position), rows)
        self.drop_pending()

    def store_weights(self, step: int) -> None:
        """Append all weights of the model as they are before optimizer step ``step``; a step is stored once."""
        if step != self._stored_step:
            values = {name: p.detach().to("cpu", copy=True).numpy() for name, p in self.module.named_parameters()}
            self.writer.append_weights(step, values)
            self._stored_step = step

    def _check(self, gradients: Mapping[str, Tensor], loss_scale: float) -> float:
        """Compare sums with gradients; the first time, also ask whether any tracked parameter is used at all."""
        true = {name: gradient * loss_scale for name, gradient in gradients.items()} if loss_scale != 1 else gradients
        used = {name for m in self._pending for name in m.shares} | set(gradients)
        if not used:
            names = ", ".join(f"`{p.name}`" for p in self.tracked[:5])
            raise UnattributableError(
                f"GradTrace: none of the tracked parameters ({names}{', ...' if len(self.tracked) > 5 else ''}) took "
                "part in the loss of the first captured step. Track parameters that the training uses: "
                "`GradTrace(params=...)` takes globs on names, or a predicate(name, parameter)."
            )
        unused = [f"`{p.name}`" for p in self.tracked if p.name not in used]
        if unused and self._last_ledger is None:
            warnings.warn(
                f"GradTrace: {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''} took no part in the loss of "
                "the first captured step; their shifts are zero until they do",
                stacklevel=2,
            )
        errors = sum_errors(self._pending, true, self._norm)
        check_sums(errors, true, self.low_precision)
        finite = [error for error in errors.values() if np.isfinite(error)]
        return max(finite) if finite else float("nan")

    def _balance(self, division: StepDivision, shifts: StepShifts | None) -> Balance:
        if not division.ledger:
            return Balance()
        shifts = self._shifts(division, "shift") if shifts is None else shifts
        by_name = {p.info.name: p for p in shifts.parameters}
        ledger = division.balance(lambda name: by_name[name].total())
        self.residual = ledger.residual
        return ledger

    def _say_if_edited(self, names: Sequence[str]) -> None:
        """Warn once where something was added to gradients between the backward pass and the step."""
        if names and not self._edited:
            self._edited = True
            warnings.warn(
                "GradTrace: between the backward pass and the optimizer's step the gradients of "
                f"{', '.join(f'`{name}`' for name in names[:5])}{', ...' if len(names) > 5 else ''} were changed by "
                "more than a factor: something was added to them (noise, a penalty, a projection), by a hook or by "
                "`configure_gradient_clipping`. What was added is no sample's share; the `residual` shows it",
                stacklevel=2,
            )

    def _shifts(self, division: StepDivision, quantity: Quantity) -> StepShifts:
        parameters = []
        for info in self.infos:
            name, shift = info.name, quantity == "shift"
            scale = division.scale(name) if shift else 1.0 / division.loss_scale
            shares: list[Share | None] = [m.shares.get(name) if scale is not None else None for m in self._pending]
            if shift:
                shares = [None if share is None else division.share(name, share) for share in shares]
            parameters.append(ParameterShifts(info, 1.0 if scale is None else scale, shares, division.gain(name)))
        return StepShifts([m.n_samples for m in self._pending], parameters)

    def _occurrences(self, position: Position) -> dict[str, np.ndarray]:
        sizes = [m.n_samples for m in self._pending]
        n = sum(sizes)
        return {
            "step": np.full(n, position.step, np.int64),
            "micro_batch": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            "slot": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            "rank": np.full(n, position.rank, np.int32),
            "sample_id": np.concatenate([m.sample_ids for m in self._pending]),
        }
