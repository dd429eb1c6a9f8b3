"""The models of the compatibility table: small, random weights, no dropout.

Every model is a module whose ``forward(batch)`` is the mean loss that is trained, and whose ``losses(batch)`` are the
losses of the samples, shape (sample,), with that mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

VOCAB, WIDTH, LENGTH, N_SAMPLES, CLASSES = 11, 8, 5, 3, 4
Batch = tuple[Tensor, Tensor]


class WithLosses(nn.Module):
    """A model whose loss is the cross-entropy of its logits, (sample, class) or (sample, position, class)."""

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def losses(self, batch: Batch) -> Tensor:
        logits, y = self.logits(batch[0]), batch[1]
        found = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
        return found.flatten(1).mean(1) if found.dim() > 1 else found

    def forward(self, batch: Batch) -> Tensor:
        logits = self.logits(batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


class Wrapped(WithLosses):
    """Any network from inputs to logits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """A residual block with batch norm and a strided shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class Recurrent(WithLosses):
    """Two layers of nn.LSTM or nn.GRU, in both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, VOCAB)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


class Encoder(WithLosses):
    """nn.TransformerEncoder on (position, sample), as in nn.Transformer's default."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def logits(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, self.head.weight.dtype)
        return self.head(self.encoder(self.embedding(x.T), mask)).transpose(0, 1)


class EncoderDecoder(WithLosses):
    """nn.Transformer with cross-attention and a sine-free learned position table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def logits(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, self.head.weight.dtype)
        h = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.transformer(h.flip(1), h, tgt_mask=mask))


class GPT(WithLosses):
    """Pre-norm decoder: one matrix for queries, keys and values, learned positions, head tied to the embedding."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH) * 0.1)
        self.attention = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers + 1))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def attend(self, layer: int, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (t.view(n, length, 2, -1).transpose(1, 2) for t in self.attention[layer](x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out[layer](mixed.transpose(1, 2).reshape(x.shape))

    def logits(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions[:, : x.shape[1]]
        for layer, mlp in enumerate(self.mlp):
            h = h + self.attend(layer, self.norms[2 * layer](h))
            h = h + mlp(self.norms[2 * layer + 1](h))
        return self.head(self.norms[-1](h))


class Research(WithLosses):
    """Attention by einsum over parameters of shape (heads, d_model, d_head), and an RMS norm written by hand."""

    def __init__(self, heads: int = 2, d_head: int = 4) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.W_pos = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(heads, WIDTH, d_head) / 3) for _ in range(3))
        self.W_O = nn.Parameter(torch.randn(heads, d_head, WIDTH) / 3)
        self.b_Q = nn.Parameter(torch.randn(heads, d_head) * 0.1)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.W_U = nn.Parameter(torch.randn(WIDTH, VOCAB) / 3)

    def logits(self, x: Tensor) -> Tensor:
        h = self.W_E[x] + self.W_pos[: x.shape[1]]
        normal = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        q = torch.einsum("btd,hde->bhte", normal, self.W_Q) + self.b_Q[:, None, :]
        k, v = (torch.einsum("btd,hde->bhte", normal, W) for W in (self.W_K, self.W_V))
        scores = torch.einsum("bhqe,bhke->bhqk", q, k) / 2
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = torch.einsum("bhqk,bhke->bhqe", pattern, v)
        return (h + torch.einsum("bhqe,hed->bqd", mixed, self.W_O)) @ self.W_U


class MixtureOfExperts(WithLosses):
    """Every token goes to its two best experts: rows are picked by index and added back."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH)) for _ in range(experts)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def logits(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        flat = h.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            routed = expert(flat[rows]) * weights[rows, slot, None]
            out.index_add_(0, rows, routed.to(out.dtype))
        return self.head(h + out.view(h.shape))


class LoRA(nn.Module):
    """A frozen matrix plus a trained one of low rank, added up as matrices."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.3)
        self.B = nn.Parameter(torch.randn(linear.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight + 2.0 * self.B @ self.A, self.linear.bias)


class ViT(WithLosses):
    """Patches by a strided convolution, a class token expanded over the batch, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 3, 3)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH) * 0.1)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.layer(tokens)[:, 0])


