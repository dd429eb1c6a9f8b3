"""Intervals are those of the theory where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradtrace.analysis._bootstrap import bootstrap, ratio


def mean_of(values):
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_interval_of_a_mean_has_the_width_of_the_theory():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(mean_of(values), [400], n_resamples=2000, rng=np.random.default_rng(1))
    error = values.std(ddof=1) / 20
    assert found.effect == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        a, b = rng.normal(1.0, 1.0, size=60), rng.normal(0.0, 2.0, size=80)

        def difference(wa, wb, a=a, b=b):
            return mean_of(a)(wa) - mean_of(b)(wb)

        found = bootstrap(difference, [60, 80], confidence=0.9, n_resamples=300, rng=rng)
        covered += found.low <= 1.0 <= found.high
    assert 0.84 <= covered / 200 <= 0.95


def test_groups_are_resampled_apart_and_units_keep_their_number():
    sizes = []

    def statistic(a, b):
        sizes.append((a.sum(axis=1), b.sum(axis=1)))
        return a[:, 0] - b[:, 0]

    bootstrap(statistic, [5, 9], n_resamples=50, rng=np.random.default_rng(0))
    assert all((a == 5).all() and (b == 9).all() for a, b in sizes)


def test_undefined_resamples_are_left_out():
    values = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    found = bootstrap(lambda w: ratio(w @ values, w @ values), [5], n_resamples=200, rng=np.random.default_rng(0))
    assert found == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("sizes", [[1], [0], [5, 1]])
def test_fewer_than_two_units_have_no_interval(sizes):
    found = bootstrap(lambda *w: ratio(w[0].sum(axis=1), w[0].sum(axis=1)), sizes, rng=np.random.default_rng(0))
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(found.effect) == (sizes[0] == 0)


def test_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    one, other = (bootstrap(mean_of(values), [20], rng=np.random.default_rng(4)) for _ in range(2))
    assert one == other
