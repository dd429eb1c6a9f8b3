"""Blocks are compared before they are scaled; what ties after it must not be lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradtrace.record.search import comparison
from lightning_gradtrace.record.search.candidates import magnitude
from lightning_gradtrace.record.search.comparison import at_least
from tests.record.steps import searched


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-39])
def test_what_ties_after_scaling_is_found(on_device: bool, size: float, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "MANY", 0)  # the row's own k-th largest is a limit at once
    factor, larger = np.float32(0.7), np.linspace(size, 2 * size, 1_000, dtype=np.float32)
    smaller = np.nextafter(larger, np.float32(0))
    ties = (smaller * factor == larger * factor) & (smaller < larger)
    assert ties.sum() > 100
    for pair in np.stack([smaller, larger], 1)[ties]:
        values = torch.from_numpy(np.concatenate([np.zeros(6, np.float32), pair]))[None]
        position, shift = at_least(values, float(factor), np.array([1e-45]), on_device, k=1)
        assert position.tolist()[-2:] == [6, 7]
        assert shift[-2] == shift[-1] == pair[1] * factor


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    numel=st.integers(1, 300),
    k=st.integers(0, 20),
    factor=st.sampled_from([1.0, -0.3, 0.0, 1e-30, 1e30, 3e38]),
    many=st.sampled_from([0, 1]),
    limit=st.sampled_from([1e-38, 1e-30, 0.5]),
    whole=st.booleans(),
    bad=st.sampled_from([0.0, float("nan"), float("inf")]),
    on_device=st.booleans(),
)
def test_of_every_row_what_reaches_the_limit_is_found_up_to_the_k_largest(
    seed, n, numel, k, factor, many, limit, whole, bad, on_device
) -> None:
    values = torch.randn(n, numel, generator=torch.Generator().manual_seed(seed))
    values = values.round() if whole else values
    values[0, numel // 2] = bad
    with searched(many=many):
        position, shift = at_least(values, factor, np.full(n, limit), on_device, k)
    with np.errstate(all="ignore"):
        scaled = values.numpy() * np.float32(factor)
        np.testing.assert_array_equal(shift, scaled.reshape(-1)[position])
    for row in range(n):
        size = magnitude(scaled[row])
        wanted = np.argsort(-size, kind="stable")[: k or numel]
        wanted = wanted[size[wanted] >= limit]
        assert {*wanted} <= {*(position[position // numel == row] - row * numel)}
