"""Grokking measures against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradtrace.measures import (
    ExcludedLoss,
    RestrictedLoss,
    excluded_loss,
    fourier_basis,
    frequency_power,
    frequency_subspace,
    gini,
    key_frequencies,
    logit_frequency_power,
    restricted_loss,
)

P = 11


def answers() -> torch.Tensor:
    number = torch.arange(P)
    return ((number[:, None] + number) % P).flatten()


def cosine_logits(frequencies: list[int], scale: float = 3.0) -> torch.Tensor:
    """``sum_k cos(w_k (a + b - c))``: the logits of a network that has grokked."""
    number = torch.arange(P, dtype=torch.float64)
    difference = (number[:, None, None] + number[None, :, None] - number).flatten(0, 1)
    return scale * sum(torch.cos(2 * torch.pi * k * difference / P) for k in frequencies)


def test_cosine_logits_lose_nothing_by_restriction() -> None:
    logits = cosine_logits([2, 5])
    full = torch.nn.functional.cross_entropy(logits, answers())
    assert restricted_loss(logits, answers(), [2, 5]).item() == pytest.approx(full.item())


def test_cosine_logits_without_their_frequencies_are_chance() -> None:
    logits = cosine_logits([2, 5])
    assert excluded_loss(logits, answers(), [2, 5]).item() == pytest.approx(math.log(P))
    assert restricted_loss(logits, answers(), [1, 3]).item() == pytest.approx(math.log(P))
    assert restricted_loss(logits, answers(), []).item() == pytest.approx(math.log(P))


def test_exclusion_leaves_memory_alone() -> None:
    memory = torch.zeros(P * P, P, dtype=torch.float64)
    train = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))[:40]
    memory[train, answers()[train]] = 30.0
    logits = memory + cosine_logits([3])
    assert excluded_loss(logits, answers(), [3], rows=train).item() < 0.1
    assert excluded_loss(logits, answers(), [3]).item() > 1


def test_logit_power_finds_the_frequencies() -> None:
    power = logit_frequency_power(cosine_logits([2, 5]) + 7.0)
    assert power.sum().item() == pytest.approx(1)
    assert sorted(key_frequencies(power)) == [2, 5]
    assert key_frequencies(logit_frequency_power(cosine_logits([4]) + 0.5 * cosine_logits([1]))) == [4, 1]


def test_logits_that_depend_on_a_alone_have_no_wave_in_the_sum() -> None:
    logits = torch.cos(2 * torch.pi * 2 * torch.arange(P, dtype=torch.float64) / P)[:, None, None]
    power = logit_frequency_power(logits.expand(P, P, P).flatten(0, 1) * torch.randn(P, dtype=torch.float64))
    assert power.abs().max().item() < 1e-12


def test_embedding_power_is_that_of_its_waves() -> None:
    number = torch.arange(P, dtype=torch.float64)
    waves = torch.stack([torch.cos(2 * torch.pi * 3 * number / P), torch.sin(2 * torch.pi * 1 * number / P)], 1)
    power = frequency_power(waves + 4.0)
    assert power.tolist() == pytest.approx([0.5, 0, 0.5, 0, 0], abs=1e-12)


def test_subspaces_are_orthonormal_and_out_of_range_is_said() -> None:
    waves = frequency_subspace(P, [1, 4])
    torch.testing.assert_close(waves @ waves.T, torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"frequencies \[6\] are out of range; expected whole numbers from 1 to 5"):
        frequency_subspace(P, [2, 6])
    with pytest.raises(ValueError, match="`p` is 10; expected an odd modulus"):
        fourier_basis(10)


def test_gini_of_equal_and_of_single_values() -> None:
    assert gini(torch.full((5,), -2.0)).item() == pytest.approx(0)
    assert gini(torch.eye(1, 10)).item() == pytest.approx(0.9)
    assert gini(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)


def test_metrics_of_all_pairs_equal_the_functions_in_any_order_and_batches() -> None:
    keys, of, logits = [1, 3], torch.tensor([3, 8, 20]), torch.randn(P * P, P, dtype=torch.float64)
    cases = [
        (RestrictedLoss(answers(), keys), restricted_loss(logits, answers(), keys)),
        (ExcludedLoss(answers(), keys), excluded_loss(logits, answers(), keys)),
        (ExcludedLoss(answers(), keys, of), excluded_loss(logits, answers(), keys, of)),
    ]
    for metric, expected in cases:
        for rows in torch.randperm(P * P).split(25):
            metric.update(rows, logits[rows])
        torch.testing.assert_close(metric.compute(), expected)


def test_a_table_that_is_not_complete_has_no_loss() -> None:
    metric = RestrictedLoss(answers(), [1])
    metric.update(torch.arange(5), torch.randn(5, P))
    with pytest.raises(ValueError, match="logits of 5 pairs were added, expected those of all 121"):
        metric.compute()
