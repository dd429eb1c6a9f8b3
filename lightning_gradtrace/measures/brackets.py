"""Matching brackets: how deep a position is nested, and whether the right bracket closes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bracket_depth(tokens: Tensor, opening: Sequence[int], closing: Sequence[int]) -> Tensor:
    """Return how many brackets are open after every token.

    Args:
        tokens: token ids, shape (..., position).
        opening: ids of opening brackets.
        closing: ids of closing brackets.

    Returns:
        Whole numbers of the shape of `tokens`; negative where more was closed than opened.

    Example:
        >>> bracket_depth(torch.tensor([0, 0, 5, 1, 1]), opening=[0], closing=[1])
        tensor([1, 2, 2, 1, 0])
    """
    opened = torch.isin(tokens, torch.as_tensor(list(opening), device=tokens.device)).long()
    closed = torch.isin(tokens, torch.as_tensor(list(closing), device=tokens.device)).long()
    return (opened - closed).cumsum(-1)


def innermost_open(tokens: Tensor, opening: Sequence[int], closing: Sequence[int]) -> Tensor:
    """Return where the innermost open bracket stands, as seen after every token.

    A bracket that closes though none is open, as at the start of a piece cut out of a text, is passed over. Kinds are
    not told apart.

    Args:
        tokens: token ids, shape (sample, position).
        opening: ids of opening brackets.
        closing: ids of closing brackets.

    Returns:
        Positions, shape (sample, position); -1 where no bracket is open.

    Example:
        >>> innermost_open(torch.tensor([[1, 0, 5, 0, 1, 1, 5]]), opening=[0], closing=[1])
        tensor([[-1,  1,  1,  3,  1, -1, -1]])
    """
    depth = bracket_depth(tokens, opening, closing)
    depth = depth - depth.cummin(-1).values.clamp(max=0)
    opens = torch.isin(tokens, torch.as_tensor(list(opening), device=tokens.device))
    position = torch.arange(tokens.shape[-1], device=tokens.device)
    innermost = torch.full_like(tokens, -1)
    for level in range(1, int(depth.max()) + 1):
        last = torch.where(opens & (depth == level), position, -1).cummax(-1).values
        innermost = torch.where(depth == level, last, innermost)
    return innermost


def closing_accuracy(logits: Tensor, targets: Tensor, closing: Sequence[int]) -> Tensor:
    """Return how often the right kind of bracket is the likeliest closing one where a bracket closes.

    Chance is one over the number of kinds.

    Args:
        logits: shape (..., token).
        targets: the next token, shape (...).
        closing: ids of closing brackets.

    Returns:
        A scalar between 0 and 1; NaN if no bracket closes.

    Raises:
        ValueError: fewer than two kinds, among which nothing has to be chosen.
    """
    if len(closing) < 2:
        raise ValueError(f"`closing` has {len(closing)} ids; expected at least two kinds of brackets to choose among")
    kinds = torch.as_tensor(list(closing), device=targets.device)
    here = torch.isin(targets, kinds)
    chosen = kinds[logits[here][:, kinds].argmax(-1)]
    return (chosen == targets[here]).float().mean()
