"""Models x losses x layouts for the capture tests: each case can be run as a batch and one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import models

REDUCTIONS = ("mean", "sum", "ignored")
IGNORE = -100


class NoProbe:
    """Sizes leave no doubt, and the layout is known from then on."""

    def coincides(self) -> bool:
        return False

    def __call__(self):
        pytest.fail("the probe was asked")


@dataclass
class Case:
    """A model and its data.

    Attributes:
        name: name of the case.
        build: makes the model.
        batch: makes (inputs, targets) with the samples along ``batch_axis``; targets are -100 where ignored.
        batch_axis: axis of the samples in inputs and targets.
        n_samples: number of samples.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[bool], tuple[Tensor, Tensor]]
    batch_axis: int
    n_samples: int

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str, n_targets: int) -> Tensor:
        """Cross-entropy over all targets, divided by ``n_targets`` unless summed."""
        logits = model(inputs)
        total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
        return total if reduction == "sum" else total / n_targets

    def contribution(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str
    ) -> Callable[[int], Tensor]:
        """Return the function that gives one sample's part of the loss of the whole batch."""
        n_targets = int((targets != IGNORE).sum())

        def one(i: int) -> Tensor:
            pick = slice(i, i + 1)
            x, y = (t.movedim(self.batch_axis, 0)[pick].movedim(0, self.batch_axis) for t in (inputs, targets))
            return self.loss(model, x, y, reduction, n_targets)

        return one


class Encoder(nn.Module):
    """A small nn.TransformerEncoder language model."""

    def __init__(self, batch_first: bool, norm_first: bool = False, vocab: int = 11, width: int = 8) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(vocab, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            width, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1 if self.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.head.weight.dtype)
        return self.head(self.encoder(self.embedding(tokens), mask, is_causal=True))


class Decoder(nn.Module):
    """Cross-attention: the packed in-projection of nn.MultiheadAttention is split inside."""

    def __init__(self, vocab: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.memory = nn.Linear(width, width)
        self.layer = nn.TransformerDecoderLayer(width, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.layer(x, torch.tanh(self.memory(x))))


class Tied(nn.Module):
    """Embedding and head share one weight; a layer is used twice."""

    def __init__(self, vocab: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.twice = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.twice(torch.relu(self.twice(x)))))


class Pooled(nn.Module):
    """An MLP on real inputs with one target per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 9), nn.PReLU(), nn.LayerNorm(9), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _tokens(length: int, n: int, batch_first: bool, vocab: int = 11) -> Callable[[bool], tuple[Tensor, Tensor]]:
    def make(ignored: bool) -> tuple[Tensor, Tensor]:
        inputs, targets = torch.randint(1, vocab, (n, length)), torch.randint(0, vocab, (n, length))
        if ignored:
            inputs[0, -2:] = 0  # padding
            targets[torch.rand(n, length) < 0.4] = IGNORE
            targets[0, 0] = 1  # at least one stays
        return (inputs, targets) if batch_first else (inputs.T.contiguous(), targets.T.contiguous())

    return make


def _images(n: int) -> Callable[[bool], tuple[Tensor, Tensor]]:
    def make(ignored: bool) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 16), _reals(n)(ignored)[1]

    return make


def _reals(n: int) -> Callable[[bool], tuple[Tensor, Tensor]]:
    def make(ignored: bool) -> tuple[Tensor, Tensor]:
        targets = torch.randint(0, 4, (n,))
        if ignored:
            targets[1] = IGNORE
        return torch.randn(n, 6), targets

    return make


CASES = [
    Case("encoder, position first", lambda: Encoder(False), _tokens(5, 4, False), 1, 4),
    Case("encoder, batch first", lambda: Encoder(True), _tokens(5, 4, True), 0, 4),
    Case("encoder, norm first", lambda: Encoder(True, norm_first=True), _tokens(3, 5, True), 0, 5),
    Case("encoder, T = B, position first", lambda: Encoder(False), _tokens(4, 4, False), 1, 4),
    Case("encoder, T = B, batch first", lambda: Encoder(True), _tokens(4, 4, True), 0, 4),
    Case("encoder, T = 2 B", lambda: Encoder(False), _tokens(6, 3, False), 1, 3),
    Case("encoder, B = width", lambda: Encoder(True), _tokens(5, 8, True), 0, 8),
    Case("encoder, one sample", lambda: Encoder(True), _tokens(5, 1, True), 0, 1),
    Case("decoder, cross-attention", Decoder, _tokens(5, 4, True), 0, 4),
    Case("tied weights", Tied, _tokens(5, 4, True), 0, 4),
    Case("mlp", Pooled, _reals(5), 0, 5),
    Case("positions, shared (1, T)", lambda: models.Positions("shared"), _tokens(5, 4, True), 0, 4),
    Case("positions, flat, T = B", lambda: models.Positions("flat"), _tokens(4, 4, True), 0, 4),
    Case("positions, one copy for each sample", lambda: models.Positions("copied"), _tokens(5, 4, True), 0, 4),
    Case("positions, copied, T = B = width", lambda: models.Positions("copied"), _tokens(8, 8, True), 0, 8),
    Case("positions, one sample", lambda: models.Positions("copied"), _tokens(5, 1, True), 0, 1),
    Case("image transformer, class token", models.ImageTransformer, _images(3), 0, 3),
    Case("image transformer, B = positions", models.ImageTransformer, _images(5), 0, 5),
    Case("latents expanded over the batch", models.Latents, _tokens(5, 4, True), 0, 4),
    Case("latents, as many as samples", models.Latents, _tokens(5, 3, True), 0, 3),
    Case("research transformer", models.Research, _tokens(5, 4, True), 0, 4),
    Case("research transformer, T = B", models.Research, _tokens(4, 4, True), 0, 4),
    Case("research transformer, B = heads", models.Research, _tokens(6, 2, True), 0, 2),
    Case("adapted weights", models.Adapted, _tokens(5, 3, True), 0, 3),
    Case("adapted weights, B = width", models.Adapted, _tokens(5, 8, True), 0, 8),
    Case("deep sets, hypernetwork", models.Sets, _reals(5), 0, 5),
    Case("last token by index", models.LastToken, _tokens(5, 4, True), 0, 4),
    Case("experts by mask", lambda: models.Experts("mask"), _tokens(5, 4, True), 0, 4),
    Case("experts by index", lambda: models.Experts("index"), _tokens(5, 4, True), 0, 4),
    Case("experts by sorting", lambda: models.Experts("sorted"), _tokens(4, 4, True), 0, 4),
    Case("lstm", lambda: models.Recurrent(nn.LSTM, False), _tokens(5, 3, False), 1, 3),
    Case(
        "lstm, T = B, two layers, both ways",
        lambda: models.Recurrent(nn.LSTM, True, num_layers=2, bidirectional=True),
        _tokens(4, 4, True),
        0,
        4,
    ),
    Case("gru, two layers", lambda: models.Recurrent(nn.GRU, True, num_layers=2), _tokens(5, 3, True), 0, 3),
    Case("rnn, no biases", lambda: models.Recurrent(nn.RNN, True, bias=False), _tokens(5, 3, True), 0, 3),
    Case("recurrent cells", models.Cells, _tokens(5, 4, True), 0, 4),
    Case("packed lstm", lambda: models.Packed(nn.LSTM), _tokens(5, 4, True), 0, 4),
    Case("packed gru", lambda: models.Packed(nn.GRU), _tokens(5, 4, True), 0, 4),
]
