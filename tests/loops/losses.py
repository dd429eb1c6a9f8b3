"""Trainings whose loss is the mean of losses of samples: shares are the gradients of these, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_gradtrace import GradTrace
from lightning_gradtrace.capture.oracle import per_sample_gradients
from tests.compatibility.cells import Kept
from tests.loops.models import check_nothing_left, fit


class Training(pl.LightningModule):
    """Trains a network that returns the losses of the samples of a batch, shape (sample,)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Oracle(pl.Callback):
    """Takes the gradient of the loss of each sample before the step."""

    def __init__(self) -> None:
        self.shares: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        net = copy.deepcopy(pl_module.net)
        n = len(net(batch))
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.shares.append(per_sample_gradients(lambda i: net(batch)[i] / n, n, trained))


def check(net: nn.Module, loader: Callable[[], Any], folder: Path) -> None:
    """Train in double precision with and without the trace: all shares are the oracle's, and weights the same.

    Args:
        net: returns the losses of samples that it treats apart.
        loader: makes the same dataloader again and again.
        folder: where the trace may go.
    """
    plain, traced = Training(copy.deepcopy(net).double()), Training(net.double())
    fit(plain, loader=loader(), max_epochs=1)
    oracle, kept = Oracle(), Kept()
    trace = GradTrace(folder / "a.zarr", record=kept, params="*", quantity="gradient", ledger_every_n_steps=1)
    trainer = fit(traced, trace, oracle, loader=loader(), max_epochs=1)
    check_nothing_left(traced, trainer)
    for (name, a), b in zip(plain.state_dict().items(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert kept.shares
    for found, expected in zip(kept.shares, oracle.shares, strict=True):
        for name, wanted in expected.items():
            share = found.get(f"net.{name}", torch.zeros_like(wanted))
            torch.testing.assert_close(share, wanted, msg=lambda text, name=name: f"{name}: {text}")
