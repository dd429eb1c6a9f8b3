"""What collate functions make of samples: things beside them, lists, packed texts, rows of unlike number."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
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


@pytest.mark.parametrize("place", [1.0, 0.0])
def test_what_is_the_same_in_two_batches_and_as_long_gets_a_word(place: float, tmp_path: Path) -> None:
    """It counts as the samples' own; one that varies from sample to sample alone is meant."""
    places = place * torch.linspace(0, 1, N, dtype=torch.float64)[:, None]
    load = loader(random(18, WIDTH), random(18, N, seed=1), beside=places)
    trace = GradTrace(tmp_path / "a.zarr", record=Kept(), params="*")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Training(Operator().double()), trace, loader=load(), max_epochs=1)
    words = [str(one.message) for one in caught if "is the same in two batches" in str(one.message)]
    assert len(words) == place
    assert all("tensor beside of the batch, of shape (6, 1)" in word for word in words)


class Choices(nn.Module):
    """Reads several answers to each question, which lie in one axis with the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH, 1)

    def forward(self, batch):
        scores = self.net(batch["beside"]).view(len(batch["x"]), -1)
        return nn.functional.cross_entropy(scores + self.net(batch["x"]), batch["y"], reduction="none")


CLASSES = torch.arange(2 * N) % N
PLACES = torch.linspace(0, 1, 2 * N, dtype=torch.float64)[:, None]
CASES: dict[str, tuple[Callable[[], nn.Module], Loader]] = {
    "grid of twice as many": (Operator, loader(random(12, WIDTH), random(12, 2 * N, seed=1), beside=PLACES)),
    "grid of others": (Operator, loader(random(12, WIDTH), random(12, N + 1, seed=1), beside=PLACES[: N + 1])),
    "short last batch": (Operator, loader(random(9, WIDTH), random(9, 2 * N, seed=1), beside=PLACES)),
    "names of classes": (Names, loader(random(12, WIDTH), CLASSES, 2, beside=random(N, 3, seed=2))),
    "positions (1, position)": (
        Positions,
        loader(random(12, N, WIDTH), random(12, N, seed=1), beside=torch.arange(N)[None]),
    ),
    "positions of two samples": (
        Positions,
        loader(random(12, N, WIDTH), random(12, N, seed=1), 2, beside=torch.arange(N)),
    ),
    "adjacency": (Graph, loader(random(12, N, WIDTH), random(12, N, seed=1), 4, beside=random(N, N, seed=3).exp())),
    "weights": (Two, loader(random(12, WIDTH), random(12, 7, seed=1), beside=PLACES[:7], weights=random(7, seed=4))),
    "twins": (Distances, loader(random(N, WIDTH), random(N, 1, seed=1), beside=random(N, WIDTH, seed=3))),
    "answers": (Choices, loader(random(12, WIDTH), CLASSES % 4, beside=random(4 * N, WIDTH, seed=3))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stands_beside_the_samples_is_none_of_theirs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, load = CASES[name]
    check(make(), load, tmp_path)


TEXTS = [(random(n, WIDTH, seed=n), random(seed=n)) for n in (2, 5, 3, 4, 1, 6, 2, 3, 5, 4, 6, 1)]


class Strung(nn.Module):
    """Reads texts that lie one after the other, of which lengths alone are known."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = mlp(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, batch):
        texts = self.net(batch["words"]).split(batch["lengths"].tolist())
        return (self.last(torch.stack([text.mean(0) for text in texts]))[:, 0] - batch["y"]).square()


