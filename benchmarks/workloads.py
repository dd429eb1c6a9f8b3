"""What is trained in the benchmarks: the reference experiment (A), two wide blocks (B), twelve of them for GPUs (C)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from examples.models.transformer import ReferenceTransformer

Optimizer = Literal["sgd", "adamw"]


class Block(nn.Module):
    """Pre-norm attention and MLP of plain linear layers, which every peer supports."""

    def __init__(self, width: int, hidden: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream (sample, position, width) after the block."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Blocks(nn.Module):
    """A decoder of `Block`s: tokens (sample, position) to logits (sample, position, token)."""

    def __init__(self, vocabulary: int, width: int, hidden: int, depth: int, n_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, hidden, n_heads) for _ in range(depth)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.blocks(self.embedding(tokens)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Workload:
    """A model, its data and how it is trained.

    Attributes:
        name: "A", "B" or what was changed.
        batch: samples per batch.
        length: positions per sample.
        vocabulary: number of tokens.
        width: features; hidden: neurons of the MLP; depth: number of layers; n_heads: heads of attention.
        reference: the reference experiment's model (`nn.TransformerEncoder`, position first) instead of `Blocks`.
        clip: norm to which gradients are clipped, None for no clipping.
    """

    name: str
    batch: int
    length: int
    vocabulary: int
    width: int
    hidden: int
    depth: int
    n_heads: int
    reference: bool = False
    clip: float | None = None

    @property
    def batch_axis(self) -> int:
        """Axis of the samples in the batch's tensors."""
        return 1 if self.reference else 0

    def network(self) -> nn.Module:
        """Make the model, from tokens to logits."""
        if self.reference:
            return ReferenceTransformer(self.vocabulary, self.width, self.n_heads, self.hidden, self.depth)
        return Blocks(self.vocabulary, self.width, self.hidden, self.depth, self.n_heads)

    def data(self, steps: int, text: Path | None = None) -> DataLoader[Any]:
        """Return batches (tokens, targets) for a number of steps."""
        columns = Columns(read_ids(text, self.vocabulary), self.batch, self.length, steps)
        return DataLoader(columns, batch_size=self.batch, collate_fn=partial(collate, axis=self.batch_axis))


@dataclass(frozen=True)
class Setting:
    """What is measured: a workload and how it is run.

    Attributes:
        workload: what is trained.
        optimizer: by which optimizer.
        device: "cpu" or "cuda".
        precision: as the Trainer takes it.
        text: text of the batches; None for Zipf-distributed tokens.
        steps: steps per block.
        k: entries kept per sample.
    """

    workload: Workload
    optimizer: Optimizer = "sgd"
    device: str = "cpu"
    precision: str = "32-true"
    text: Path | None = None
    steps: int = 25
    k: int = 1000

    @property
    def ours(self) -> str:
        """Name of the variant that the targets are about."""
        return f"GradTrace, TopK({self.k})"


A = Workload("A", 20, 35, 28_782, 200, 200, 3, 4, reference=True, clip=0.5)
B = Workload("B", 8, 128, 1_000, 768, 3072, 2, 12)
C = Workload("C", 8, 512, 10_000, 768, 3072, 12, 12)
TINY = Workload("tiny", 3, 5, 50, 8, 12, 2, 2)
WORKLOADS = {"A": A, "B": B, "C": C, "tiny": TINY}


class Columns(Dataset[tuple[Tensor, Tensor]]):
    """The text in columns: item ``i * batch + b`` is column b of batch i; begins anew at the end of the text."""

    def __init__(self, ids: Tensor, batch: int, length: int, steps: int) -> None:
        self.columns = ids[: len(ids) // batch * batch].view(batch, -1)
        self.batch, self.length, self.steps = batch, length, steps
        self.n_rows = (self.columns.shape[1] - 1) // length

    def __len__(self) -> int:
        """Number of items."""
        return self.batch * self.steps

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Return tokens and their successors."""
        step, column = divmod(item, self.batch)
        row = step % self.n_rows
        part = self.columns[column, row * self.length : (row + 1) * self.length + 1]
        return part[:-1], part[1:]


def collate(items: list[tuple[Tensor, Tensor]], axis: int) -> tuple[Tensor, Tensor]:
    """Stack items along the axis of the samples."""
    tokens, targets = zip(*items, strict=True)
    return torch.stack(tokens, axis), torch.stack(targets, axis)


def read_ids(text: Path | None, vocabulary: int) -> Tensor:
    """Return token ids below the vocabulary's size: of a text, or Zipf-distributed without one."""
    if text is None:
        ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
        return torch.multinomial(1 / ranks, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    words = text.read_text(encoding="utf-8").lower().split()
    numbers = {word: i % vocabulary for i, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Training(pl.LightningModule):
    """Trains a workload's model as Lightning does."""

    def __init__(self, workload: Workload, optimizer: Optimizer = "sgd") -> None:
        super().__init__()
        self.workload, self.optimizer = workload, optimizer
        self.network = workload.network()

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Return the mean loss."""
        tokens, targets = batch
        return cross_entropy(self.network(tokens), targets)

    @override
    def configure_optimizers(self) -> Any:
        """Return SGD with the reference's learning rate (a small one for others, the deeper the smaller), or AdamW."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        rate = 5.0 if self.workload.reference else 0.1 if self.workload.depth < 8 else 0.01
        return torch.optim.SGD(self.parameters(), lr=rate)
