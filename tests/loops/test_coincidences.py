"""Batches as large as something else: features, positions, channels, bags. Sizes tell nothing, functions do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.loops.losses import check
from tests.loops.test_collated import mlp, random


class Net(nn.Module):
    """Runs a function of its layers and the batch."""

    def __init__(self, run: Callable[[Any, Any], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, batch):
        return self.run(self, batch)


Case = tuple[nn.Module, Callable[[], Any]]


def rows(n: int, *shape: int) -> Callable[[], Any]:
    return functools.partial(DataLoader, TensorDataset(random(2 * n, *shape)), batch_size=n)


def mixed(mix: Callable[[Tensor], Tensor], n: int) -> Case:
    """Rows that are mixed with others belong to the sample in whose place they are."""

    def run(m: Any, batch: Any) -> Tensor:
        return m.last(m.net(0.7 * batch[0] + 0.3 * mix(batch[0])).tanh().mean(1))[:, 0].square()

    return Net(run, net=nn.Linear(n, 5), last=nn.Linear(5, 1)), rows(n, n, n)


def centred(statistic: Callable[[Tensor], Tensor], n: int) -> Case:
    """A statistic of the batch has as many entries as the batch, and belongs to whom it meets."""

    def run(m: Any, batch: Any) -> Tensor:
        x = m.net(batch[0]) - statistic(batch[0]) + m.net(statistic(batch[0]))
        return m.last(torch.tanh(x)).square().mean(1)

    return Net(run, net=nn.Linear(n, n), last=nn.Linear(n, 1)), rows(n, n)


def convolved(n: int) -> Case:
    """Every sample has kernels of its own, by one convolution of groups."""

    def run(m: Any, batch: Any) -> Tensor:
        x = batch[0]
        kernels = m.kernels(x.mean((2, 3))).view(n * n, n, 1, 1)
        return F.conv2d(x.reshape(1, n * n, n, n), kernels, groups=n).view(n, -1).square().mean(1)

    return Net(run, kernels=nn.Linear(n, n * n)), rows(n, n, n, n)


def recurrent(n: int) -> Case:
    """Mixed rows come out of a recurrent layer in their places."""

    def run(m: Any, batch: Any) -> Tensor:
        x = m.cells(batch[0] + batch[0].roll(1, 0))[0]
        return m.last(x).square().mean((1, 2))

    return Net(run, cells=nn.GRU(n, n, batch_first=True), last=nn.Linear(n, 1)), rows(n, n, n)


def pasted(n: int) -> Case:
    """Parts of other images are written into each (CutMix)."""

    def run(m: Any, batch: Any) -> Tensor:
        x = batch[0].clone()
        x[:, :, :1, 1:] = batch[0].flip(0)[:, :, :1, 1:]
        return m.last(m.net(x).tanh().mean((2, 3)))[:, 0].square()

    return Net(run, net=nn.Conv2d(n, 3, 1), last=nn.Linear(3, 1)), rows(n, n, n, n)


WORDS = [
    (torch.randint(10, (1 + i % 4,), generator=torch.Generator().manual_seed(i)), random(seed=i)) for i in range(8)
]


def strung(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    words, y = zip(*items, strict=True)
    return torch.cat(words), torch.tensor([len(text) for text in words]), torch.stack(y)


def bags(n: int) -> Case:
    """Texts are told apart by the offsets of an embedding bag, and by nothing else."""

    def run(m: Any, batch: Any) -> Tensor:
        words, lengths, y = batch
        return (m.last(m.bag(words, lengths.cumsum(0) - lengths))[:, 0] - y).square()

    bag = nn.EmbeddingBag(10, n)
    return Net(run, bag=bag, last=nn.Linear(n, 1)), functools.partial(DataLoader, WORDS, n, collate_fn=strung)


def counted(n: int) -> Case:
    """Rows are added up where their counts say."""

    def run(m: Any, batch: Any) -> Tensor:
        words, lengths, y = batch
        rows = torch.tanh(m.table(words))
        whose = torch.arange(len(y)).repeat_interleave(lengths)
        means = rows.new_zeros(len(y), n).index_add(0, whose, rows) / lengths[:, None]
        return (m.last(means)[:, 0] - y).square()

    table = nn.Embedding(10, n)
    return Net(run, table=table, last=nn.Linear(n, 1)), functools.partial(DataLoader, WORDS, n, collate_fn=strung)


def scaled(x: Tensor) -> Tensor:
    return x / (x.std(0) + 1)


CASES: dict[str, Callable[[int], Case]] = {
    "roll": functools.partial(mixed, lambda x: x.roll(1, 0)),
    "flip": functools.partial(mixed, lambda x: x.flip(0)),
    "another order": functools.partial(mixed, lambda x: x[torch.arange(len(x)).roll(1)]),
    "the largest": functools.partial(mixed, lambda x: x.amax(0, keepdim=True).expand_as(x)),
    "mean of the batch": functools.partial(centred, lambda x: x.mean(0)),
    "deviation of the batch": functools.partial(centred, lambda x: x.std(0)),
    "mean kernel": functools.partial(mixed, scaled),
    "kernels of the samples": convolved,
    "a recurrent layer": recurrent,
    "CutMix": pasted,
    "bags": bags,
    "counted rows": counted,
    "layers": lambda n: (Net(lambda m, batch: m.net(batch[0]).square().mean((1, 2)), net=mlp(n, n)), rows(n, n, n)),
}


@pytest.mark.filterwarnings("ignore:GradTrace. the forward pass could not be repeated")  # words that can't be permuted
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_shares_are_the_oracles_and_the_training_is_the_same(name: str, n: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(*CASES[name](n), tmp_path)