def strung(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    texts, y = zip(*items, strict=True)
    return {"words": torch.cat(texts), "lengths": torch.tensor([len(text) for text in texts]), "y": torch.stack(y)}


class Recurrent(nn.Module):
    """Reads packed texts."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.GRU(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, batch):
        return (self.last(self.cells(batch[0])[1][-1])[:, 0] - batch[1]).square()


def packed(items: list[tuple[Tensor, Tensor]]) -> tuple[PackedSequence, Tensor]:
    texts, y = zip(*items, strict=True)
    return pack_sequence(texts, enforce_sorted=False), torch.stack(y)


class Boxes(nn.Module):
    """Reads an image and its boxes, whose four numbers may be as many as the images."""

    def __init__(self) -> None:
        super().__init__()
        self.box, self.image, self.last = nn.Linear(4, 5), nn.Linear(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, batch):
        seen = [self.box(self.boxes(one)).relu().sum(0) for one in batch[1]]
        return (self.last(torch.stack(seen) + self.image(batch[0]))[:, 0] - 1).square()

    def boxes(self, one: Any) -> Tensor:
        return one if isinstance(one, Tensor) else one["boxes"]


BOXES = [(random(WIDTH, seed=i), random(1 + i % 3, 4, seed=i)) for i in range(12)]


def listed(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    return torch.stack([image for image, _ in items]), [boxes for _, boxes in items]


def named(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    images, boxes = listed(items)
    return images, [{"boxes": one, "kinds": torch.zeros(len(one), dtype=torch.int64)} for one in boxes]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize(
    ("make", "data", "collate"),
    [(Strung, TEXTS, strung), (Recurrent, TEXTS, packed), (Boxes, BOXES, listed), (Boxes, BOXES, named)],
)
def test_samples_of_unlike_size(make: Any, data: list[Any], collate: Any, n: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(make(), lambda: DataLoader(data, batch_size=n, collate_fn=collate), tmp_path)


@pytest.mark.parametrize("collate", [listed, named])
def test_boxes_of_four_images(collate: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Boxes(), lambda: DataLoader(BOXES, batch_size=4, collate_fn=collate), tmp_path)


class Cut(nn.Module):
    """Puts a part of another image into every one (CutMix)."""

    def __init__(self, by_loop: bool) -> None:
        super().__init__()
        self.by_loop = by_loop
        self.net, self.last = nn.Conv2d(1, 2, 3), nn.Linear(2, 1)

    def forward(self, batch):
        x, others = batch["x"].clone(), torch.arange(len(batch["x"])).roll(1)
        if self.by_loop:
            for i, other in enumerate(others.tolist()):
                x[i, :, 1:4, 2:5] = batch["x"][other, :, 1:4, 2:5]
        else:
            x[:, :, 1:4, 2:5] = x[others][:, :, 1:4, 2:5]
        return (self.last(self.net(x).tanh().mean((2, 3))) - batch["y"]).square().mean(1)


@pytest.mark.parametrize("by_loop", [False, True])
def test_parts_of_other_samples_belong_to_the_row_that_they_were_put_in(by_loop: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Cut(by_loop), loader(random(12, 1, 7, 9), random(12, 1, seed=1), 4), tmp_path)


class Detector(nn.Module):
    """Reads images of unlike size and their boxes, which come in lists alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.box, self.last = nn.Conv2d(1, 5, 3), nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, batch):
        seen = [self.net(image[None]).tanh().mean((2, 3))[0] for image in batch[0]]
        wanted = [self.box(target["boxes"]).sum(0) for target in batch[1]]
        return self.last(torch.stack(seen) * torch.stack(wanted))[:, 0].square()


SCENES = [(random(1, 5 + i % 3, 6, seed=i), {"boxes": random(1 + i % 4, 4, seed=i)}) for i in range(12)]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_lists_alone_tell_how_many_samples_there_are(n: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load = functools.partial(DataLoader, SCENES, batch_size=n, collate_fn=lambda items: tuple(zip(*items, strict=True)))
    check(Detector(), load, tmp_path)


class Popping(nn.Module):
    """Takes something out of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(N, N)

    def forward(self, batch):
        return (self.net(batch["x"]) - batch.pop("y")).square().mean(1)


def test_a_step_may_take_something_out_of_its_batch(tmp_path: Path) -> None:
    """As wide as the batch, so that the probe runs it again."""
    torch.manual_seed(0)
    kept, load = Kept(), loader(random(12, N), random(12, N, seed=1))
    trace = GradTrace(tmp_path / "a.zarr", record=kept, params="*", quantity="gradient", ledger_every_n_steps=1)
    net = Popping().double()
    fit(Training(net), trace, loader=load(), max_epochs=1)
    assert len(kept.shares) == 2


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
