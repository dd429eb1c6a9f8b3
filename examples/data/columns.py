"""The reference's batches as a map-style data set whose item numbers say which batch and column they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class ColumnDataset(Dataset[tuple[Tensor, Tensor]]):
    """A text cut into columns of equal length, which are read in step, `context` tokens at a time.

    Item ``i * n_columns + b`` is column b of batch i: its tokens and, for each of them, the token that follows. A plain
    loader with ``batch_size=n_columns, shuffle=False`` therefore gives the reference's batches, and a sample keeps its
    number over epochs. What does not fill a row of all columns is left out; the last batch may be shorter.

    Args:
        tokens: the text, (n,).
        n_columns: columns, the batch size of the reference.
        context: positions per item.
        whole: leave out a shorter last batch, so that items can be mixed freely in shuffled batches.

    Raises:
        ValueError: if the text is too short for one batch.

    Example:
        >>> data = ColumnDataset(torch.arange(14), n_columns=2, context=4)
        >>> len(data), [data[2][0].tolist(), data[2][1].tolist()]
        (4, [[4, 5], [5, 6]])
    """

    def __init__(self, tokens: Tensor, n_columns: int, context: int, whole: bool = False) -> None:
        n_rows = len(tokens) // n_columns
        self.n_batches = (n_rows - 1) // context if whole else -(-(n_rows - 1) // context)
        if self.n_batches < 1:
            raise ValueError(
                f"a text of {len(tokens)} tokens gives {n_columns} columns of {n_rows}, expected at least "
                f"{context + 1 if whole else 2} tokens in each; use a longer text, a smaller batch or a shorter context"
            )
        self.context = context
        self.columns = tokens[: n_rows * n_columns].view(n_columns, n_rows)

    def __len__(self) -> int:
        return self.n_batches * len(self.columns)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of a data set of {len(self)} items")
        batch, column = divmod(item, len(self.columns))
        first = batch * self.context
        text = self.columns[column, first : first + self.context + 1]
        return text[:-1], text[1:]


def collate_position_first(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack items along the second axis: tokens and targets, (position, batch) each.

    Args:
        items: (tokens, targets) of each sample, all of one length.
    """
    tokens, targets = zip(*items, strict=True)
    return torch.stack(tokens, dim=1), torch.stack(targets, dim=1)
