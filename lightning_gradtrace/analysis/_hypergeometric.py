"""Upper tail of the hypergeometric distribution for millions of pairs, which `scipy.stats` takes one by one."""

from __future__ import annotations

import numpy as np
from scipy import special

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray

# Terms below this share of the sum no longer change it.
_NEGLIGIBLE = 1e-17


def upper_tail(k: IntArray, population: int, successes: IntArray, draws: IntArray) -> FloatArray:
    """Return P(X >= k) for X hypergeometric, all arrays of shape (m,).

    The probability of one value by log-gamma functions, the others by their ratios, on the side of the mean where
    they fall. Agrees with `scipy.stats.hypergeom.sf(k - 1, ...)` to about 1e-10 relative.

    Args:
        k: number of successes seen.
        population: size of the population.
        successes: number of successes in the population.
        draws: number drawn.

    Example:
        Both of two draws from a population of 5 with 3 successes: 3/5 * 2/4.

        >>> upper_tail(np.array([2]), 5, np.array([3]), np.array([2])).round(12)
        array([0.3])
    """
    k, good, drawn = (np.broadcast_to(np.asarray(a, dtype=np.int64), np.shape(k)) for a in (k, successes, draws))
    least, most = np.maximum(0, drawn + good - population), np.minimum(good, drawn)
    upper = k * population > good * drawn
    # Below the mean the lower tail up to k - 1 is summed downwards and taken from 1.
    start = np.where(upper, k, k - 1)
    tail = np.zeros(k.shape)
    inside = (start >= least) & (start <= most)
    tail[inside] = _sum(start[inside], population, good[inside], drawn[inside], upper[inside])
    tail = np.where(upper, tail, 1.0 - tail)
    return np.clip(np.where(k <= least, 1.0, np.where(k > most, 0.0, tail)), 0.0, 1.0)


def _sum(x: IntArray, population: int, good: IntArray, drawn: IntArray, upwards: np.ndarray) -> FloatArray:
    """Sum the probabilities from x on, upwards or downwards."""
    log = _log_choose(good, x) + _log_choose(population - good, drawn - x) - _log_choose(population, drawn)
    total = np.ones(x.shape)
    term = np.ones(x.shape)
    left = np.arange(x.size)
    x = x.astype(np.float64)
    while left.size:
        g, d, at, up = good[left], drawn[left], x[left], upwards[left]
        rising = (g - at) * (d - at) / ((at + 1) * (population - g - d + at + 1))
        # Past the end of the support the denominator may vanish, and the numerator with it.
        below = np.maximum((g - at + 1) * (d - at + 1), 1)
        falling = at * (population - g - d + at) / below
        term[left] *= np.where(up, np.where((at >= g) | (at >= d), 0.0, rising), np.maximum(falling, 0.0))
        x[left] += np.where(up, 1, -1)
        total[left] += term[left]
        left = left[term[left] > _NEGLIGIBLE * total[left]]
    return np.exp(log) * total


def _log_choose(n: IntArray | int, k: IntArray) -> FloatArray:
    return special.gammaln(n + 1.0) - special.gammaln(k + 1.0) - special.gammaln(np.subtract(n, k) + 1.0)
