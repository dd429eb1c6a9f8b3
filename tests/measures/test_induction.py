"""Induction measures against hand-built heads and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradtrace.measures import (
    copying_score,
    in_context_learning_score,
    prefix_matching_score,
    second_half_accuracy,
    uniform_prefix_matching,
)


def repeated(period: int, repeats: int = 2, vocab: int = 50) -> torch.Tensor:
    """Segments without a token twice, repeated."""
    rows = [torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:period] for i in range(3)]
    return torch.stack(rows).repeat(1, repeats)


def induction_attention(tokens: torch.Tensor) -> torch.Tensor:
    """What a perfect induction head does, from the tokens: look one past the last earlier occurrence."""
    batch, length = tokens.shape
    attention = torch.zeros(batch, 1, length, length)
    for b in range(batch):
        for q in range(length):
            earlier = [k for k in range(q) if tokens[b, k] == tokens[b, q]]
            attention[b, 0, q, earlier[-1] + 1 if earlier else 0] = 1
    return attention


@pytest.mark.parametrize(("period", "repeats"), [(5, 2), (4, 3), (1, 4)])
def test_a_hand_built_induction_head_scores_one(period: int, repeats: int) -> None:
    tokens = repeated(period, repeats)
    assert prefix_matching_score(induction_attention(tokens), period).item() == pytest.approx(1)


def test_a_head_that_attends_to_the_same_token_scores_zero() -> None:
    tokens = repeated(6)
    same = induction_attention(tokens).roll(-1, 3)  # the key one to the left of the right one
    assert prefix_matching_score(same, 6).item() == 0


def test_uniform_attention_scores_its_baseline() -> None:
    length, period = 12, 6
    causal = torch.ones(length, length).tril()
    attention = (causal / causal.sum(1, keepdim=True)).expand(2, 3, length, length)
    score = prefix_matching_score(attention, period)
    assert score.tolist() == pytest.approx([uniform_prefix_matching(length, period)] * 3)
    harmonic = sum(1 / n for n in range(period + 1, length + 1)) / period
    assert uniform_prefix_matching(length, period) == pytest.approx(harmonic)


def test_a_period_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`period` is 4 for sequences of 4 positions; expected 1 to 3"):
        prefix_matching_score(torch.zeros(1, 1, 4, 4), 4)


def test_copying_is_one_for_the_identity_circuit_and_minus_one_for_its_negative() -> None:
    embedding = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    value = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    values, outputs = torch.stack([value, value]), torch.stack([value.T, -value.T])
    score = copying_score(embedding, values, outputs, embedding.T)
    assert score.tolist() == pytest.approx([1, -1])


def test_copying_equals_the_eigenvalues_of_the_whole_circuit() -> None:
    embedding, unembedding = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    value, output = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    score = copying_score(embedding, value, output, unembedding)
    for head in range(2):
        found = torch.linalg.eigvals(embedding @ value[head] @ output[head] @ unembedding)
        assert score[head].item() == pytest.approx((found.real.sum() / found.abs().sum()).item())


def test_the_in_context_learning_score_is_negative_where_context_helps() -> None:
    losses = torch.tensor([[4.0, 3.0, 1.0], [2.0, 1.0, 1.0]])
    assert in_context_learning_score(losses, 0, 2).item() == pytest.approx(1 - 3)
    with pytest.raises(ValueError, match="expected 0 <= early < late < 3"):
        in_context_learning_score(losses, 1, 3)


def test_second_half_accuracy_counts_queries_from_the_period_on() -> None:
    targets = torch.tensor([[1, 2, 3, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 3, 2]]), 4).float()
    assert second_half_accuracy(logits, targets, 2).item() == 0.5
    assert math.isclose(second_half_accuracy(logits, targets, 1).item(), 1 / 3, rel_tol=1e-6)
