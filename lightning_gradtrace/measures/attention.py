"""Where heads look: attention to positions that a mechanism is known to need."""

from __future__ import annotations

from torch import Tensor


def attention_to(attention: Tensor, keys: Tensor, where: Tensor) -> Tensor:
    """Return how much each head attends to one given position per query: a bracket to be closed, a name to be said.

    Args:
        attention: probabilities, shape (batch, head, query, key).
        keys: the position of interest as seen from every query, shape (batch, query); any valid position where none is.
        where: which queries count, bool, shape (batch, query).

    Returns:
        Mean probability over the queries that count, shape (head,), between 0 and 1; NaN if none counts.

    Raises:
        ValueError: the shapes don't fit together.

    Example:
        >>> import torch
        >>> attention = torch.eye(3)[None, None]  # every query attends to itself
        >>> attention_to(attention, keys=torch.tensor([[0, 0, 2]]), where=torch.tensor([[True, True, True]]))
        tensor([0.6667])
    """
    queries = (attention.shape[0], attention.shape[2])
    if tuple(keys.shape) != queries or tuple(where.shape) != queries:
        raise ValueError(
            f"`keys` has shape {tuple(keys.shape)} and `where` {tuple(where.shape)}; expected {queries}, the batch and "
            "the queries of `attention`"
        )
    looked = attention.gather(3, keys[:, None, :, None].expand(-1, attention.shape[1], -1, 1)).squeeze(3)
    return looked.transpose(0, 1)[:, where].mean(1)
