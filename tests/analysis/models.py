"""Small language models, and a planted world: topics, neurons that serve them, and a trace that says so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradtrace.store import Trace
from tests.analysis.traces import write_trace

TOPICS, WORDS, COMMON = 4, 5, 6
VOCABULARY = COMMON + TOPICS * WORDS


class TinyLM(nn.Module):
    """Every position sees those before it; dropout that shows when the mode is wrong."""

    def __init__(self, vocabulary: int = 12, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens))
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.head(torch.relu(self.hidden(x)))


class PlantedLM(nn.Module):
    """Neuron j (column j of `hidden.weight`) lifts the words of topic j over the common word 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, TOPICS)
        self.hidden = nn.Linear(TOPICS, TOPICS, bias=False)
        self.head = nn.Linear(TOPICS, VOCABULARY, bias=False)
        self.next = nn.Embedding(VOCABULARY, VOCABULARY)
        with torch.no_grad():
            for weight in self.parameters():
                weight.zero_()
            self.hidden.weight.copy_(torch.eye(TOPICS))
            for token in range(COMMON):
                self.next.weight[token, (token + 1) % COMMON] = 1.0
            for token in range(COMMON, VOCABULARY):
                topic, word = divmod(token - COMMON, WORDS)
                self.embed.weight[token, topic] = 1.0
                self.head.weight[token, topic] = 1.0
                self.next.weight[token, 0] = 1.0
                self.next.weight[token, COMMON + topic * WORDS + (word + 1) % WORDS] = 0.5

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens))) + self.next(tokens)


@dataclass
class World:
    trace: Trace
    topic: np.ndarray  # by sample
    words: list[set[int]]  # by topic


@cache
def planted_world(linked: bool = True, n_samples: int = 120, epochs: int = 2) -> World:
    """Each sample has a topic; its occurrences select entries of its topic's column, or any column if not linked."""
    rng = np.random.default_rng(3)
    topic = np.arange(n_samples) % TOPICS
    text = {}
    for sample in range(n_samples):
        common = rng.integers(0, COMMON, size=10)
        own = COMMON + topic[sample] * WORDS + rng.integers(0, WORDS, size=8)
        text[sample] = rng.permutation(np.concatenate([common, own])).tolist()
    batch = 10
    sample_id = np.concatenate([rng.permutation(n_samples) for _ in range(epochs)]).reshape(-1, batch)
    index = []
    for sample in sample_id.reshape(-1):
        column = topic[sample] if linked else rng.integers(TOPICS)
        rows = rng.permutation(TOPICS)[:3]
        index.append(np.sort(np.append(rows * TOPICS + column, 16 + rng.integers(VOCABULARY * TOPICS))))
    shapes = {"hidden.weight": (TOPICS, TOPICS), "head.weight": (VOCABULARY, TOPICS)}
    steps_per_epoch = n_samples // batch
    trace = write_trace(shapes, sample_id, np.array(index), text=text, steps_per_epoch=steps_per_epoch)
    words = [{COMMON + t * WORDS + w for w in range(WORDS)} for t in range(TOPICS)]
    return World(trace, topic, words)
