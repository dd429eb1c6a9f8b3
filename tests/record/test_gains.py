"""Gains are what the optimizer multiplied clipped gradients by."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_gradtrace import Gains, GradTrace, TopK, open_trace
from tests.test_callback import Model, fit

PARAM = "encoder.layers.0.linear1.weight"


class Adaptive(Model):
    """AdamW; keeps the denominators that its state leads to, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[np.ndarray] = []

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, betas=(0.8, 0.9))

    def on_train_batch_end(self, *_) -> None:
        state = self.trainer.optimizers[0].state[self.get_parameter(PARAM)]
        step = float(state["step"])
        denominator = (state["exp_avg_sq"] / (1 - 0.9**step)).sqrt() + 1e-8
        self.expected.append((-0.02 * 0.2 / (1 - 0.8**step) / denominator).numpy())


@pytest.mark.parametrize("quantity", ["shift", "gradient"])
def test_gains_of_adam_are_its_reciprocal_denominators(quantity: str, tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    model = Adaptive()
    fit(model, GradTrace(tmp_path / "a.zarr", [TopK(5), Gains()], params=PARAM, quantity=quantity))
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok
    found = np.asarray(trace.array(f"gains/{PARAM}/gain"))
    np.testing.assert_allclose(found, np.stack(model.expected), rtol=1e-5)


def test_gains_of_sgd_are_its_learning_rate_without_clipping(tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    fit(Model(rate=0.5), GradTrace(tmp_path / "a.zarr", [TopK(5), Gains()], params=PARAM), gradient_clip_val=0.01)
    trace = open_trace(tmp_path / "a.zarr")
    assert (trace.steps["clip_factor"] < 0.5).all()
    found = np.asarray(trace.array(f"gains/{PARAM}/gain"))
    expected = np.broadcast_to(-trace.steps["lr"].to_numpy()[:, None, None], found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
