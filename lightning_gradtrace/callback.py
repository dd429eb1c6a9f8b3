"""GradTrace, the Lightning callback: tells the tracer what happens when, and holds no mathematics.

Order of events in one training step of Lightning's automatic optimisation, and what is done at each:

    on_train_batch_start       sample ids and inputs of the batch; the tape becomes active
      training_step            the forward pass; the tape sees every use of a tracked parameter
    on_before_zero_grad        gradients are thrown away, and with them the shares that belonged to them
    on_before_backward         the tape is no longer active
      backward                 hooks on the outputs of the uses receive the cotangents
    on_after_backward          shares of the micro-batch
    on_before_optimizer_step   gradients before clipping, the optimizer's memory, the check of the sums
      clipping, optimizer step
    step hook of the optimizer shifts, records, ledger, and the row in the store
    on_train_batch_end         nothing is left active
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, Literal, ParamSpec

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradtrace.capture.batch import count_samples, find_batch_axis, token_ids
from lightning_gradtrace.capture.parameters import ParameterFilter, select_parameters
from lightning_gradtrace.capture.probe import probe
from lightning_gradtrace.capture.sample_ids import CallableIds, IdSource, KeyIds, SamplerIds, UnknownIds, keys_of
from lightning_gradtrace.capture.tape import Tape, deactivate
from lightning_gradtrace.provenance import describe_model, describe_optimizers, plain, versions
from lightning_gradtrace.record import Record, TopK
from lightning_gradtrace.store.writer import TraceWriter
from lightning_gradtrace.tracer import Position, Tracer, parameter_infos, parameter_table

P = ParamSpec("P")
_LOW_PRECISION = ("16", "bf16", "transformer-engine")


def _guarded(
    hook: Callable[Concatenate[GradTrace, P], None],
) -> Callable[Concatenate[GradTrace, P], None]:
    """Run a hook only while a trace is being written, and treat its errors as `on_error` says."""

    @functools.wraps(hook)
    def run(self: GradTrace, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._tracer is None:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._close(complete=False, reason=reason)
            if self.on_error == "raise":
                raise
            warnings.warn(f"GradTrace stopped recording, training goes on: {reason}", stacklevel=2)

    return run


class GradTrace(Callback):
    """Records which training sample moved which weight, at every step, without changing the training.

    Args:
        path: where the trace goes: a path, a URL (fsspec) or a zarr Store.
        record: one record or a list, e.g. ``TopK(1000)``.
        params: which parameters to track: None for matrices outside embeddings and the output head, a glob or several
            on names, or a predicate ``(name, parameter) -> bool``.
        quantity: "shift" (what the optimizer did with a sample's gradient) or "gradient".
        engine: "tape".
        every_n_steps: record every n-th optimizer step.
        batch_axis: axis of the batch's tensors that holds the samples, 0 or 1; "auto" tells by size.
        sample_ids: "auto" reads dataset indices off the batch sampler of the training dataloader; a key of a dict
            batch; or a callable(batch) -> ids. With an iterable data set "auto" numbers samples in order of arrival.
        inputs: "auto" stores the token ids of each sample once; None stores nothing; or a callable(batch) -> array
            of whole numbers, shape (sample, position), padded with -1.
        vocab: the text of every token id: a list of strings, or an object with ``decode``.
        ledger_every_n_steps: how often the ledger's residual and the check of the sums are computed; None: only the
            check, at the first captured step.
        weights_every_n_steps: how often all weights are stored, None for never.
        on_error: "raise" stops the training when a step can't be recorded; "disable" lets it go on, and the trace
            says where and why it ends.
        overwrite: replace an existing trace at ``path``. Nothing but a trace is ever replaced.
        config: anything that JSON can hold, kept in ``trace.attrs["config"]["user"]``.

    Raises:
        ValueError: an argument is out of range; the message lists what is allowed.

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
        engine: Literal["tape"] = "tape",
        every_n_steps: int = 1,
        batch_axis: Literal["auto", 0, 1] = "auto",
        sample_ids: str | Callable[[Any], Any] = "auto",
        inputs: Literal["auto"] | Callable[[Any], Any] | None = "auto",
        vocab: Any = None,
        ledger_every_n_steps: int | None = 50,
        weights_every_n_steps: int | None = None,
        on_error: Literal["raise", "disable"] = "raise",
        overwrite: bool = False,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.records = [TopK(1000)] if record is None else [record] if isinstance(record, Record) else list(record)
        self.params = params
        self.quantity = quantity
        self.engine = engine
        self.every_n_steps = every_n_steps
        self.batch_axis = batch_axis
        self.sample_ids = sample_ids
        self.inputs = inputs
        self.vocab = keys_of(vocab)
        self.ledger_every_n_steps = ledger_every_n_steps
        self.weights_every_n_steps = weights_every_n_steps
        self.on_error = on_error
        self.overwrite = overwrite
        self.config = config
        self._check_arguments()
        self._tracer: Tracer | None = None
        self._tape: Tape | None = None
        self._ids: IdSource = UnknownIds()
        self._samplers: list[SamplerIds] = []
        self._hooks: list[Any] = []
        self._restore_strategy: Callable[[], None] | None = None
        self._batch: tuple[Any, int, np.ndarray, int] | None = None
        self._loss: Tensor | None = None
        self._position: Position | None = None
        self._axis: int | None = None
        self._n_arrived = 0
        self._stored_inputs: set[int] = set()

    def _check_arguments(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "quantity": ("shift", "gradient"),
            "engine": ("tape",),
            "batch_axis": ("auto", 0, 1),
            "on_error": ("raise", "disable"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`GradTrace({name}={getattr(self, name)!r})`: expected one of {', '.join(f'`{v}`' for v in values)}"
                )
        for name in ("every_n_steps", "ledger_every_n_steps", "weights_every_n_steps"):
            value = getattr(self, name)
            optional = name != "every_n_steps"
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                expected = "a whole number of steps, at least 1" + (", or None" if optional else "")
                raise ValueError(f"`GradTrace({name}={value!r})`: expected {expected}")
        groups = [record.group for record in self.records]
        if not groups or len(set(groups)) < len(groups):
            raise ValueError(
                f"`GradTrace(record=...)`: found records {self.records}, expected at least one and no two that write "
                "the same arrays"
            )

    @property
    @override
    def state_key(self) -> str:
        return f"GradTrace[{self.path}]"

    # --- a run begins -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"GradTrace records one process, but the Trainer runs {trainer.world_size}. Use `Trainer(devices=1)`."
            )
        select_parameters(pl_module, self.params)  # a filter that matches nothing is said before any data is loaded
        self._watch_dataloaders(trainer)

    def _watch_dataloaders(self, trainer: pl.Trainer) -> None:
        """Record the batch sampler of each training dataloader from its first batch on.

        Lightning makes the first epoch's iterator, and workers begin to fetch, before `on_train_start`; the strategy's
        `process_dataloader` is where a loader passes after Lightning has finished it and before it is iterated.
        """
        self._stop_watching()
        if self.sample_ids != "auto":
            return
        strategy, original = trainer.strategy, trainer.strategy.process_dataloader

        def process_dataloader(loader: object) -> object:
            loader = original(loader)
            if trainer.training and SamplerIds.applies_to(loader):
                self._samplers.append(SamplerIds(loader))  # type: ignore[arg-type]
            return loader

        strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]
        self._restore_strategy = functools.partial(strategy.__dict__.pop, "process_dataloader", None)

    def _stop_watching(self) -> None:
        if self._restore_strategy is not None:
            self._restore_strategy()
            self._restore_strategy = None
        for sampler in self._samplers:
            sampler.restore()
        self._samplers.clear()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tracked = select_parameters(pl_module, self.params)
        self._ids = self._id_source(trainer)
        self._n_arrived = 0
        self._axis = None if self.batch_axis == "auto" else self.batch_axis
        self._stored_inputs.clear()
        infos = parameter_infos(tracked)
        groups = max((len(optimizer.param_groups) for optimizer in trainer.optimizers), default=1)
        writer = TraceWriter(
            self.path,
            params=parameter_table(infos),
            specs=[spec for record in self.records for spec in record.specs(infos)],
            attrs=self._attributes(trainer, pl_module),
            n_groups=groups,
            overwrite=self.overwrite,
            vocab=self.vocab,
        )
        self._tracer = Tracer(
            pl_module,
            tracked,
            self.records,
            writer,
            self.quantity,
            self.ledger_every_n_steps,
            str(trainer.precision).startswith(_LOW_PRECISION),
        )
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._after_optimizer_step))

    def _id_source(self, trainer: pl.Trainer) -> IdSource:
        if callable(self.sample_ids):
            return CallableIds(self.sample_ids)
        if self.sample_ids != "auto":
            return KeyIds(self.sample_ids)
        if len(self._samplers) == 1:
            return self._samplers[0]
        what = "several training dataloaders" if self._samplers else "a training dataloader without dataset indices"
        warnings.warn(
            f"GradTrace: {what}: samples are numbered in the order of their arrival, every occurrence as a sample of "
            "its own. Give `sample_ids=` a key of the batch or a callable(batch) -> ids to tell samples apart.",
            stacklevel=2,
        )
        return UnknownIds()

    def _attributes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        names = ("params", "quantity", "engine", "every_n_steps", "batch_axis", "sample_ids", "inputs")
        names += ("ledger_every_n_steps", "weights_every_n_steps", "on_error")
        arguments = {name: getattr(self, name) for name in names}
        settings = {**arguments, "record": [repr(record) for record in self.records]}
        trainer_settings = {
            "max_epochs": trainer.max_epochs,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            "precision": trainer.precision,
        }
        return {
            "quantity": self.quantity,
            "versions": versions(),
            "model": describe_model(pl_module),
            "optimizer": describe_optimizers(trainer.optimizers),
            "config": plain(
                {"gradtrace": settings, "trainer": trainer_settings, "hparams": pl_module.hparams, "user": self.config}
            ),
        }

    # --- a training step ----------------------------------------------------------------------------------------

    @override
    @_guarded
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        ids = self._ids.ids(batch)
        n_samples = count_samples(batch, self._axis, None if ids is None else len(ids))
        if self._axis is None:
            few = None if ids is None else functools.partial(self._ids.items, ids[:3])
            axis = find_batch_axis(batch, n_samples, few) if ids is not None else 0
            self._axis = axis if n_samples > 1 else None
        else:
            axis = self._axis
        if ids is None:
            ids = np.arange(self._n_arrived, self._n_arrived + n_samples)
        self._n_arrived += n_samples
        if trainer.global_step % self.every_n_steps:
            return
        assert self._tracer is not None
        self._store_weights(trainer.global_step)
        self._store_inputs(batch, ids, axis)
        self._batch = (batch, batch_idx, ids, axis)
        self._tape = self._tracer.tape()
        self._tape.__enter__()

    @override
    @_guarded
    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._tracer is not None
        self._tracer.drop_pending()

    @override
    @_guarded
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._tape is None:
            return
        deactivate(self._tape)
        if not loss.requires_grad:
            raise ValueError(
                "GradTrace: the loss needs no gradient: `training_step` returned a tensor that no trainable parameter "
                "led to. Return the loss itself, not a detached copy, and compute it with gradients enabled."
            )
        self._loss = loss.detach()

    @override
    @_guarded
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._tape is None or self._batch is None or self._loss is None:
            return
        assert self._tracer is not None
        batch, batch_idx, ids, axis = self._batch
        run = functools.partial(_forward_only, trainer, pl_module, batch_idx)
        look = functools.partial(probe, pl_module, self._tracer.parameters(), run, batch, len(ids), axis)
        self._tracer.add_micro_batch(self._tape, self._loss, ids, look)
        self._tape, self._batch, self._loss = None, None, None

    @override
    @_guarded
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._tracer is not None
        self._position = Position(trainer.global_step, trainer.current_epoch, trainer.global_rank)
        self._tracer.before_step(optimizer, self._position)

    @_guarded
    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._position is not None:
            assert self._tracer is not None
            self._tracer.after_step(self._position)
            self._position = None

    @override
    @_guarded
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._drop_tape()  # still there if `training_step` returned None

    def _store_inputs(self, batch: Any, ids: np.ndarray, axis: int) -> None:
        """Store the token ids of samples that are seen for the first time."""
        if self.inputs is None:
            return
        new = [slot for slot, i in enumerate(ids.tolist()) if i not in self._stored_inputs]
        if not new:
            return
        if callable(self.inputs):
            tokens = np.asarray(self.inputs(batch))
        else:
            found = token_ids(batch, len(ids), axis)
            if found is None:
                return
            tokens = found.cpu().numpy()
        if tokens.ndim != 2 or len(tokens) != len(ids) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"GradTrace: inputs have shape {tokens.shape} and dtype {tokens.dtype}, expected whole numbers of "
                f"shape ({len(ids)}, position). Let `inputs=callable(batch)` return one row of token ids per sample, "
                "or give `inputs=None`."
            )
        assert self._tracer is not None
        tokens = tokens[new].astype(np.int32)
        self._tracer.writer.append_samples(ids[new], tokens, (tokens >= 0).sum(1).astype(np.int32))
        self._stored_inputs.update(ids[new].tolist())

    def _store_weights(self, step: int, last: bool = False) -> None:
        every = self.weights_every_n_steps
        if self._tracer is not None and every is not None and (last or step % every == 0):
            self._tracer.store_weights(step)

    # --- a run ends ---------------------------------------------------------------------------------------------

    @override
    @_guarded
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._store_weights(trainer.global_step, last=True)
        self._close(complete=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(complete=False, reason=f"{type(exception).__name__}: {exception}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(complete=False, reason="the training ended without a word")

    def _drop_tape(self) -> None:
        if self._tape is not None:
            deactivate(self._tape)
        self._tape, self._batch, self._loss = None, None, None

    def _close(self, *, complete: bool, reason: str | None = None) -> None:
        """Leave nothing behind: no mode, no hook, no watched dataloader, no open store. Idempotent."""
        tracer, self._tracer = self._tracer, None
        self._drop_tape()
        self._stop_watching()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._position = None
        if tracer is not None:
            tracer.writer.close(complete=complete, end_reason=reason)


def _forward_only(trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int, batch: Any) -> None:
    """Run the user's `training_step` for its forward pass; what it logs goes nowhere."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "GradTrace: sizes don't tell which axis holds the samples, and with manual optimization the forward pass "
            "can't be repeated to find out. Use a batch size that is no size of another axis."
        )
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    with _silenced(pl_module), trainer.precision_plugin.train_step_context():
        pl_module.training_step(batch, batch_idx) if takes_index else pl_module.training_step(batch)


@contextmanager
def _silenced(pl_module: pl.LightningModule) -> Iterator[None]:
    """Let `self.log` and `self.log_dict` do nothing for a while."""
    names = ("log", "log_dict")
    for name in names:
        object.__setattr__(pl_module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in names:
            with suppress(AttributeError):
                object.__delattr__(pl_module, name)


