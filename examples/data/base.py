"""What the data modules share: from lines of text to loaders."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from examples.data.columns import ColumnDataset, collate_position_first
from examples.data.tokenizer import Vocabulary, tokenize


class TextDataModule(L.LightningDataModule):
    """Tokens, vocabulary and loaders of a text that a subclass provides as lines.

    Args:
        batch_size: columns of the training text, see `ColumnDataset`.
        context: positions per sample.
        eval_batch_size: columns of the validation and test texts.
        min_count: words less frequent in the training split become `<unk>`.
        shuffle: draw training samples in random order. The shorter last batch is then left out.
        num_workers: processes that load.
        scramble: put the words of the training text in random order, the same in every run: a control in which only
            their frequencies can be learned.

    Attributes:
        vocabulary: words of the training split, once `setup` has run.
        datasets: `ColumnDataset` by split: "train", "val" and, where there is one, "test".
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        batch_size: int = 20,
        context: int = 35,
        eval_batch_size: int = 10,
        min_count: int = 1,
        shuffle: bool = False,
        num_workers: int = 0,
        scramble: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.eval_batch_size = eval_batch_size
        self.min_count = min_count
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.scramble = scramble
        self.datasets: dict[str, ColumnDataset] = {}

    @abstractmethod
    def lines(self) -> dict[str, list[str]]:
        """Return the lines of each split: "train", "val" and, where there is one, "test"."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Tokenise the text once; the vocabulary comes from the training split alone."""
        if self.datasets:
            return
        tokens = {split: [tokenize(line) for line in lines] for split, lines in self.lines().items()}
        self.vocabulary = Vocabulary.from_lines(tokens["train"], self.min_count)
        for split, lines in tokens.items():
            text = torch.from_numpy(self.vocabulary.encode(token for line in lines for token in line))
            train = split == "train"
            if train and self.scramble:
                text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
            n_columns = self.batch_size if train else self.eval_batch_size
            self.datasets[split] = ColumnDataset(text, n_columns, self.context, whole=train and self.shuffle)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of (tokens, targets), (position, batch) each."""
        return self._loader("train", self.shuffle)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of the held-out text."""
        return self._loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the test text.

        Raises:
            ValueError: if the data has no test split.
        """
        if "test" not in self.datasets:
            found = ", ".join(f"`{split}`" for split in self.datasets)
            raise ValueError(f"`{type(self).__name__}` has the splits {found}, expected one named `test` among them")
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_position_first,
        )
