"""What the ranks do when one of them fails, is killed, or goes on from a checkpoint."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import BatchSampler, DataLoader

from lightning_gradtrace import GradTrace, TopK
from lightning_gradtrace.store import TraceWriter
from lightning_gradtrace.store.durable import DurableLocalStore
from tests.ranks.training import RANKS, Sharded, fit, make, trace_callback, weights
from tests.test_callback import Model, Sentences

FAILS_AT = 3
N_BATCHES = 3


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def train(*callbacks: pl.Callback, sharded: bool = False, **options: Any) -> dict[str, Any]:
    """Train by DDP, or by FSDP2."""
    model = make(Sharded if sharded else Model)
    strategy = (
        ModelParallelStrategy(RANKS, 1, process_group_backend="gloo")
        if sharded
        else DDPStrategy(process_group_backend="gloo")
    )
    fit(model, *callbacks, strategy=strategy, **options)
    found = weights(model)
    return {name: (weight.full_tensor() if sharded else weight).numpy() for name, weight in found.items()}


# --- an error on one rank ------------------------------------------------------------------------------------------


class _Fails:
    """Calls a function, but fails on rank 1 when it is called for the n-th time."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.left = function, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if rank() == 1 and self.left < 0:
            raise RuntimeError("out of luck")
        return self.function(*args, **kwargs)


def spoil(where: str) -> None:
    """Let something fail on rank 1 in the step `FAILS_AT`."""
    from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice, TokenPasses
    from lightning_gradtrace.capture.intake.arrival import BatchReader
    from lightning_gradtrace.ranks import sums
    from lightning_gradtrace.training import tracer
    from lightning_gradtrace.update.division import StepDivision

    def replace(owner: Any, name: str, at: int = FAILS_AT) -> None:
        fails = _Fails(getattr(owner, name), at)
        setattr(owner, name, lambda *args, **kwargs: fails(*args, **kwargs))

    if where in ("batch", "tokens: batch"):
        replace(BatchReader, "read")
    elif where == "tokens: beginning":
        replace(tracer.Tracer, "passes")
    elif where == "tokens: choice":
        replace(TokenChoice, "mask")
    elif where == "tokens: shares":
        replace(TokenPasses, "collect", 2 + 3 * FAILS_AT + 1)  # two passes tell whose the rows are, then three a step
    elif where == "backward":
        replace(tracer.Tracer, "end_pass")
    elif where == "before the step":
        replace(tracer.Tracer, "before_step")
    elif where == "after the step":
        replace(StepDivision, "complete")
    elif where == "sum":
        replace(sums, "total_share", 8 * FAILS_AT + 2)  # eight parameters in every step
    elif where == "comparison":
        replace(sums, "_square", 16 * FAILS_AT + 15)  # two squares for each of them
    elif where == "record":
        replace(TopK, "reduce", 2 * FAILS_AT)
    else:
        replace(TraceWriter, "append_step")


