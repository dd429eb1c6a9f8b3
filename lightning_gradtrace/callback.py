"""GradTrace, the Lightning callback: tells the tracer what happens when, and holds no mathematics.

Order of events in one training step of Lightning's automatic optimisation, and what is done at each:

    on_train_batch_start       sample ids and inputs of the batch; the tape becomes active
      training_step            the forward pass; the tape sees every use of a tracked parameter
    on_before_zero_grad
    on_before_backward         which gradients are still there, and which were zeroed
      backward                 hooks on the outputs of the uses receive the cotangents; checkpointed layers run again
    on_after_backward          shares of the backward pass; gradients before hooks and clipping; the tape ends
    on_before_optimizer_step   the optimizer's memory, the check of the sums
      clipping, optimizer step
    step hook of the optimizer shifts, records, ledger, and the row in the store
    on_train_batch_end         a step that the GradScaler skipped is recorded as such; nothing is left active

With manual optimization the middle part happens inside `training_step`, in any order and number; the tape then stays
until the end of the batch and only rests while an optimizer steps.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradtrace.arguments import as_records, check_settings, check_trainer
from lightning_gradtrace.capture.compiled import check_not_compiled
from lightning_gradtrace.capture.engines.choice import make_engine
from lightning_gradtrace.capture.engines.sample_losses import PerSampleLoss
from lightning_gradtrace.capture.intake.arrival import BatchReader
from lightning_gradtrace.capture.intake.inputs import vocabulary
from lightning_gradtrace.capture.intake.sample_ids import CallableIds, DataloaderWatch, IdSource, KeyIds
from lightning_gradtrace.capture.parameters import ParameterFilter, select_parameters
from lightning_gradtrace.capture.probing.rehearsal import loss_factor, rehearse
from lightning_gradtrace.guard import guarded, refuse_to_resume
from lightning_gradtrace.provenance import trace_attributes
from lightning_gradtrace.ranks.beginning import check_parameters, check_strategy, open_writer
from lightning_gradtrace.ranks.checkpoint import state_of_rank
from lightning_gradtrace.ranks.meeting import Ranks
from lightning_gradtrace.record import ParameterInfo, Record, Schedule, TopK
from lightning_gradtrace.record.outlook import look_ahead, samples_per_step
from lightning_gradtrace.record.parameters import parameter_infos, parameter_table
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.training.run import Run
from lightning_gradtrace.training.tracer import Tracer

_LOW_PRECISION = ("16", "bf16", "transformer-engine")


def _thawing(trainer: pl.Trainer) -> int:
    """Return the number of callbacks that will unfreeze parameters, which adds a group of them."""
    return sum(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class GradTrace(Callback):
    """Records which training sample moved which weight, at every step, without changing the training.

    Args:
        path: where the trace goes: a path, a URL (fsspec) or a zarr Store.
        record: one record or a list, e.g. ``TopK(1000)``.
        params: which parameters to track: None for matrices outside embeddings and the output head, a glob or several
            on names, or a predicate ``(name, parameter) -> bool``.
        quantity: "shift" (what the optimizer did with a sample's gradient) or "gradient".
        engine: "tape" sees the real forward and backward pass; "functional" differentiates ``per_sample_loss``.
        per_sample_loss: callable(module, batch) -> losses, shape (sample,), that add up to the training step's loss.
        every_n_steps: record every n-th optimizer step.
        batch_axis: axis of the batch's tensors that holds the samples, 0 or 1; "auto" tells by size.
        sample_ids: "auto" reads dataset indices off the batch sampler of the training dataloader; a key of a dict
            batch; or a callable(batch) -> ids. With an iterable data set "auto" numbers samples in order of arrival.
        inputs: "auto" stores the token ids of each sample once; None stores nothing; or a callable(batch) -> array
            of whole numbers, shape (sample, position), padded with -1.
        vocab: the text of every token id: a list of strings, or an object with ``decode``.
        ledger_every_n_steps: how often the ledger's residual and the check of the sums are computed; None: only the
            check, at the first captured step.
        log_residual: show the last residual in the progress bar and log it, as ``gradtrace/residual``.
        weights_every_n_steps: how often all weights are stored, or at which steps (a `Schedule`), None for never.
        on_error: "raise" stops the training when a step can't be recorded; "disable" lets it go on, and the trace
            says where and why it ends.
        overwrite: replace an existing trace at ``path``. Nothing but a trace is ever replaced.
        config: anything that JSON can hold, kept in ``trace.attrs["config"]["user"]``.

    Raises:
        ValueError: an argument is out of range (a TypeError: of another kind); the message lists what is allowed.

    Example::

        >>> from lightning_gradtrace import GradTrace, TopK
        >>> callback = GradTrace("runs/a.zarr", record=TopK(1000))
        >>> # Trainer(callbacks=[callback]).fit(model, datamodule)
    """

    def __init__(
        self,
        path: Any,
        record: Record | Sequence[Record] | None = None,
        params: ParameterFilter = None,
        quantity: Literal["shift", "gradient"] = "shift",
        engine: Literal["tape", "functional"] = "tape",
        per_sample_loss: PerSampleLoss | None = None,
        every_n_steps: int = 1,
        batch_axis: Literal["auto", 0, 1] = "auto",
        sample_ids: str | Callable[[Any], Any] = "auto",
        inputs: Literal["auto"] | Callable[[Any], Any] | None = "auto",
        vocab: Any = None,
        ledger_every_n_steps: int | None = 50,
        log_residual: bool = False,
        weights_every_n_steps: int | Schedule | None = None,
        on_error: Literal["raise", "disable"] = "raise",
        overwrite: bool = False,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.records = [TopK(1000)] if record is None else as_records(record)
        self.params = params
        self.quantity = quantity
        self.engine = engine
        self.per_sample_loss = per_sample_loss
        self.every_n_steps = every_n_steps
        self.batch_axis = batch_axis
        self.sample_ids = sample_ids
        self.inputs = inputs
        self.vocab = vocabulary(vocab)
        self.ledger_every_n_steps = ledger_every_n_steps
        self.log_residual = log_residual
        self.weights_every_n_steps = weights_every_n_steps
        self.on_error = on_error
        self.overwrite = overwrite
        self.config = config
        check_settings(self)
        self._run: Run | None = None
        self._hooks: list[Any] = []
        self._watch = DataloaderWatch()
        self._state: dict[str, Any] = {}
        self._resume: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return f"GradTrace[{self.path}]"

    # --- a run begins -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, pl.Trainer)
        # Lightning loads a checkpoint after this hook; what an earlier fit left behind is none of this one's.
        self._state, self._resume = {}, {}
        check_strategy(trainer.strategy, trainer.world_size, self.records)
        check_not_compiled(pl_module)
        # A filter that matches nothing is said before any data is loaded, if the model is there already.
        if not is_overridden("configure_model", pl_module):
            select_parameters(pl_module, self.params, _thawing(trainer) > 0, self.engine == "tape")
        if self.sample_ids == "auto":
            self._watch.start(trainer.strategy, lambda: bool(trainer.training), self.on_error == "raise")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "ended" in self._resume:
            self._state = refuse_to_resume(self.path, self._resume, self.on_error)
            return
        if trainer.world_size > 1:
            check_parameters(pl_module, trainer.strategy, trainer.world_size, self.engine)
        ranks = Ranks.join() if trainer.world_size > 1 else Ranks()
        resume = state_of_rank(self._resume, ranks)
        tracked = select_parameters(pl_module, self.params, _thawing(trainer) > 0, self.engine == "tape")
        coarse = str(trainer.precision).startswith(_LOW_PRECISION)
        context, choices = trainer.precision_plugin.train_step_context, [r.choice(self.vocab) for r in self.records]
        engine = make_engine(pl_module, choices, self.per_sample_loss, context, coarse)
        infos = parameter_infos(tracked)
        self._announce(trainer, infos)
        n_groups = _thawing(trainer) + max((len(optimizer.param_groups) for optimizer in trainer.optimizers), default=1)
        writer = open_writer(
            ranks,
            self.path,
            trace_attributes(trainer, pl_module, self._settings(), self.config, tracked, self.records),
            self.overwrite,
            resume,
            params=parameter_table(infos),
            specs=[spec for record in self.records for spec in record.arrays(infos)],
            n_groups=n_groups,
            vocab=self.vocab,
        )
        every = self.ledger_every_n_steps
        tracer = Tracer(pl_module, tracked, self.records, writer, self.quantity, every, coarse, n_groups, engine, ranks)
        self._run = Run(
            tracer,
            BatchReader(self._id_source(), self.batch_axis, self.inputs),
            trainer.optimizers,
            manual=not pl_module.automatic_optimization,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            every_n_steps=self.every_n_steps,
            weights=as_schedule("GradTrace", self.weights_every_n_steps),
        )
        if resume:
            self._run.restore(resume)
        begins = functools.partial(self._step_begins, trainer)
        self._hooks = self._run.watch(begins, self._gradients_are_final, self._step_made, self._step_ended)

    def _announce(self, trainer: pl.Trainer, infos: Sequence[ParameterInfo]) -> None:
        """Say what the run is going to write, and warn if it is more than there is room for."""
        n_steps = math.inf
        with suppress(MisconfigurationException):  # accumulation that changes between epochs
            n_steps = max(0, trainer.estimated_stepping_batches - trainer.global_step)
        n_samples = samples_per_step(trainer.train_dataloader, trainer.accumulate_grad_batches * trainer.world_size)
        outlook = look_ahead(self.path, infos, self.records, n_steps, n_samples, self.every_n_steps)
        rank_zero_info(f"GradTrace: {outlook.text}")
        if not outlook.fits:
            rank_zero_warn(f"GradTrace: {outlook.warning}")

    def _id_source(self) -> IdSource:
        if callable(self.sample_ids):
            return CallableIds(self.sample_ids)
        return self._watch.source() if self.sample_ids == "auto" else KeyIds(self.sample_ids)

    def _settings(self) -> dict[str, Any]:
        elsewhere = ("path", "record", "vocab", "overwrite", "config")
        named = {name: getattr(self, name) for name in inspect.signature(GradTrace).parameters if name not in elsewhere}
        return {**named, "record": [repr(record) for record in self.records]}

    # --- a training step ----------------------------------------------------------------------------------------

    @property
    def _running(self) -> Run:
        """The run; hooks are guarded, so there is one."""
        assert self._run is not None
        return self._run

    @override
    @guarded
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._running.begin_batch(batch, batch_idx, trainer.global_step)

    @override
    @guarded
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._running.tracer.accumulation.passed_over(id(optimizer))

    @override
    @guarded
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._running.before_backward(loss, functools.partial(rehearse, trainer, pl_module))

    @override
    @guarded
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running.after_backward(functools.partial(rehearse, trainer, pl_module), loss_factor(trainer))

    @override
    @guarded
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._running.before_step(optimizer, trainer.global_step, trainer.current_epoch, trainer.global_rank)

    @guarded
    def _step_begins(self, trainer: pl.Trainer, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        announce = functools.partial(self.on_before_optimizer_step, trainer, trainer.lightning_module, optimizer)
        self._running.step_begins(optimizer, kwargs, announce)

    @guarded
    def _gradients_are_final(self) -> None:
        self._running.gradients_are_final()

    @guarded
    def _step_made(self, optimizer: Optimizer) -> None:
        self._running.step_made(optimizer)

    @guarded
    def _step_ended(self, optimizer: Optimizer) -> None:
        self._running.step_ended(optimizer)

    @override
    @guarded
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running.finish_batch()
        residual = self._running.tracer.residual
        if self.log_residual and not math.isnan(residual):
            pl_module.log("gradtrace/residual", residual, prog_bar=True, batch_size=1)

    # --- checkpoints --------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        self._take_state()
        return dict(self._state)

    @guarded
    def _take_state(self) -> None:
        self._state = self._running.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = dict(state_dict)

    # --- a run ends ---------------------------------------------------------------------------------------------

    @override
    @guarded
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running.store_weights(trainer.global_step, last=True)
        self._take_state()
        self._close(complete=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._abandon(f"{type(exception).__name__}: {exception}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon("the training ended without a word")

    def _abandon(self, reason: str) -> None:
        """Leave nothing behind; a store that fails after the training did must not hide why."""
        try:
            self._close(complete=False, reason=reason)
        except Exception as error:
            warnings.warn(f"GradTrace could not end the trace: {type(error).__name__}: {error}", stacklevel=2)
        while self._hooks:
            self._hooks.pop().remove()

    def _close(self, *, complete: bool, reason: str | None = None) -> None:
        """Leave no mode, no watched dataloader and no open store behind; hooks may be running. Idempotent."""
        run, self._run = self._run, None
        self._watch.stop()
        if run is not None:
            try:
                run.close(complete=complete, reason=reason)
            finally:
                # Lightning may make a checkpoint after an exception.
                self._state = self._state if complete else run.lone_state()
