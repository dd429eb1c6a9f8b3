"""What a collate function puts beside the samples, as long as they are many: no sample's own, and the shares say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import GradTrace
from tests.compatibility.cells import Kept
from tests.loops.losses import Training, check
from tests.loops.models import fit

N = 6
WIDTH = 4
Loader = Callable[[], DataLoader[Any]]


def mlp(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loader(x: Tensor, y: Tensor, n_samples: int = N, dtype: torch.dtype = torch.float64, **beside: Tensor) -> Loader:
    """Return what makes a dataloader whose collate function puts tensors beside the samples."""

    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        one, other = zip(*items, strict=True)
        found = {**beside, "x": torch.stack(one), "y": torch.stack(other)}
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}

    return functools.partial(DataLoader, TensorDataset(x, y), batch_size=n_samples, collate_fn=collate)


class Operator(nn.Module):
    """Learns a function of functions: what is known of each is met by a grid of places, the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(WIDTH, 7), mlp(1, 7)

    def forward(self, batch):
        return (self.branch(batch["x"]) @ self.trunk(batch["beside"]).T - batch["y"]).square().mean(1)


class Names(nn.Module):
    """Compares samples with the names of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(WIDTH, 7), mlp(3, 7)

    def forward(self, batch):
        scores = self.image(batch["x"]) @ self.text(batch["beside"]).T
        return nn.functional.cross_entropy(scores, batch["y"], reduction="none")


class Positions(nn.Module):
    """Adds embeddings of positions that the batch brings with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(N, WIDTH), nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.head.weight)  # at first, nothing has an influence

    def forward(self, batch):
        found = self.head(torch.tanh(batch["x"] + self.table(batch["beside"])))[..., 0]
        return (found - batch["y"]).square().mean(1)


class Graph(nn.Module):
    """Mixes the nodes of every sample by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, batch):
        return (self.last(torch.tanh(batch["beside"] @ self.first(batch["x"])))[..., 0] - batch["y"]).square().mean(1)


class Two(nn.Module):
    """Has two things beside the samples, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.weighed = Operator(), nn.Linear(1, 1)

    def forward(self, batch):
        difference = self.net.branch(batch["x"]) @ self.net.trunk(batch["beside"]).T - batch["y"]
        return (difference.square() * self.weighed(batch["weights"][:, None])[:, 0].exp()).mean(1)


class Distances(nn.Module):
    """Compares each sample with a twin, whose order matters as that of the samples does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH, 7)

    def forward(self, batch):
        return (self.net(batch["x"]) - self.net(batch["beside"])).square().sum(1) * batch["y"][:, 0].exp()


CLASSES = torch.arange(2 * N) % N
CASES: dict[str, tuple[Callable[[], nn.Module], Loader]] = {
    "grid": (Operator, loader(random(12, WIDTH), random(12, N, seed=1), beside=torch.linspace(0, 1, N)[:, None])),
    "grid for two samples": (
        Operator,
        loader(random(12, WIDTH), random(12, 2, seed=1), 2, beside=torch.tensor([[0.0], [1.0]])),
    ),
    "grid as long as the last batch": (
        Operator,
        loader(random(9, WIDTH), random(9, 3, seed=1), beside=torch.linspace(0, 1, 3)[:, None]),
    ),
    "names of classes": (Names, loader(random(12, WIDTH), CLASSES, beside=random(N, 3, seed=2))),
    "positions (1, position)": (
        Positions,
        loader(random(12, N, WIDTH), random(12, N, seed=1), beside=torch.arange(N)[None]),
    ),
    "positions (position,)": (
        Positions,
        loader(random(12, N, WIDTH), random(12, N, seed=1), beside=torch.arange(N)),
    ),
    "adjacency": (Graph, loader(random(12, N, WIDTH), random(12, N, seed=1), beside=random(N, N, seed=3).exp())),
    "two": (
        Two,
        loader(
            random(12, WIDTH), random(12, N, seed=1), beside=torch.linspace(0, 1, N)[:, None], weights=random(N, seed=4)
        ),
    ),
    "twins": (Distances, loader(random(12, WIDTH), random(12, 1, seed=1), beside=random(N, WIDTH, seed=3))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stands_beside_the_samples_is_none_of_theirs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, load = CASES[name]
    check(make(), load, tmp_path)


class Packed(nn.Module):
    """Reads texts that are strung together, and a table of features that all of them look at."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.table, self.last = nn.Linear(WIDTH, 5), nn.Linear(2, 5), nn.Linear(5, 1)

    def forward(self, batch):
        known = self.table(batch["table"])
        each = self.last(torch.tanh(self.token(batch["x"])[batch["ends"][0]] * known[0] + known[4]))[:, 0]
        summed = each.new_zeros(len(batch["y"])).index_add(0, batch["of"], each)
        return (summed - batch["y"]).square()


