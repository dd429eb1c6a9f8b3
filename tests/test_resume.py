"""A training that is resumed from a checkpoint ends with the trace of the one that was never interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_gradtrace import Factored, GradTrace, Norms, TopK, Trace, open_trace
from lightning_gradtrace.store import StoreError
from tests.store.test_resuming import assert_same_arrays
from tests.test_callback import Model, Sentences

N_BATCHES, EPOCHS = 5, 2
N_STEPS = N_BATCHES * EPOCHS


class Batches(BatchSampler):
    """Batches in an order that depends on the epoch alone, from any step on: what resuming asks of a data loader."""

    def __init__(self, first_step: int = 0) -> None:
        self.epoch, self.skip = divmod(first_step, N_BATCHES)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(23, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        batches = [order[i : i + 5] for i in range(0, 23, 5)]
        skip, self.skip, self.epoch = self.skip, 0, self.epoch + 1
        yield from batches[skip:]

    def __len__(self) -> int:
        return N_BATCHES


class Kill(pl.Callback):
    """Ends the run when a number of steps is done."""

    def __init__(self, step: int, how: Any) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if isinstance(self.how, BaseException):
                raise self.how
            os.kill(os.getpid(), self.how)


class Adaptive(Model):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Renamed(Model):
    pass


def run(path: Any, *callbacks: pl.Callback, resume: Path | None = None, **options: Any) -> pl.Trainer:
    """Train, or go on from a checkpoint."""
    pl.seed_everything(3, verbose=False)
    kind, workers, step = options.pop("kind", Model), options.pop("workers", 0), options.pop("step", 0)
    loader, records = options.pop("loader", None), options.pop("records", None)
    records = records or [TopK(7), TopK(9, per="step", schedule=2), Factored(schedule=3), Norms()]
    loader = loader or DataLoader(Sentences(), batch_sampler=Batches(step), num_workers=workers)
    trace = GradTrace(path, records, **{"ledger_every_n_steps": 4, "weights_every_n_steps": 3, **options})
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=EPOCHS,
        gradient_clip_val=0.3,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=[trace, *callbacks],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        trainer.fit(kind(dropout=0.0, momentum=0.9), loader, ckpt_path=resume)
    return trainer


def saver(folder: Path, every: int = 1) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


@pytest.fixture(scope="module", params=[Model, Adaptive])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trace]:
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    run(path, kind=request.param)
    return request.param, open_trace(path)


@pytest.mark.parametrize("step, end, workers", [(2, 4, 0), (5, 8, 0), (7, 9, 2)])
def test_a_resumed_training_ends_with_the_same_trace(step, end, workers, uninterrupted, tmp_path):
    kind, expected = uninterrupted
    path = tmp_path / "a.zarr"
    with pytest.raises(RuntimeError, match="stopped"):
        run(path, Kill(end, RuntimeError("stopped")), saver(tmp_path), kind=kind)
    assert open_trace(path).n_steps == end and "stopped" in open_trace(path).attrs["end_reason"]
    run(path, kind=kind, step=step, workers=workers, resume=checkpoint(tmp_path, step), overwrite=True)
    trace = open_trace(path)
    assert_same_arrays(trace, expected)
    assert trace.attrs["complete"] and [entry["steps"] for entry in trace.attrs["resumed"]] == [step]


def stateful(how: str, step: int = 0) -> StatefulDataLoader:
    """A resumable dataloader, whose sampler keeps a state or goes over the epoch's batches again."""
    if how == "own batches":
        return StatefulDataLoader(Sentences(), batch_sampler=Batches(step // N_BATCHES * N_BATCHES))
    order, workers = torch.Generator().manual_seed(7), 2 if how == "two workers" else 0
    return StatefulDataLoader(Sentences(), 5, shuffle=True, generator=order, num_workers=workers)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("how, step", [("shuffled", 8), ("two workers", 7), ("own batches", 8)])
def test_a_stateful_dataloader_goes_on_in_the_middle_of_an_epoch(how, step, tmp_path):
    run(tmp_path / "whole.zarr", loader=stateful(how))
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "a.zarr", Kill(9, RuntimeError("stopped")), saver(tmp_path / "c"), loader=stateful(how))
    run(tmp_path / "a.zarr", loader=stateful(how, step), resume=checkpoint(tmp_path / "c", step))
    assert_same_arrays(open_trace(tmp_path / "a.zarr"), open_trace(tmp_path / "whole.zarr"))


def test_a_finished_training_may_be_prolonged(uninterrupted, tmp_path):
    kind, expected = uninterrupted
    run(tmp_path / "a.zarr", saver(tmp_path, 5), kind=kind)
    run(tmp_path / "a.zarr", kind=kind, step=5, resume=checkpoint(tmp_path, 5))
    assert_same_arrays(open_trace(tmp_path / "a.zarr"), expected)


SCRIPT = """
import sys
from pathlib import Path
from tests.test_resume import Kill, run, saver
folder, signal, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run(folder / "a.zarr", Kill(step, signal), saver(folder, 3))
"""


@pytest.mark.parametrize("name, step", [("SIGKILL", 8), ("SIGTERM", 5)])
def test_a_training_killed_by_a_signal_is_resumed_from_its_last_checkpoint(name, step, tmp_path):
    number = getattr(signal, name)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(int(number)), str(step)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    trace = open_trace(tmp_path / "a.zarr")
    last = step // 3 * 3
    assert trace.verify().ok and not trace.attrs["complete"]
    if name == "SIGKILL":
        assert done.returncode == -number and trace.n_steps == last and trace.attrs["end_reason"] is None
    else:
        assert trace.n_steps >= step
        assert "SIGTERMException" in trace.attrs["end_reason"]
    run(tmp_path / "a.zarr", step=last, resume=checkpoint(tmp_path, last))
    run(tmp_path / "b.zarr")
    assert_same_arrays(open_trace(tmp_path / "a.zarr"), open_trace(tmp_path / "b.zarr"))


class InTheFirstStep(Model):
    """Gets a signal between its first forward pass and the backward pass."""

    number = signal.SIGINT

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 0:
            os.kill(os.getpid(), self.number)
        return loss


class InTheFirstStepTerm(InTheFirstStep):
    number = signal.SIGTERM


@pytest.mark.parametrize("kind", ["InTheFirstStep", "InTheFirstStepTerm"])
def test_a_signal_in_the_middle_of_the_first_step_leaves_a_trace_that_says_so(kind, tmp_path):
    script = "import sys; from tests.test_resume import *; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "run(sys.argv[1], kind=globals()[sys.argv[2]])"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "a.zarr"), kind],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0 or kind != "InTheFirstStep"  # Lightning ends quietly on SIGTERM
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.n_steps <= 1 and trace.verify().ok and not trace.attrs["complete"]
    assert ("KeyboardInterrupt" if kind == "InTheFirstStep" else "SIGTERM") in trace.attrs["end_reason"]
    run(tmp_path / "a.zarr", overwrite=True)
    assert open_trace(tmp_path / "a.zarr").n_steps == N_STEPS


def test_another_size_of_batches_goes_on_with_the_same_trace(tmp_path):
    path = tmp_path / "a.zarr"
    run(path, saver(tmp_path, 5))
    first = open_trace(path).topk.frame(slice(0, 4))
    loader = DataLoader(Sentences(), batch_size=8, shuffle=True)
    run(path, loader=loader, resume=checkpoint(tmp_path, 5))
    trace = open_trace(path)
    assert trace.steps["n_occurrences"].tolist() == [5, 5, 5, 5, 3, 8, 8, 7] and trace.verify().ok
    assert trace.topk.frame(slice(0, 4)).equals(first) and trace.attrs["complete"]


def test_another_model_record_or_filter_is_refused_with_the_differences(tmp_path):
    path = tmp_path / "a.zarr"
    run(path, saver(tmp_path, 5))
    for options, text in (
        ({"kind": Renamed}, "model was {'class': 'tests.test_callback.Model'"),
        ({"records": [TopK(8)]}, "row shape of `topk/index` was [7], is [8]"),
        ({"params": "encoder.layers.0*weight"}, "parameter `encoder.layers.1.linear1.weight` was tracked with shape"),
        ({"quantity": "gradient"}, "quantity was shift, is gradient"),
        ({"ledger_every_n_steps": 2}, "`ledger_every_n_steps` was 4, is 2"),
    ):
        with pytest.raises(StoreError, match=re.escape(text)):
            run(path, step=5, resume=checkpoint(tmp_path, 5), **options)
    assert open_trace(path).attrs["complete"] and open_trace(path).n_steps == N_STEPS


def test_a_missing_trace_is_said_and_a_new_path_begins_a_new_trace(tmp_path):
    run(tmp_path / "a.zarr", saver(tmp_path, 5))
    os.rename(tmp_path / "a.zarr", tmp_path / "moved.zarr")
    with pytest.raises(StoreError, match="holds no trace, but the checkpoint belongs to one of 5 recorded steps"):
        run(tmp_path / "a.zarr", step=5, resume=checkpoint(tmp_path, 5))
    run(tmp_path / "b.zarr", step=5, resume=checkpoint(tmp_path, 5))
    assert open_trace(tmp_path / "b.zarr").steps.index.tolist() == list(range(5, 10))


def test_a_trace_that_was_disabled_before_the_checkpoint_is_not_resumed(tmp_path, monkeypatch):
    from lightning_gradtrace.training.tracer import Tracer

    original = Tracer.after_step

    def fail(self, *args, **options):
        if self._step is not None and self._step.position.step == 3:
            raise RuntimeError("out of luck")
        original(self, *args, **options)

    monkeypatch.setattr(Tracer, "after_step", fail)
    with pytest.warns(UserWarning, match="GradTrace stopped recording, training goes on: RuntimeError: out of luck"):
        run(tmp_path / "a.zarr", saver(tmp_path, 5), on_error="disable")
    monkeypatch.undo()
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.n_steps == 3 and trace.attrs["end_reason"] == "RuntimeError: out of luck"
    with pytest.raises(ValueError, match=r"before this checkpoint was made \(RuntimeError: out of luck\)"):
        run(tmp_path / "a.zarr", step=5, resume=checkpoint(tmp_path, 5))
    with pytest.warns(UserWarning, match="Training goes on without recording"):
        run(tmp_path / "a.zarr", step=5, resume=checkpoint(tmp_path, 5), on_error="disable")
    assert open_trace(tmp_path / "a.zarr").n_steps == 3


def test_an_error_of_the_store_does_not_hide_that_of_the_training(tmp_path, monkeypatch):
    from lightning_gradtrace.store.durable import DurableLocalStore

    def refuse(self, key, data):
        raise OSError(28, "No space left on device")

    class Full(pl.Callback):
        def on_train_batch_start(self, trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                monkeypatch.setattr(DurableLocalStore, "write", refuse)

    with (
        pytest.warns(UserWarning, match="GradTrace could not end the trace: StoreError: .*No space left on device"),
        pytest.raises(RuntimeError, match="stopped"),
    ):
        run(tmp_path / "a.zarr", Full(), Kill(4, RuntimeError("stopped")), weights_every_n_steps=None)
    assert open_trace(tmp_path / "a.zarr").verify().ok


def test_the_training_goes_on_when_the_disk_is_full_if_told_so(tmp_path, monkeypatch):
    from lightning_gradtrace.store.durable import DurableLocalStore

    class Full(pl.Callback):
        def on_train_batch_start(self, trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                monkeypatch.setattr(DurableLocalStore, "write", refuse)

    def refuse(self, key, data):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="stopped recording, training goes on: StoreError: writing the trace"):
        trainer = run(tmp_path / "a.zarr", saver(tmp_path, 3), Full(), on_error="disable")
    assert trainer.global_step == N_STEPS
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.n_steps == 3 and trace.verify().ok
    state = torch.load(checkpoint(tmp_path, 9), weights_only=False)["callbacks"]
    assert "No space left" in next(s["ended"] for key, s in state.items() if key.startswith("GradTrace"))
    np.testing.assert_array_equal(trace.steps.index, range(3))
