"""Mahalanobis distance of a token from a group's typical token (docs/concepts.md, 5, step 5)."""

from __future__ import annotations

import itertools

import numpy as np

from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis.scores._base import Candidates, Method


def mahalanobis(candidates: Candidates) -> FloatArray:
    """Return (x - mu)' S^-1 (x - mu) for x = (c, relative), with mean and covariance over the group's tokens (c > 0).

    The distance has no sign: a token far below the mean scores as well as one far above; `min_count` and
    `min_relative` keep those out. Where the covariance is singular (fewer than three tokens, all counts alike) its
    pseudo-inverse serves: directions without spread don't count.
    """
    counts, relative = candidates.counts, candidates.relatives()
    score = np.zeros(candidates.row.size)
    bounds = np.searchsorted(candidates.row, np.arange(len(counts) + 1))
    for row, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
        if start == stop:
            continue
        there = counts[row] > 0
        x = np.stack([counts[row, there].astype(np.float64), relative[row, there]])
        mean = x.mean(axis=1)
        spread = np.cov(x) if x.shape[1] > 1 else np.zeros((2, 2))
        # Unit diagonal first: counts and relative frequencies differ by orders of magnitude.
        unit = np.sqrt(np.diag(spread))
        unit[unit == 0] = 1.0
        away = np.stack([candidates.count[start:stop], candidates.relative[start:stop]]) - mean[:, None]
        inverse = np.linalg.pinv(spread / np.outer(unit, unit), rcond=1e-10, hermitian=True)
        away /= unit[:, None]
        score[start:stop] = np.einsum("it,ij,jt->t", away, inverse, away)
    return score


METHOD = Method(mahalanobis, all_tokens=True)
