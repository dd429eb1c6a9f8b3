"""The vectorised upper tail equals that of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_gradtrace.analysis._hypergeometric import upper_tail


@pytest.mark.parametrize("population", [1, 2, 9, 40])
def test_all_small_cases_equal_scipy(population):
    good, drawn, k = (a.reshape(-1) for a in np.meshgrid(*[np.arange(population + 1)] * 2, np.arange(population + 2)))
    got = upper_tail(k, population, good, drawn)
    np.testing.assert_allclose(got, stats.hypergeom.sf(k - 1, population, good, drawn), rtol=1e-10, atol=1e-14)


def test_large_populations_and_tiny_tails_equal_scipy():
    rng = np.random.default_rng(0)
    good, drawn = rng.integers(1, 3000, 200), rng.integers(1, 20_000, 200)
    mean = good * drawn / 58_560
    k = np.minimum(rng.poisson(mean * rng.uniform(0.5, 3, 200)) + rng.integers(0, 5, 200), np.minimum(good, drawn))
    expected = stats.hypergeom.sf(k - 1, 58_560, good, drawn)
    assert expected.min() < 1e-30
    np.testing.assert_allclose(upper_tail(k, 58_560, good, drawn), expected, rtol=1e-8)
