"""Graphs of unlike size that are strung together, by `torch_geometric` or by hand: every share is the oracle's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as gnn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.utils import to_dense_batch

from tests.loops.losses import check

FEATURES = 5
N_BATCHES = 3


def graphs(n: int) -> list[Data]:
    """Return graphs of three to seven nodes; some nodes have no edge."""
    generator = torch.Generator().manual_seed(n)
    found = []
    for _ in range(n):
        size = int(torch.randint(3, 8, (1,), generator=generator))
        edges = (torch.rand(size, size, generator=generator) < 0.4).nonzero().T
        item = Data(
            x=torch.randn(size, FEATURES, generator=generator).double(),
            edge_index=edges,
            edge_attr=torch.randn(edges.shape[1], 3, generator=generator).double(),
            y=torch.randn(1, generator=generator).double(),
        )
        item.z = torch.randint(1, 9, (size,), generator=generator)
        found.append(item)
    return found


class OfGraphs(nn.Module):
    """Two convolutions and a readout; as many features as there are samples."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.second = self.layer(FEATURES, n), self.layer(n, n)
        self.last = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 1))

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        raise NotImplementedError

    def between(self, h: Tensor, batch: Any) -> Tensor:
        return h.relu()

    def edges(self, batch: Any) -> tuple[Tensor, ...]:
        return (batch.edge_index,)

    def read_out(self, h: Tensor, batch: Any) -> Tensor:
        return gnn.global_mean_pool(h, batch.batch)

    def forward(self, batch: Any) -> Tensor:
        h = self.between(self.first(batch.x, *self.edges(batch)), batch)
        h = self.second(h, *self.edges(batch))
        return (self.last(self.read_out(h, batch)).flatten() - batch.y).square()


class WithLoops(OfGraphs):
    """Adds an edge from each node to itself."""

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.GCNConv(n_in, n_out)


class Attending(OfGraphs):
    """Softmax over the edges of a node; reads the features of edges."""

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.GATv2Conv(n_in, n_out, heads=2, concat=False, edge_dim=3)

    def edges(self, batch: Any) -> tuple[Tensor, ...]:
        return batch.edge_index, batch.edge_attr

    def read_out(self, h: Tensor, batch: Any) -> Tensor:
        return gnn.global_max_pool(h, batch.batch)


class Normalised(OfGraphs):
    """Takes statistics of each graph between the layers."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.norm = gnn.GraphNorm(n)

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.GraphConv(n_in, n_out)

    def between(self, h: Tensor, batch: Any) -> Tensor:
        return self.norm(h, batch.batch).relu()


class Gated(OfGraphs):
    """A weight matrix for each edge, a recurrent cell for each node."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.cell = nn.GRU(n, n)

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.NNConv(n_in, n_out, nn.Linear(3, n_in * n_out))

    def edges(self, batch: Any) -> tuple[Tensor, ...]:
        return batch.edge_index, batch.edge_attr

    def between(self, h: Tensor, batch: Any) -> Tensor:
        return self.cell(h.relu()[None])[0][0]


class Dense(OfGraphs):
    """Pads the nodes of all graphs to one length, for a transformer."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.attention = nn.MultiheadAttention(n, 1, batch_first=True)

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.SAGEConv(n_in, n_out, aggr=["mean", "max"])

    def read_out(self, h: Tensor, batch: Any) -> Tensor:
        padded, there = to_dense_batch(h, batch.batch)
        padded = self.attention(padded, padded, padded, key_padding_mask=~there, need_weights=False)[0]
        return gnn.global_add_pool(padded[there] + h, batch.batch)


class Pooled(OfGraphs):
    """Keeps the nodes with the highest score."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.pool = gnn.TopKPooling(n, 0.6)

    def layer(self, n_in: int, n_out: int) -> nn.Module:
        return gnn.GraphConv(n_in, n_out)

    def forward(self, batch: Any) -> Tensor:
        h = self.first(batch.x, batch.edge_index).relu()
        h, edges, _, owner, *_ = self.pool(h, batch.edge_index, None, batch.batch)
        h = gnn.global_mean_pool(self.second(h, edges), owner)
        return (self.last(h).flatten() - batch.y).square()


@pytest.mark.filterwarnings("ignore:.*took no part in the loss")
@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", [WithLoops, Attending, Normalised, Gated, Dense, Pooled])
def test_batches_of_torch_geometric(tmp_path: Path, kind: type[OfGraphs], n: int) -> None:
    torch.manual_seed(0)
    data = graphs(N_BATCHES * n)
    check(kind(n), lambda: GraphLoader(data, batch_size=n), tmp_path)


def by_hand(items: Sequence[Data], *, offsets: bool) -> dict[str, Tensor]:
    counts = torch.tensor([len(one.x) for one in items])
    first = counts.cumsum(0) - counts
    batch = {name: torch.cat([one[name] for one in items]) for name in ("x", "z", "y")}
    batch["edges"] = torch.cat([one.edge_index + at for one, at in zip(items, first, strict=True)], 1)
    if offsets:
        return batch | {"offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])}
    return batch | {"owner": torch.arange(len(items)).repeat_interleave(counts)}


class ByHand(nn.Module):
    """Passes messages with functions of torch alone, as SchNet does."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.words, self.message, self.last = nn.Embedding(9, n), nn.Linear(n, n), nn.Linear(n, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        source, target = batch["edges"]
        h = self.words(batch["z"])
        h = h + torch.zeros_like(h).index_add(0, target, self.message(h)[source])
        return (self.read_out(h.tanh(), batch) - batch["y"]).square()

    def read_out(self, h: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if "offsets" in batch:
            ends = batch["offsets"].tolist()
            return torch.cat([self.last(h[a:b].mean(0)) for a, b in itertools.pairwise(ends)])
        return torch.zeros(len(batch["y"]), dtype=h.dtype).index_add(0, batch["owner"], self.last(h)[:, 0])


class Packed(ByHand):
    """Attends among the words of each text, strung together, through a mask."""

    def read_out(self, h: Tensor, batch: dict[str, Tensor]) -> Tensor:
        owner = batch["owner"]
        scores = (h @ h.T).masked_fill(owner[:, None] != owner, -torch.inf)
        return super().read_out(F.softmax(scores, -1) @ h, batch)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize(("kind", "offsets"), [(ByHand, False), (ByHand, True), (Packed, False)])
def test_batches_of_a_collate_function(tmp_path: Path, kind: type[ByHand], offsets: bool, n: int) -> None:
    torch.manual_seed(0)
    data = graphs(N_BATCHES * n)

    def loader() -> DataLoader:
        return DataLoader(data, batch_size=n, collate_fn=lambda items: by_hand(items, offsets=offsets))

    check(kind(n), loader, tmp_path)