def test_what_is_as_long_as_the_texts_that_are_strung_together_is_none_of_theirs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts, table = [(random(n, WIDTH, seed=n), random(seed=9)) for n in (2, 3, 4, 5)], random(5, 2, seed=1)

    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = zip(*items, strict=True)
        of = torch.arange(len(x)).repeat_interleave(torch.tensor([len(one) for one in x]))
        before = torch.arange(len(of)).roll(1).where(of == of.roll(1), torch.arange(len(of)))  # the token before each
        ends = torch.stack([before, torch.arange(len(of))])
        return {"x": torch.cat(x), "of": of, "y": torch.stack(y), "table": table, "ends": ends}

    check(Packed(), lambda: DataLoader(texts, batch_size=2, collate_fn=collate), tmp_path)


class Pairs(nn.Module):
    """Compares all images of a batch with all texts."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(WIDTH, 7), mlp(3, 7)

    def forward(self, batch):
        scores, right = self.image(batch["x"]) @ self.text(batch["text"]).T, torch.arange(N)
        both = nn.functional.cross_entropy(scores, right, reduction="none")
        return both + nn.functional.cross_entropy(scores.T, right, reduction="none")


class Negatives(nn.Module):
    """Compares every question with its answer, and with what every sample brings as a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH, 7)

    def forward(self, batch):
        question, right, wrong = (self.net(batch[name]) for name in ("x", "y", "wrong"))
        scores = torch.cat([question @ right.T, question @ wrong.T], 1)
        return nn.functional.cross_entropy(scores, torch.arange(N), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Pairs, Negatives])
def test_samples_that_are_compared_with_each_other_stay_samples(
    make: type[nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    beside = {"text": random(N, 3, seed=1)} if make is Pairs else {"wrong": random(N, WIDTH, seed=1)}
    load = loader(random(N, WIDTH), random(N, WIDTH, seed=2), dtype=dtype, **beside)
    kept = Kept()
    trace = GradTrace(tmp_path / "a.zarr", record=kept, params="*", quantity="gradient", ledger_every_n_steps=1)
    net = make().to(dtype)
    fit(Training(net), trace, loader=load(), max_epochs=1)
    name = "net.text.0.weight" if make is Pairs else "net.net.0.weight"
    assert kept.shares[0][name].flatten(1).norm(dim=1).count_nonzero() == N


class Adversaries(pl.LightningModule):
    """Trains a generator and a discriminator by hand, on images and on latent codes that come with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.judge = mlp(3, WIDTH), mlp(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.fools, self.tells), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()

    def fools(self, batch):
        return nn.functional.softplus(-self.judge(self.net(batch["z"]))).mean()

    def tells(self, batch):
        fake = nn.functional.softplus(self.judge(self.net(batch["z"]).detach()))
        return (fake + nn.functional.softplus(-self.judge(batch["x"]))).mean()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.judge)]


def test_what_never_meets_the_samples_goes_to_them_by_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kept, model, codes = Kept(), Adversaries().double(), random(N, 3, seed=1)
    load = loader(random(N, WIDTH), random(N, 1), z=codes)
    batch = next(iter(load()))
    named = {f"net.{name}": p for name, p in model.net.named_parameters()}
    alone = [torch.autograd.grad(model.fools({**batch, "z": code[None]}) / N, named.values()) for code in codes]
    trace = GradTrace(tmp_path / "a.zarr", record=kept, params="*", quantity="gradient", ledger_every_n_steps=1)
    fit(model, trace, loader=load(), max_epochs=1)
    for i, name in enumerate(named):
        torch.testing.assert_close(kept.shares[0][name], torch.stack([shares[i] for shares in alone]))