def fail(folder: Path, where: str, on_error: str, sharded: bool = False) -> Any:
    """Train with a callback that fails on rank 1; weights, error and warnings."""
    spoil(where)
    found: dict[str, Any] = {}
    path = folder / f"{where}-{on_error}{'-sharded' * sharded}.zarr"
    tokens = {"tokens": {"tokens": None}} if where.startswith("tokens") else {}
    trace = trace_callback(path, ledger_every_n_steps=1, on_error=on_error, **tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found["weights"] = train(trace, sharded=sharded)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
    found["warnings"] = [str(w.message) for w in caught if "stopped recording" in str(w.message)]
    return found


def interrupted(folder: Path) -> Any:
    """A pass of the loss tokens breaks off in the middle, on all ranks; weights and error."""
    from lightning_gradtrace.capture.engines.loss_tokens import TokenPasses
    from lightning_gradtrace.capture.forward.use import Use

    make, receive = TokenPasses.make, Use.receive
    counts = {"pass": 0, "use": 0}

    def counted(*args: Any) -> None:
        counts.update({"pass": counts["pass"] + 1, "use": 0})
        make(*args)

    def breaks(*args: Any) -> None:
        counts["use"] += 1
        if counts["pass"] == 2 + 3 * FAILS_AT + 1 and counts["use"] == 6:
            raise RuntimeError("out of luck")
        receive(*args)

    TokenPasses.make, Use.receive = counted, breaks  # type: ignore[method-assign, assignment]
    trace = trace_callback(folder / "interrupted.zarr", on_error="disable", tokens={"tokens": None})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(trace, sharded=True)
    return found, [str(w.message) for w in caught if "stopped recording" in str(w.message)]


def plain(folder: Path, sharded: bool = False) -> Any:
    return train(sharded=sharded)


def no_place(folder: Path) -> Any:
    """Rank 1 can't write where it should."""
    if rank() == 1:

        def refuse(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        DurableLocalStore.write = refuse  # type: ignore[method-assign, assignment]
    return error_of(trace_callback(folder / "no-place.zarr"))


def error_of(trace: GradTrace) -> str | None:
    """Train, and say which error came of it."""
    try:
        train(trace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def taken(folder: Path) -> Any:
    """Somebody's files are in the way of all ranks."""
    if rank() == 0:
        (folder / "taken.zarr").mkdir()
        (folder / "taken.zarr" / "thesis.tex").write_text("dear")
    return error_of(trace_callback(folder / "taken.zarr", overwrite=True))


# --- a rank is killed ----------------------------------------------------------------------------------------------


class Kill(pl.Callback):
    """Ends a rank, or all of them, before a step."""

    def __init__(self, step: int, how: Any) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if isinstance(self.how, BaseException):
                raise self.how
            os.kill(os.getpid(), self.how)


class Flush(pl.Callback):
    """Makes everything visible before a step."""

    def __init__(self, trace: GradTrace, step: int) -> None:
        self.trace, self.step = trace, step

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            assert self.trace._run is not None
            self.trace._run.tracer.writer.flush()


def killed(folder: Path, sharded: bool = False) -> Any:
    """Rank 1 is killed before step 4; rank 0 has committed every step then, rank 1 the first two."""
    trace = trace_callback(folder / f"killed{'-sharded' * sharded}.zarr")
    train(trace, *([Flush(trace, 2), Kill(4, signal.SIGKILL)] if rank() == 1 else []), sharded=sharded)


def whole(folder: Path) -> Any:
    """Train by FSDP2 to the end."""
    train(trace_callback(folder / "whole-sharded-run.zarr"), sharded=True)


# --- a checkpoint --------------------------------------------------------------------------------------------------


class Resumable(BatchSampler):
    """Batches of this rank in an order that depends on the epoch alone, from any step on."""

    def __init__(self, first_step: int = 0) -> None:
        self.epoch, self.skip = divmod(first_step, N_BATCHES)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(22, generator=torch.Generator().manual_seed(self.epoch)).tolist()[rank() :: 2]
        batches = [order[i : i + 4] for i in range(0, len(order), 4)]
        skip, self.skip, self.epoch = self.skip, 0, self.epoch + 1
        yield from batches[skip:]

    def __len__(self) -> int:
        return N_BATCHES


def stoppable(path: Path, *callbacks: pl.Callback, step: int = 0, **options: Any) -> None:
    loader = DataLoader(Sentences(), batch_sampler=Resumable(step))
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"use_distributed_sampler": False, "enable_checkpointing": saves, "max_epochs": 3}
    records = [TopK(7), TopK(9, per="step", schedule=2)]
    trace = GradTrace(path, records, ledger_every_n_steps=4, weights_every_n_steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        train(trace, *callbacks, loader=loader, **settings, **options)


def resumed(folder: Path, sharded: bool = False) -> Any:
    """Train to the end; and again, stop before step 7 and go on from the checkpoint of step 4."""
    place = folder / "sharded" if sharded else folder
    stoppable(place / "whole.zarr", sharded=sharded)
    saver = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    try:
        stoppable(place / "resumed.zarr", Kill(7, RuntimeError("stopped")), saver, sharded=sharded)
    except RuntimeError as error:
        assert "stopped" in str(error)
    stoppable(place / "resumed.zarr", step=4, ckpt_path=place / "step=4.ckpt", sharded=sharded)


def resumed_alone(folder: Path) -> Any:
    """One process wants to go on from the checkpoint of two."""
    try:
        fit(make(Model), GradTrace(folder / "resumed.zarr"), ckpt_path=folder / "step=4.ckpt", max_epochs=3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def forked(folder: Path, strategy: str = "ddp_fork") -> Any:
    """Lightning starts the processes itself."""
    fit(make(Model), trace_callback(folder / f"{strategy}.zarr"), strategy=strategy)
