"""One cell of the table: a model in a setup, trained in a real Trainer, share by share compared with the oracle."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_gradtrace import GradTrace, open_trace
from lightning_gradtrace.capture.attribution import Attribution
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.record import ParameterInfo, Record, StepShifts
from lightning_gradtrace.store import ArraySpec
from tests.compatibility.models import N_SAMPLES, Entry
from tests.compatibility.truth import true_shares

N_BATCHES = 2
COARSE = 3e-2
"""Relative error in half precision, where the oracle rounds at other places than the batch."""


Place = Callable[[str], dict[str, Any]]
"""Arguments of a Trainer that say where it trains, for a precision."""


def on_cpu(precision: str) -> dict[str, Any]:
    return {"accelerator": "cpu", "precision": precision}


@dataclass(frozen=True)
class Setup:
    """A column of the table.

    Attributes:
        name: as the table shows it.
        trainer: arguments of the Trainer.
        optimizer: makes the optimizer.
        checkpointed: the whole forward pass is recomputed in the backward pass.
        manual: manual optimization.
        functional: the engine that differentiates a loss per sample.
        amplifies: the optimizer makes full steps of gradients that are nothing but rounding, so that the ledger can't
            close closely in single precision.
    """

    name: str
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    checkpointed: bool = False
    manual: bool = False
    functional: bool = False
    amplifies: bool = False

    @property
    def low_precision(self) -> bool:
        return self.trainer.get("precision") in ("bf16-mixed", "16-mixed")


SETUPS = [
    Setup("SGD, clipping", {"gradient_clip_val": 0.3}),
    Setup("AdamW", optimizer=lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1), amplifies=True),
    Setup("accumulation", {"accumulate_grad_batches": 2}),
    Setup("bf16-mixed", {"precision": "bf16-mixed"}),
    Setup("checkpointing", checkpointed=True),
    Setup("manual optimization", manual=True),
    Setup("functional engine", functional=True),
]


class Training(pl.LightningModule):
    """Trains a model on its own loss."""

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        super().__init__()
        self.model = model
        self.setup_ = setup
        self.automatic_optimization = not setup.manual

    def training_step(self, batch, batch_idx):
        checkpointed = self.setup_.checkpointed
        loss = checkpoint(self.model, batch, use_reentrant=False) if checkpointed else self.model(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.setup_.optimizer([p for p in self.parameters() if p.requires_grad])


class Truth(pl.Callback):
    """Computes the true shares of every micro-batch, before anything of the step has happened."""

    def __init__(self, entry: Entry, setup: Setup) -> None:
        self.entry = entry
        self.setup_ = setup
        self.shares: list[dict[str, Tensor]] = []
        self.rounding: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kinds = {"couples": self.entry.couples, "is_strung": self.entry.collate is not None}
        with torch.random.fork_rng():
            with trainer.precision_plugin.train_step_context():
                found = true_shares(pl_module.model, tuple(batch), **kinds, of_losses=self.setup_.functional)
            precise = found
            if self.setup_.low_precision:
                precise = true_shares(pl_module.model, tuple(batch), **kinds)
        self.shares.append({f"model.{n}": g / trainer.accumulate_grad_batches for n, g in found.items()})
        self.rounding.append({f"model.{n}": largest(g - precise[n]) for n, g in found.items()})


class Kept(Record):
    """Keeps every share of every parameter, in memory."""

    def __init__(self) -> None:
        self.shares: list[dict[str, Tensor]] = []

    @property
    def group(self) -> str:
        return "kept"

    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        return [ArraySpec("kept/rows", ("occurrence",), (), "int32", "number of parameters")]

    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        for number in range(len(step.n_samples)):
            found = {p.info.name: p.shares[number] for p in step.parameters}
            self.shares.append({name: share.dense() for name, share in found.items() if share is not None})
        return {"kept/rows": np.full(step.n_occurrences, len(step.parameters), np.int32)}


def fit(entry: Entry, setup: Setup, *callbacks: pl.Callback, place: Place = on_cpu) -> Training:
    """Train the model of an entry, the same in every call but for the callbacks."""
    pl.seed_everything(7, verbose=False)
    model = Training(entry.build(), setup)
    items = [entry.item() for _ in range(N_BATCHES * N_SAMPLES)]
    arguments = {"precision": entry.precision, **setup.trainer}
    where = place(arguments.pop("precision"))
    trainer = pl.Trainer(
        devices=1,
        deterministic=place is not on_cpu,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
        **where,
    )
    if str(trainer.precision) == "64-true":
        items = [[t.double() if t.is_floating_point() else t for t in item] for item in items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        for said in ("took no part in the loss", "one backward pass per sample", "could not be repeated"):
            warnings.filterwarnings("ignore", f"(?s).*{said}")
        trainer.fit(model, DataLoader(items, batch_size=N_SAMPLES, collate_fn=entry.collate))
    return model


@dataclass
class Outcome:
    """What a cell shows.

    Attributes:
        result: "exact", or "clear error: ..." with the first words of what it says.
        general: names of the functions that the general rule served.
    """

    result: str
    general: set[str] = field(default_factory=set)  # functions without a closed form, by name


def run(entry: Entry, setup: Setup, place: Place = on_cpu) -> Outcome:
    """Train with and without the callback and compare; whatever is neither exact nor a clear error fails here."""
    plain = fit(entry, setup, place=place)
    kept, truth, general = Kept(), Truth(entry, setup), set()

    def noted(self, use, placement, n_samples):
        shares = original(self, use, placement, n_samples)
        if self._ways[use.site, use.switches, n_samples == 1] != "closed":
            general.add(use.site.function)
        return shares

    original = Attribution.shares
    loss = (lambda module, batch: module.model.losses(batch) / N_SAMPLES) if setup.functional else None
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.zarr"
        callback = GradTrace(
            path,
            kept,
            params="*",
            engine="functional" if setup.functional else "tape",
            per_sample_loss=loss,
            ledger_every_n_steps=1,
        )
        try:
            with mock.patch.object(Attribution, "shares", noted):
                traced = fit(entry, setup, truth, callback, place=place)
        except (UnattributableError, ValueError) as error:
            assert str(error).startswith("GradTrace: "), error
            assert not _get_current_function_mode_stack()
            return Outcome("clear error: " + reason(str(error)), general)
        steps = open_trace(path).steps
    assert not _get_current_function_mode_stack()
    for (name, a), (_, b) in zip(plain.state_dict().items(), traced.state_dict().items(), strict=True):
        assert torch.equal(a, b), f"{entry.name}, {setup.name}: training changed `{name}`"
    bound = COARSE if setup.low_precision or (entry.single and setup.amplifies) else 1e-4 if entry.single else 1e-9
    assert (steps["residual"] < bound).all(), f"{entry.name}, {setup.name}: residual {steps['residual'].max():.1e}"
    assert len(kept.shares) == len(truth.shares) == N_BATCHES, f"{len(kept.shares)} micro-batches were recorded"
    for found, expected, rounding in zip(kept.shares, truth.shares, truth.rounding, strict=True):
        tolerance = COARSE if setup.low_precision else entry.tolerance
        compare(found, expected, rounding, tolerance, f"{entry.name}, {setup.name}")
    return Outcome("exact", general)


def largest(shares: Tensor) -> Tensor:
    """Return the largest norm of a sample's share."""
    return torch.linalg.vector_norm(shares.double().flatten(1), dim=1).max()


def compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], rounding: dict[str, Tensor], tolerance: float, where: str
) -> None:
    """Compare every share of every parameter, relative to the largest share of the parameter.

    Parameters whose gradient is zero but for rounding (a bias before batch norm) are compared on the scale of the
    whole gradient. In half precision the oracle itself is off by `rounding`, and a share by
    as much or twice that.
    """
    whole = torch.stack([torch.linalg.vector_norm(g.double()) for g in expected.values()]).norm()
    for name, g in expected.items():
        share = found.get(name, torch.zeros_like(g)).double()
        error, size = largest(share - g), largest(g)
        limit = tolerance * torch.maximum(size, 1e-2 * whole) + 3 * rounding[name]
        assert error <= limit, f"{where}: `{name}` is off by {error / size:.1e}, {limit / size:.1e} is allowed"


def reason(message: str) -> str:
    """Return the part of an error that fits into a table."""
    first = message.removeprefix("GradTrace: ").split(". ")[0].replace("model.", "").replace("|", "/")
    return re.sub(r" \(relative error [^)]*\)", "", " ".join(first.split()))[:200]
