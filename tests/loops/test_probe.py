"""A training step that changes weights or gradients by itself is run once more by the permutation probe, unnoticed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


class Scaled(Doubtful):
    """Takes the factor of its loss from somewhere, another one at every step."""

    def factor(self) -> float:
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor()


class Scheduled(Scaled):
    """Takes it from iterators of Python's own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.held = itertools.count(1), {"factors": iter([1 / n for n in range(1, 99)])}

    def factor(self) -> float:
        return 1 / next(self.counts) + next(self.held["factors"])


class Generated(Scaled):
    """Takes it from a generator, which tells of the step that it is asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = (1 / (n + self.global_step) for n in itertools.count(1))

    def factor(self) -> float:
        return next(self.factors)


class SecondLoader(Scaled):
    """Takes it from a dataloader of its own, which begins again when it has come to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = DataLoader(torch.arange(5.0), shuffle=True)
        self.held = {"batches": iter(self.loader)}

    def factor(self) -> float:
        try:
            return float(next(self.held["batches"]))
        except StopIteration:
            self.held["batches"] = iter(self.loader)
            return self.factor()


class OfClass(Scaled):
    """Counts in an attribute of its class."""

    n = 0
    seen: ClassVar[list[int]] = []

    def factor(self) -> float:
        type(self).n += 1
        self.seen.append(self.n)
        return 1 / len(self.seen) + 1 / self.n


def make_closed() -> type:
    n, factors, seen = 0, iter([1 / n for n in range(1, 99)]), []

    class Closed(Scaled):
        def factor(self) -> float:
            nonlocal n
            n += 1
            seen.append(n)
            return 1 / n + 1 / len(seen) + next(factors)

    return Closed


def closed() -> nn.Module:
    """Counts in variables of the function that its class was defined in."""
    return make_closed()()


def counter() -> Callable[[], float]:
    n = 0

    def count(step: int = 1) -> float:
        nonlocal n
        n += step
        return 1 / n

    return functools.partial(count, step=2)


class Calling(Scaled):
    """Takes it from a function that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = counter()


def of_class() -> nn.Module:
    OfClass.n = 0
    OfClass.seen.clear()
    return OfClass()


KINDS = [
    Teacher,
    Bounded,
    Clipping,
    Forgetting,
    Raw,
    Adapting,
    Scheduled,
    Generated,
    SecondLoader,
    of_class,
    closed,
    Calling,
]


# Its outcome is tested all the same: without the probe, sizes must not mislead.
@pytest.mark.filterwarnings("ignore:.*`training_step` takes from an iterator .*, which can't be set back")
@pytest.mark.filterwarnings("ignore:GradTrace. `last.bias` took no part")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_step_changes_is_put_back(kind: Callable[[], nn.Module], tmp_path: Path) -> None:
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
