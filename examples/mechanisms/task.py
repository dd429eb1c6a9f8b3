"""What an experiment's task provides: sequences whose patterns are known, and measures of a network on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.models import CircuitTransformer


@dataclass
class Sequences:
    """Training data.

    Attributes:
        tokens: shape (sample, position).
        targets: shape (sample, position); -100 where the loss leaves a position out.
        patterns: one row per sample, what is known of it: a pattern is any function of a sample.
    """

    tokens: Tensor
    targets: Tensor
    patterns: pd.DataFrame


class Task(ABC):
    """One task.

    Attributes:
        words: text of every token id.
        context: positions of a sequence.
        n_outputs: number of logits; None for one per token.
    """

    words: list[str]
    context: int
    n_outputs: int | None = None

    @abstractmethod
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        """Return training data.

        Args:
            n_samples: number of samples; tasks with a fixed table of samples take no notice of it.
            seed: of the data.
        """

    @abstractmethod
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        """Measure a network in evaluation mode; the same held-out data at every call."""


class TaskData(L.LightningDataModule):
    """Loads the sequences of a task.

    Args:
        task: the task.
        batch_size: samples per step; 0 for all of them, full batch.
        n_samples: number of training samples.
        seed: of the data and of their order.
    """

    def __init__(self, task: Task, batch_size: int = 64, n_samples: int = 100_000, seed: int = 0) -> None:
        super().__init__()
        self.sequences = task.sequences(n_samples, seed)
        self.batch_size = batch_size or len(self.sequences.tokens)
        self.seed = seed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of (tokens, targets), (batch, position) each, in random order unless all fit into one."""
        return DataLoader(
            TensorDataset(self.sequences.tokens, self.sequences.targets),
            batch_size=self.batch_size,
            shuffle=self.batch_size < len(self.sequences.tokens),
            generator=torch.Generator().manual_seed(self.seed),
        )
