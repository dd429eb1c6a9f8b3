"""Activation checkpointing runs parts of the forward pass again during backward: shares are counted once."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.loops.models import Manual, Net, run


class Checkpointed(Net):
    def __init__(self, reentrant: bool, chance: float = 1.0) -> None:
        super().__init__()
        self.reentrant, self.chance = reentrant, chance

    def forward(self, x):
        # The reentrant form needs an input with a gradient, as every layer but a model's first has one.
        hidden = self.first(x).tanh()
        if self.training and random.random() < self.chance:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.block(hidden)

    def block(self, hidden):
        return self.last(torch.dropout(hidden, 0.3, self.training).tanh())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("chance", [1.0, 0.5], ids=["always", "at random"])
def test_checkpointed_layers_with_dropout(reentrant: bool, chance: float, tmp_path: Path) -> None:
    trace, _ = run(lambda: Checkpointed(reentrant, chance), tmp_path / "a.zarr")
    assert (trace.steps["residual"] < 1e-5).all()
    assert (trace.steps["sum_error"] < 1e-5).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_and_accumulation(reentrant: bool, tmp_path: Path) -> None:
    trace, _ = run(lambda: Checkpointed(reentrant), tmp_path / "a.zarr", accumulate_grad_batches=2)
    assert (trace.steps["residual"] < 1e-5).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_and_manual_optimization(reentrant: bool, tmp_path: Path) -> None:
    class Both(Manual):
        reentrant_form, chance = reentrant, 1.0
        block = Checkpointed.block

        def forward(self, x):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return checkpoint(self.block, self.first(x).tanh(), use_reentrant=reentrant)

    trace, _ = run(Both, tmp_path / "a.zarr")
    assert (trace.steps["residual"] < 1e-5).all()
