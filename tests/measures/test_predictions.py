"""Brackets, logit differences, flips, and the metrics of all measures."""

from __future__ import annotations

import pytest
import torch

from lightning_gradtrace.measures import (
    ClosingAccuracy,
    FlipRate,
    InContextLearning,
    LogitDifference,
    PrefixMatching,
    SecondHalfAccuracy,
    bracket_depth,
    closing_accuracy,
    flip_rate,
    in_context_learning_score,
    logit_difference,
    prefix_matching_score,
    second_half_accuracy,
    weight_norm,
)

OPEN, CLOSE = [1, 3], [2, 4]


def test_depth_counts_both_kinds_of_brackets() -> None:
    tokens = torch.tensor([[1, 3, 0, 4, 2], [2, 1, 1, 2, 0]])
    assert bracket_depth(tokens, OPEN, CLOSE).tolist() == [[1, 2, 2, 1, 0], [-1, 0, 1, 0, 0]]


def test_closing_accuracy_looks_at_closing_brackets_alone_and_chooses_among_them() -> None:
    targets = torch.tensor([2, 4, 2, 0])
    logits = torch.zeros(4, 5)
    logits[:, 0] = 9.0  # another token is likelier everywhere
    logits[0, 2], logits[1, 2], logits[2, 2] = 1.0, 1.0, 1.0
    assert closing_accuracy(logits, targets, CLOSE).item() == pytest.approx(2 / 3)
    assert closing_accuracy(logits[3:], targets[3:], CLOSE).isnan()
    with pytest.raises(ValueError, match="expected at least two kinds"):
        closing_accuracy(logits, targets, [2])


def test_flips_and_differences() -> None:
    a, b = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    assert flip_rate(a, b).item() == 0.5
    assert logit_difference(a, torch.arange(4), torch.tensor([1, 0, 3, 2])).item() == 1
    with pytest.raises(ValueError, match="expected the same"):
        flip_rate(a, b[:2])


def test_the_weight_norm_is_that_of_all_weights_strung_together() -> None:
    weights = [torch.randn(3, 2), torch.randn(5)]
    assert weight_norm(weights).item() == pytest.approx(torch.cat([w.flatten() for w in weights]).norm().item())


def test_metrics_equal_the_functions_on_everything_at_once() -> None:
    logits, targets = torch.randn(10, 8, 6), torch.randint(0, 6, (10, 8))
    attention, losses = torch.randn(10, 3, 8, 8).softmax(-1), torch.rand(10, 8)
    right, wrong = torch.randint(0, 6, (10,)), torch.randint(0, 6, (10,))
    other = torch.randn(10, 8, 6)
    cases = [
        (PrefixMatching(3, period=4), (attention,), prefix_matching_score(attention, 4)),
        (SecondHalfAccuracy(4), (logits, targets), second_half_accuracy(logits, targets, 4)),
        (InContextLearning(1, 6), (losses,), in_context_learning_score(losses, 1, 6)),
        (LogitDifference(), (logits[:, -1], right, wrong), logit_difference(logits[:, -1], right, wrong)),
        (ClosingAccuracy(CLOSE), (logits, targets), closing_accuracy(logits, targets, CLOSE)),
        (FlipRate(), (logits, other), flip_rate(logits, other)),
    ]
    for metric, values, expected in cases:
        for part in (slice(0, 3), slice(3, 10)):  # parts of unlike size
            metric.update(*(value[part] for value in values))
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
        assert metric.weight == 0


def test_a_batch_without_closing_brackets_leaves_the_mean_alone() -> None:
    metric = ClosingAccuracy(CLOSE)
    metric.update(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    metric.update(torch.eye(5)[[2, 2]], torch.tensor([2, 4]))
    assert metric.compute().item() == 0.5
