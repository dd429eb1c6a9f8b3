"""A collate function is called on parts of its first batch, to learn what all samples share; nothing else notices."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gradtrace import GradTrace
from lightning_gradtrace.capture.intake.asking import Answer, parts_to_ask_of, shared_paths
from lightning_gradtrace.capture.intake.shared import is_shared
from tests.compatibility.cells import Kept
from tests.loops.losses import Training, check
from tests.loops.models import fit

N = 6
ITEMS = [(torch.full((3 + i % 4,), float(i)), i) for i in range(4 * N)]
RNG = np.random.default_rng(0)
count = 0


def padded(items: list[Any]) -> Tensor:
    return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)


def paths(collate: Callable[[Any], Any], items: list[Any] = ITEMS[:N]) -> set[Any]:
    parts = parts_to_ask_of(items)
    return shared_paths(collate, parts, collate(items), len(items))


def test_what_half_of_the_items_leave_as_longis_shared() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        x = padded(items)
        own = {"x": x, "turned": x.T, "y": torch.tensor([y for _, y in items]), "one": torch.ones(len(items), 1)}
        shared = {"grid": torch.rand(N, 1), "positions": torch.arange(x.shape[1]), "table": torch.ones(N, N)}
        return {**own, **shared, "strung": torch.cat([x for x, _ in items]), "more": [torch.ones(N, 2)]}

    assert paths(collate) == {("grid",), ("positions",), ("table",), ("strung",), ("more", 0)}


def test_of_batches_that_are_filled_up_nothing_is_said() -> None:
    assert paths(lambda items: torch.cat([torch.tensor([y for _, y in items]), torch.zeros(N - len(items))])) == set()


class Counting:
    """Remembers how often it was called, and draws random numbers."""

    def __init__(self) -> None:
        self.calls, self.generator, self.seen = 0, torch.Generator().manual_seed(0), [0]

    def __call__(self, items: list[Any]) -> dict[str, Tensor]:
        global count
        self.calls, count = self.calls + 1, count + 1
        self.seen[0] += len(items)
        noise = torch.rand(1, generator=self.generator) + torch.rand(1) + random.random() + RNG.random()
        noise = noise + float(np.random.rand()) + self.calls + self.seen[0] + count
        for x, _ in items:
            x += noise  # in place
        return {"x": torch.stack([x[:3] for x, _ in items]), "grid": torch.linspace(0, 1, N, dtype=torch.float64)}


class Texts(Dataset[Any]):
    """A data set whose method collates."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 2 * N

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(i), dtype=torch.float64), i

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        self.calls += 1
        return {
            "x": torch.stack([x for x, _ in items]) * self.calls,
            "grid": torch.linspace(0, 1, N, dtype=torch.float64),
        }


def beside_a_grid(items: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in items]), "grid": torch.linspace(0, 1, N, dtype=torch.float64)}


class Met(nn.Module):
    """Meets a grid with as many places as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.grid = nn.Linear(3, 4), nn.Linear(1, 4)

    def forward(self, batch):
        return (self.x(batch["x"]) @ self.grid(batch["grid"][:, None]).T).square().mean(1)


def train(load: DataLoader[Any], folder: Path | None) -> dict[str, Tensor]:
    global count, RNG
    count, RNG = 0, np.random.default_rng(0)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Training(Met()).double()
    trace = [] if folder is None else [GradTrace(folder / "a.zarr", record=Kept(), params="*")]
    fit(model, *trace, loader=load, max_epochs=2)
    return model.state_dict()


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("of_dataset", [False, True])
def test_the_training_does_not_notice(of_dataset: bool, n_workers: int, tmp_path: Path) -> None:
    def load() -> DataLoader[Any]:
        data = Texts()
        collate = data.collate if of_dataset else Counting()
        return DataLoader(data, N, num_workers=n_workers, collate_fn=collate)

    plain, traced = train(load(), None), train(load(), tmp_path)
    for name, value in plain.items():
        assert torch.equal(value, traced[name]), name


@pytest.mark.parametrize("n_workers", [0, 2])
def test_workers_bring_the_answer(n_workers: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load = functools.partial(DataLoader, Texts(), N, num_workers=n_workers, collate_fn=beside_a_grid)
    check(Met(), load, tmp_path)


def test_a_batch_of_another_structure_is_left_alone() -> None:
    answer, batch = Answer(), {"x": torch.ones(N, 3), "grid": torch.ones(N, 1)}
    answer.give({("grid",)}, batch)
    answer.mark({"grid": batch["x"], "x": batch["grid"][:, 0]})
    assert not is_shared(batch["x"])
    answer.mark(batch)
    assert is_shared(batch["grid"])
    assert not is_shared(batch["x"])
