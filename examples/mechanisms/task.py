"""What an experiment's task provides: sequences whose patterns are known, and measures of a network on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler
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
        batch_size: samples per step.
        n_samples: number of training samples.
        full_batches: number of steps that take all samples at once, instead of one pass over them in batches.
        seed: of the data and of their order.
    """

    def __init__(
        self, task: Task, batch_size: int = 64, n_samples: int = 100_000, full_batches: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.sequences = task.sequences(n_samples, seed)
        n = len(self.sequences.tokens)
        if full_batches:
            self._order: Sampler[list[int]] = FullBatches(n, full_batches)
        else:
            shuffled = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
            self._order = BatchSampler(shuffled, batch_size, drop_last=True)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of (tokens, targets), (batch, position) each."""
        return DataLoader(_Batches(self.sequences), batch_sampler=self._order, collate_fn=_as_they_are)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Takes the samples of a batch at once: one by one is what a full batch of a small network would wait for."""

    def __init__(self, sequences: Sequences) -> None:
        self._tensors = (sequences.tokens, sequences.targets)

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        return self._tensors[0][sample], self._tensors[1][sample]

    def __getitems__(self, samples: list[int]) -> tuple[Tensor, Tensor]:
        pick = torch.tensor(samples)
        return self._tensors[0][pick], self._tensors[1][pick]


def _as_they_are(batch: Any) -> Any:
    return batch


class FullBatches(Sampler[list[int]]):
    """All samples, in the same order, so many times: full-batch training without an epoch per step.

    Args:
        n_samples: number of samples.
        times: number of batches.
    """

    def __init__(self, n_samples: int, times: int) -> None:
        self._batch = list(range(n_samples))
        self._times = times

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the whole batch again and again."""
        return (list(self._batch) for _ in range(self._times))

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._times
