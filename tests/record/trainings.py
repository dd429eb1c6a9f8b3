"""Small trainings of several sorts: a classifier of continuous inputs, one of images, a language model."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Training = tuple[pl.LightningModule, TensorDataset, int | None]


class Net(pl.LightningModule):
    """Trains a network with cross-entropy."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Text(nn.Module):
    """A language model of two blocks."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens) + self.position, mask, is_causal=True))


def mlp(optimizer: str) -> Training:
    """Random points, by which of ten directions they lie along most."""
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Net(net, optimizer), TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1)), None


def cnn(optimizer: str) -> Training:
    """Noise as images, with labels drawn at random."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 64, 10))
    return Net(net, optimizer), TensorDataset(torch.randn(256, 3, 12, 12), torch.randint(10, (256,))), None


def text(optimizer: str) -> Training:
    """Words drawn by Zipf's law."""
    torch.manual_seed(0)
    vocabulary, length = 500, 24
    words = torch.multinomial(1 / torch.arange(1.0, vocabulary + 1), 256 * (length + 1), replacement=True)
    words = words.view(256, length + 1)
    return Net(Text(vocabulary, 64, length), optimizer), TensorDataset(words[:, :-1], words[:, 1:]), length


TRAININGS: dict[str, Callable[[str], Training]] = {"mlp": mlp, "cnn": cnn, "text": text}
