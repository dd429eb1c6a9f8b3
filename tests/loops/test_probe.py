"""A training step that changes weights or gradients by itself is run once more by the permutation probe, unnoticed."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace import GradTrace, TopK, open_trace
from tests.loops.models import WIDTH, Manual, Net, check_nothing_left, fit

BATCH = 4


class Doubtful(Net):
    """Four features, as many as there are samples: only the probe tells which axis holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(WIDTH, BATCH), nn.Parameter(torch.randn(BATCH, BATCH))
        self.last = nn.Linear(BATCH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) @ self.middle).tanh())


class Teacher(Doubtful):
    """A teacher follows at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(WIDTH, 2).requires_grad_(False)
        self.student = nn.Linear(WIDTH, 2)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
        distance = (self.student(batch[0]) - self.teacher(batch[0])).square().mean()
        return super().training_step(batch, batch_idx) + distance


class Bounded(Doubtful):
    """A constraint on the weights, kept by their data."""

    def training_step(self, batch, batch_idx):
        self.first.weight.data.mul_(0.99)
        return super().training_step(batch, batch_idx)


class Clipping(Manual, Doubtful):
    """Manual optimization that clips by itself."""

    def change(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Forgetting(Clipping):
    """Manual optimization that takes gradients away by itself."""

    def change(self) -> None:
        self.last.bias.grad = None


class Raw(Clipping):
    """Manual optimization with the Trainer's own list of optimizers."""

    def training_step(self, batch, batch_idx):
        (optimizer,) = self.trainer.optimizers
        optimizer.zero_grad()
        self.manual_backward(Doubtful.training_step(self, batch, batch_idx))
        optimizer.step()


class Adapting(Doubtful):
    """Takes a gradient of its own, for a step ahead of the loss."""

    def forward(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(super().forward(x).square().mean(), self.middle)
        return self.last((self.first(x) @ (self.middle - 0.1 * slope)).tanh())


@pytest.mark.filterwarnings("ignore:GradTrace. `last.bias` took no part")
@pytest.mark.parametrize(
    "kind", [Teacher, Bounded, Clipping, Forgetting, Raw, Adapting], ids=lambda kind: kind.__name__
)
def test_what_a_step_changes_is_put_back(kind: type, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [GradTrace(tmp_path / "a.zarr", TopK(5), ledger_every_n_steps=1)]):
        pl.seed_everything(3, verbose=False)
        model = kind()
        check_nothing_left(model, fit(model, *callbacks))
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    trace = open_trace(tmp_path / "a.zarr")
    assert len(trace.occurrences) == 28 and (trace.steps["sum_error"] < 1e-5).all() and trace.verify().ok
