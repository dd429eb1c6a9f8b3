"""A training on a device: the same trace as on the CPU, the same weights as without the callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import (
    Dense,
    Division,
    Factored,
    Gains,
    GradTrace,
    Norms,
    Sketch,
    TokenGrads,
    TopK,
    Trace,
    open_trace,
)
from lightning_gradtrace.capture import precision
from lightning_gradtrace.record import Record
from tests.compatibility.cells import Place, on_cpu
from tests.device import pretend
from tests.device.devices import Device

VOCAB, WIDTH, LENGTH = 40, 32, 12

Optimizer = Callable[[Any], torch.optim.Optimizer]


class LanguageModel(pl.LightningModule):
    """A post-norm transformer, as the reference model is one."""

    def __init__(self, dropout: float, optimizer: Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, self.device, self.head.weight.dtype)
        return F.cross_entropy(
            self.head(self.encoder(self.embedding(x), mask, is_causal=True)).flatten(0, 1), y.flatten()
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1.0, momentum=0.5)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def fit(
    place: Place,
    *callbacks: pl.Callback,
    optimizer: Optimizer = sgd,
    dropout: float = 0.0,
    precision: str = "32-true",
    clip: float | None = 0.5,
) -> LanguageModel:
    pl.seed_everything(4, verbose=False)
    model = LanguageModel(dropout, optimizer)
    tokens = torch.randint(VOCAB, (64, LENGTH + 1))
    trainer = pl.Trainer(
        devices=1,
        deterministic=True,
        max_epochs=2,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **place(precision),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        trainer.fit(model, DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8))
    return model


def record(path: Path, place: Place, records: list[Record], **options) -> Trace:
    fit(place, GradTrace(path, records, ledger_every_n_steps=1), **options)
    trace = open_trace(path)
    assert trace.attrs["complete"]
    assert trace.verify().ok
    return trace


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_the_trace_is_that_of_the_cpu(optimizer: Optimizer, device: Device, tmp_path: Path) -> None:
    records: list[Record] = [TopK(50), TopK(200, per="step"), Dense(), Factored(), Sketch(16), Norms()]
    settings = {"optimizer": optimizer, "precision": "64-true"}
    cpu = record(tmp_path / "cpu.zarr", on_cpu, records, **settings)
    there = record(tmp_path / "there.zarr", device.trainer, records, **settings)
    for column in ("loss", "grad_norm", "clip_factor"):  # norms are kept in single precision
        np.testing.assert_allclose(there.steps[column], cpu.steps[column], rtol=1e-6)
    assert (there.occurrences == cpu.occurrences).all(axis=None)
    for name in cpu.params["param"]:
        a, b = np.asarray(there.dense[name][:]), np.asarray(cpu.dense[name][:])
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * np.abs(b).max())
    for one, other in zip(there.topk.blocks(), cpu.topk.blocks(), strict=True):
        # Entries within rounding of the k-th place may differ between two devices, the sizes that were kept may not.
        sizes = [np.sort(np.abs(block.shift), axis=-1) for block in (one, other)]
        np.testing.assert_allclose(*sizes, rtol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_is_the_same_bit_for_bit_and_the_ledger_closes(precision: str, device: Device, tmp_path: Path) -> None:
    settings = {"dropout": 0.2, "precision": precision}
    plain = fit(device.trainer, **settings)
    path = tmp_path / "a.zarr"
    traced = fit(device.trainer, GradTrace(path, TopK(50), ledger_every_n_steps=1), **settings)
    for (name, a), (_, b) in zip(plain.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    steps = open_trace(path).steps
    applied = steps[~steps["skipped"]]
    assert len(applied) > len(steps) / 2
    assert (applied["residual"] < (1e-5 if precision == "32-true" else 1e-2)).all()


def test_the_device_may_be_the_default_one(device: Device, tmp_path: Path) -> None:
    """What a record or the ledger keeps beside the training stays where it belongs."""
    records: list[Record] = [TopK(50), TopK(200, per="step"), Dense(), Factored(), Sketch(16), Norms()]
    records += [Gains(), Division(), TokenGrads(list(range(9)), k=20, slots=2)]
    settings = {"optimizer": adamw, "dropout": 0.2}
    with torch.device(device.name):
        plain = fit(device.trainer, **settings)
        traced = fit(device.trainer, GradTrace(tmp_path / "a.zarr", records, ledger_every_n_steps=1), **settings)
    for (name, a), (_, b) in zip(plain.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok and (trace.steps["residual"] < 1e-4).all()


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A device that is like Apple's MPS in this."""
    pretend.load()
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {pretend.NAME})
    pretend.forbid_float64(True)
    yield pretend.trainer
    pretend.forbid_float64(False)


@pytest.mark.pretend
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_device_without_float64_gives_the_trace_of_the_cpu(
    optimizer: Optimizer, without_float64: Place, tmp_path: Path
) -> None:
    records: list[Record] = [TopK(50), Dense(), Factored(), Sketch(16), Norms(), Gains(), Division()]
    records.append(TokenGrads(list(range(9)), k=20, slots=2))
    cpu = record(tmp_path / "cpu.zarr", on_cpu, records, optimizer=optimizer)
    there = record(tmp_path / "there.zarr", without_float64, records, optimizer=optimizer)
    for column in ("loss", "grad_norm", "clip_factor"):
        np.testing.assert_allclose(there.steps[column], cpu.steps[column], rtol=1e-3)
    assert (there.steps["residual"] < 1e-4).all()
    paths = [f"dense/{name}/shift" for name in cpu.params["param"]]
    for path in (*paths, "norms/norm", "division/gram"):  # Adam lifts what is nothing but rounding
        found, expected = there.array(path)[:].astype(np.float64), cpu.array(path)[:].astype(np.float64)
        assert optimizer is adamw or np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected), path


class NoWaiting(pl.Callback):
    """Lets nothing wait for the device from the forward pass to the end of the backward pass.

    It stands before GradTrace, so that it has ended when the shares are taken.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        if trainer.global_step:  # at the first batch uses are checked against autograd
            self.device.forbid_waiting()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            self.device.allow_waiting()


def test_the_forward_and_the_backward_pass_never_wait_for_the_device(device: Device, tmp_path: Path) -> None:
    """What the tape does in them is queued, as the training's own work is."""
    callback = GradTrace(tmp_path / "a.zarr", TopK(50), inputs=None)
    fit(device.trainer, NoWaiting(device), callback, dropout=0.2)
    assert len(open_trace(tmp_path / "a.zarr").steps) == 16