def reals(*shape: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(*shape), torch.randint(CLASSES, ())]


def tokens() -> list[Tensor]:
    return [torch.randint(VOCAB, (LENGTH,)), torch.randint(VOCAB, (LENGTH,))]


class GraphNetwork(nn.Module):
    """Passes messages along edges and adds up nodes, of graphs that are strung together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, (source, target), owner, y = batch
        h = self.first(x).tanh()
        h = h.index_add(0, target, self.message(h)[source])
        logits = self.last(h.tanh())
        return F.cross_entropy(logits.new_zeros(len(y), CLASSES).index_add(0, owner, logits), y, reduction="none")

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.losses(batch).mean()


def graph() -> list[Tensor]:
    """Return nodes of shape (node, feature), edges of shape (2, edge), and a class."""
    size = int(torch.randint(2, 7, ()))
    return [torch.randn(size, 4), torch.randint(size, (2, 2 * size + 1)), torch.randint(CLASSES, ())]


def strung_together(items: list[list[Tensor]]) -> list[Tensor]:
    """Return nodes, edges between them, the graph of each node, and the classes."""
    counts = torch.tensor([len(x) for x, _, _ in items])
    edges = [edges + at for (_, edges, _), at in zip(items, counts.cumsum(0) - counts, strict=True)]
    owner = torch.arange(len(items)).repeat_interleave(counts)
    return [torch.cat([x for x, _, _ in items]), torch.cat(edges, 1), owner, torch.stack([y for _, _, y in items])]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: as the table shows it.
        build: makes the model.
        item: makes one item of the data set, input and target.
        couples: whether batch norm couples the samples, so that the oracle needs a copy of the parameters for each.
        single: train in single precision, because the model computes parts of its own in it anyway.
        collate: makes a batch of items whose tensors can't be stacked; the oracle then takes the loss of each sample.
    """

    name: str
    build: Callable[[], nn.Module]
    item: Callable[[], list[Tensor]]
    couples: bool = False
    single: bool = False
    collate: Callable[[list[list[Tensor]]], list[Tensor]] | None = None

    @property
    def tolerance(self) -> float:
        """Largest relative error of a share."""
        return 1e-5 if self.single else 1e-10

    @property
    def precision(self) -> str:
        """Precision in which Lightning trains, unless the setup has one of its own."""
        return "32-true" if self.single else "64-true"


ENTRIES = [
    Entry("MLP", lambda: Wrapped(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, CLASSES)), reals(6)),
    Entry(
        "CNN with BatchNorm",
        lambda: Wrapped(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        ),
        reals(2, 5, 5),
        couples=True,
    ),
    Entry(
        "ResNet-like",
        lambda: Wrapped(
            nn.Conv2d(2, 4, 3, padding=1),
            Block(4, 4, 1),
            Block(4, 6, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        ),
        reals(2, 9, 9),
        couples=True,
    ),
    Entry("LSTM", lambda: Recurrent(nn.LSTM), tokens),
    Entry("GRU", lambda: Recurrent(nn.GRU), tokens),
    Entry("nn.TransformerEncoder", Encoder, tokens),
    Entry("nn.Transformer, encoder and decoder", EncoderDecoder, tokens),
    Entry("GPT with tied head", GPT, tokens),
    Entry("einsum transformer, (heads, d_model, d_head)", Research, tokens),
    Entry("mixture of experts", MixtureOfExperts, tokens),
    Entry(
        "LoRA",
        lambda: Wrapped(LoRA(nn.Linear(6, 9)), nn.Tanh(), LoRA(nn.Linear(9, 9)), nn.Linear(9, CLASSES)),
        reals(6),
    ),
    Entry(
        "weight norm",
        lambda: Wrapped(weight_norm(nn.Linear(6, 9)), nn.Tanh(), weight_norm(nn.Linear(9, CLASSES))),
        reals(6),
    ),
    Entry("ViT with class token", ViT, reals(1, 6, 6)),
    Entry("graph network, graphs of unlike size", GraphNetwork, graph, collate=strung_together),
]
