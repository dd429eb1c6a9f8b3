"""Measures of predictions and weights that belong to no one mechanism."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Return the mean difference between the logits of the right and of a wrong answer.

    Indirect object identification: ``right`` is the name of the indirect object, ``wrong`` that of the subject.
    Source: Wang et al., 2022, "Interpretability in the Wild".

    Args:
        logits: at the position that answers, shape (batch, token).
        right: token ids, shape (batch,).
        wrong: token ids, shape (batch,).

    Returns:
        A scalar, in logits.

    Example:
        >>> logit_difference(torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([2]), torch.tensor([1]))
        tensor(3.)
    """
    return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None])).mean()


def flip_rate(logits: Tensor, other: Tensor) -> Tensor:
    """Return the share of positions at which two models predict different tokens.

    Args:
        logits: shape (..., token).
        other: the same shape.

    Returns:
        A scalar between 0 and 1.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != other.shape:
        raise ValueError(f"logits have shapes {tuple(logits.shape)} and {tuple(other.shape)}; expected the same")
    return (logits.argmax(-1) != other.argmax(-1)).float().mean()


def weight_norm(weights: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all weights together, e.g. of ``model.parameters()``.

    Example:
        >>> weight_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(w.detach()) for w in weights]))
