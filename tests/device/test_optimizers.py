"""Optimizers whose step is one kernel, or whose state lies on the card."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from lightning_gradtrace import GradTrace, Norms, TopK, open_trace
from tests.device.devices import CUDA
from tests.device.test_training import Optimizer, fit

OPTIMIZERS = {
    "fused SGD": partial(SGD, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "foreach SGD": partial(SGD, lr=0.5, momentum=0.9, dampening=0.1, foreach=True),
    "fused Adam": partial(Adam, lr=1e-3, weight_decay=0.01, amsgrad=True, fused=True),
    "fused AdamW": partial(AdamW, lr=1e-3, fused=True),
    "capturable AdamW": partial(AdamW, lr=1e-3, capturable=True),
    "foreach AdamW": partial(AdamW, lr=1e-3, foreach=True, maximize=False),
}


def with_its_rate_on_the_card(parameters: object) -> torch.optim.Optimizer:
    return AdamW(parameters, lr=torch.tensor(1e-3, device=CUDA.name), capturable=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(
    "optimizer", [*OPTIMIZERS.values(), with_its_rate_on_the_card], ids=[*OPTIMIZERS, "learning rate on the card"]
)
def test_the_ledger_closes_and_the_training_is_as_without(optimizer: Optimizer, precision: str, tmp_path: Path) -> None:
    # A fused optimizer divides by the scale of the loss itself, so Lightning can't clip before it.
    settings = {"optimizer": optimizer, "dropout": 0.2, "precision": precision, "clip": None}
    plain = fit(CUDA.trainer, **settings)
    traced = fit(CUDA.trainer, GradTrace(tmp_path / "a.zarr", [TopK(50), Norms()], ledger_every_n_steps=1), **settings)
    for (name, a), (_, b) in zip(plain.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    steps = open_trace(tmp_path / "a.zarr").steps
    applied = steps[~steps["skipped"]].iloc[1:]  # Adam's first step is a full one where gradients are but rounding
    assert len(applied) > len(steps) / 2
    assert (applied["residual"] < (1e-4 if precision == "32-true" else 2e-2)).all()
