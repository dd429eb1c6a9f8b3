"""The measures as torchmetrics metrics: update with batches, compute over all of them.

Most are means. Restricted and excluded loss need the logits of all pairs at once, so their metrics keep them. Measures
of weights - Fourier power, copying score, Gini coefficient, norm - have no batches and stay plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_gradtrace.measures.brackets import closing_accuracy
from lightning_gradtrace.measures.fourier import excluded_loss, restricted_loss
from lightning_gradtrace.measures.induction import (
    in_context_learning_score,
    prefix_matching_score,
    second_half_accuracy,
)
from lightning_gradtrace.measures.predictions import flip_rate, logit_difference


class _Mean(Metric):
    """Weighted mean of a value over batches."""

    full_state_update = False
    weighted: Tensor
    weight: Tensor

    def __init__(self, shape: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(**options)
        self.add_state("weighted", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def _add(self, value: Tensor, weight: int) -> None:
        if weight:
            self.weighted = self.weighted + value * weight
            self.weight = self.weight + weight

    @override
    def compute(self) -> Tensor:
        """Return the mean over everything seen since the last reset, NaN before any update."""
        return self.weighted / self.weight


class PrefixMatching(_Mean):
    """Mean of `prefix_matching_score`, shape (head,).

    Args:
        n_heads: number of heads.
        period: length of the repeated segment.
        **options: see `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, n_heads: int, period: int, **options: Any) -> None:
        super().__init__((n_heads,), **options)
        self.period = period

    @override
    def update(self, attention: Tensor) -> None:
        """Add attention probabilities (batch, head, query, key)."""
        self._add(prefix_matching_score(attention, self.period), len(attention))


class SecondHalfAccuracy(_Mean):
    """Mean of `second_half_accuracy`.

    Args:
        period: length of the repeated segment.
        **options: see `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, period: int, **options: Any) -> None:
        super().__init__(**options)
        self.period = period

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (batch, position, token) and targets (batch, position)."""
        self._add(second_half_accuracy(logits, targets, self.period), len(logits))


class InContextLearning(_Mean):
    """Mean of `in_context_learning_score`, in nats.

    Args:
        early: the early position, or a slice of positions.
        late: the late position, or a slice.
        **options: see `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, early: int | slice, late: int | slice, **options: Any) -> None:
        super().__init__(**options)
        self.early, self.late = early, late

    @override
    def update(self, losses: Tensor) -> None:
        """Add token losses (batch, position)."""
        self._add(in_context_learning_score(losses, self.early, self.late), len(losses))


class LogitDifference(_Mean):
    """Mean of `logit_difference`, in logits."""

    higher_is_better = True

    @override
    def update(self, logits: Tensor, right: Tensor, wrong: Tensor) -> None:
        """Add logits (batch, token) and token ids (batch,) of the right and the wrong answers."""
        self._add(logit_difference(logits, right, wrong), len(logits))


class ClosingAccuracy(_Mean):
    """Mean of `closing_accuracy` over all closing brackets.

    Args:
        closing: ids of closing brackets.
        **options: see `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, closing: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.closing = list(closing)

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (..., token) and targets (...)."""
        n = int(torch.isin(targets, torch.as_tensor(self.closing, device=targets.device)).sum())
        self._add(closing_accuracy(logits, targets, self.closing), n)


class FlipRate(_Mean):
    """Mean of `flip_rate` over all positions."""

    @override
    def update(self, logits: Tensor, other: Tensor) -> None:
        """Add the logits (..., token) of two models on the same batch."""
        self._add(flip_rate(logits, other), logits[..., 0].numel())


class _AllPairs(Metric):
    """Keeps the logits of all pairs (a, b) until they are complete.

    Args:
        answers: the right answers, shape (p * p,), pair (a, b) in row a * p + b.
        frequencies: the key frequencies.
        **options: see `torchmetrics.Metric`.
    """

    full_state_update = False
    rows: list[Tensor]
    logits: list[Tensor]
    answers: Tensor

    def __init__(self, answers: Tensor, frequencies: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.frequencies = list(frequencies)
        self.register_buffer("answers", answers, persistent=False)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("logits", [], dist_reduce_fx="cat")

    @override
    def update(self, rows: Tensor, logits: Tensor) -> None:
        """Add the logits (batch, p) of the pairs with these numbers (batch,)."""
        self.rows.append(rows)
        self.logits.append(logits)

    def _table(self) -> Tensor:
        """Return the logits of all pairs in order; a pair that came twice, as it came last."""
        n = len(self.answers)
        rows = dim_zero_cat(self.rows) if self.rows else torch.empty(0, dtype=torch.long)
        seen = len(rows.unique())
        if seen < n:
            raise ValueError(f"logits of {seen} pairs were added, expected those of all {n}")
        logits = dim_zero_cat(self.logits)
        return torch.empty(n, logits.shape[1], dtype=logits.dtype, device=logits.device).index_copy_(0, rows, logits)


class RestrictedLoss(_AllPairs):
    """`restricted_loss` of all pairs.

    Args:
        answers: the right answers, shape (p * p,), pair (a, b) in row a * p + b.
        frequencies: the key frequencies.
        **options: see `torchmetrics.Metric`.
    """

    higher_is_better = False

    @override
    def compute(self) -> Tensor:
        """Return the loss, in nats.

        Raises:
            ValueError: the logits of some pairs are missing.
        """
        return restricted_loss(self._table(), self.answers, self.frequencies)


class ExcludedLoss(_AllPairs):
    """`excluded_loss` over some pairs, from the logits of all.

    Args:
        answers: the right answers, shape (p * p,), pair (a, b) in row a * p + b.
        frequencies: the key frequencies.
        of: numbers of the pairs to average over, e.g. the training pairs; None for all.
        **options: see `torchmetrics.Metric`.
    """

    def __init__(self, answers: Tensor, frequencies: Sequence[int], of: Tensor | None = None, **options: Any) -> None:
        super().__init__(answers, frequencies, **options)
        self.of = of

    @override
    def compute(self) -> Tensor:
        """Return the loss, in nats.

        Raises:
            ValueError: the logits of some pairs are missing.
        """
        return excluded_loss(self._table(), self.answers, self.frequencies, self.of)
