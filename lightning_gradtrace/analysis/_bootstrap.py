"""Bootstrap intervals of statistics that are computed from how often each unit was drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

# Draws held at once over all groups, 8 bytes each.
_DRAWS = 1 << 22


class Interval(NamedTuple):
    """An effect and its percentile interval."""

    effect: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., FloatArray],
    sizes: Sequence[int],
    *,
    confidence: float = 0.95,
    n_resamples: int = 999,
    rng: np.random.Generator,
) -> Interval:
    """Estimate a percentile interval by resampling the units of each group independently.

    Resampling is `scipy.stats.bootstrap` on unit numbers; the statistic receives how often each unit was drawn, so
    that any ratio of sums over units is two matrix products. Resamples in which the statistic is undefined (NaN, e.g.
    no notable token in any drawn sample) are left out of the interval. A bootstrap can't see what no unit shows: if
    no sample flips at all, the interval is the single point 0 and says little; look at the counts.

    Args:
        statistic: takes for each group the weights (resample, unit), returns (resample,).
        sizes: number of units of each group.
        confidence: of the interval.
        n_resamples: how many.
        rng: source of randomness.

    Returns:
        The effect, and its interval: NaN if a group has fewer than two units or no resample is defined.
    """
    effect = float(statistic(*(np.ones((1, n)) for n in sizes))[0])
    if min(sizes) < 2 or not np.isfinite(effect):
        return Interval(effect, np.nan, np.nan)

    def of_draws(*draws: npt.NDArray[Any], axis: int = -1) -> npt.NDArray[Any]:
        weights = [_weights(d, n) for d, n in zip(draws, sizes, strict=True)]
        found = statistic(*weights)
        return found if draws[0].ndim > 1 else found[0]

    with warnings.catch_warnings():
        # scipy warns of undefined resamples, which are taken out below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        resampled = stats.bootstrap(
            [np.arange(n) for n in sizes],
            of_draws,
            n_resamples=n_resamples,
            batch=max(1, _DRAWS // sum(sizes)),
            vectorized=True,
            axis=-1,
            confidence_level=confidence,
            method="percentile",
            rng=rng,
        ).bootstrap_distribution
    resampled = resampled[np.isfinite(resampled)]
    if not resampled.size:
        return Interval(effect, np.nan, np.nan)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(effect, float(low), float(high))


def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide, NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def _weights(draws: npt.NDArray[Any], n: int) -> FloatArray:
    draws = np.atleast_2d(draws).astype(np.int64)
    flat = draws + n * np.arange(draws.shape[0])[:, None]
    return np.bincount(flat.reshape(-1), minlength=draws.shape[0] * n).reshape(-1, n).astype(np.float64)
