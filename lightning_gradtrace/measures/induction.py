"""Induction: does a head attend to what followed the last occurrence of the present token, and does that help?

Sources: Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits" (copying by eigenvalues); Olsson et
al., 2022, "In-context Learning and Induction Heads" (prefix matching, in-context learning score).
"""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_matching_score(attention: Tensor, period: int) -> Tensor:
    """Return how much each head attends to the position after the earlier occurrence of the present token.

    The sequences repeat with `period`, so the token at query q stood at q - period before, and the position after that
    is key q - period + 1 (not q - period: that is a head which attends to the same token).

    Args:
        attention: probabilities, shape (batch, head, query, key), of sequences in which token t + period is token t.
        period: length of the repeated segment, below the number of positions.

    Returns:
        Mean probability over batch and queries from `period` on, shape (head,), between 0 and 1.

    Raises:
        ValueError: the sequences don't reach into a second repetition.

    Example:
        >>> attention = torch.zeros(1, 1, 6, 6)
        >>> attention[..., range(3, 6), range(1, 4)] = 1.0
        >>> prefix_matching_score(attention, period=3)
        tensor([1.])
    """
    length = attention.shape[-2]
    if not 0 < period < length:
        raise ValueError(f"`period` is {period} for sequences of {length} positions; expected 1 to {length - 1}")
    query = torch.arange(period, length, device=attention.device)
    return attention[:, :, query, query - period + 1].mean((0, 2))


def uniform_prefix_matching(length: int, period: int) -> float:
    """Return the prefix-matching score of a causal head that attends to all earlier positions alike: its baseline.

    Args:
        length: number of positions.
        period: length of the repeated segment.

    Returns:
        Mean of 1 / (q + 1) over the queries q from `period` on.

    Example:
        >>> round(uniform_prefix_matching(4, 2), 4)  # (1/3 + 1/4) / 2
        0.2917
    """
    return sum(1 / (query + 1) for query in range(period, length)) / (length - period)


def copying_score(embedding: Tensor, value: Tensor, output: Tensor, unembedding: Tensor) -> Tensor:
    """Return how much the circuit through each head's values raises the logit of the token it attends to.

    The score is the sum of the eigenvalues of ``embedding @ value @ output @ unembedding`` (token, token) over the sum
    of their absolute values: 1 for a head that copies, -1 for one that suppresses. The eigenvalues that are not zero
    are those of the small matrix ``output @ unembedding @ embedding @ value``, so token x token is never formed.

    Args:
        embedding: shape (token, width).
        value: shape (head, width, head width).
        output: shape (head, head width, width).
        unembedding: shape (width, token).

    Returns:
        Shape (head,), between -1 and 1.
    """
    small = output @ (unembedding @ embedding) @ value
    eigenvalues = torch.linalg.eigvals(small)
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


def in_context_learning_score(losses: Tensor, early: int | slice, late: int | slice) -> Tensor:
    """Return the loss at late positions minus the loss at early ones: negative where context helps.

    With learned positions a small network learns every position in its own time, so the score of one pair of positions
    says when these two were learned; the mean over some of them says when most were.

    Args:
        losses: loss of every token, shape (batch, position).
        early: the early position (Olsson et al. take the 50th token), or a slice of positions to average over.
        late: the late position (the 500th), or a slice.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: a position is out of range, or the early ones are not before the late ones.

    Example:
        >>> losses = torch.tensor([[4.0, 4.0, 2.0, 1.0]])
        >>> in_context_learning_score(losses, 0, 3), in_context_learning_score(losses, slice(0, 2), slice(2, 4))
        (tensor(-3.), tensor(-2.5000))
    """
    n = losses.shape[1]
    first, last = (range(n)[i] if isinstance(i, slice) else range(i, i + 1) for i in (early, late))
    if not first or not last or not 0 <= first[-1] < last[0] <= last[-1] < n or first[0] < 0:
        raise ValueError(f"`early` is {early} and `late` {late}; expected 0 <= early < late < {n}")
    return losses[:, list(last)].mean() - losses[:, list(first)].mean()


def second_half_accuracy(logits: Tensor, targets: Tensor, period: int) -> Tensor:
    """Return the accuracy where the sequence repeats itself, so that only context can tell the next token.

    Args:
        logits: shape (batch, position, token).
        targets: the next token at every position, shape (batch, position).
        period: length of the repeated segment.

    Returns:
        A scalar between 0 and 1: accuracy over queries from `period` on, as in `prefix_matching_score`.
    """
    return (logits[:, period:].argmax(-1) == targets[:, period:]).float().mean()
