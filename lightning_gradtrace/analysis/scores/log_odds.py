"""Log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._token_counts import Corpus, Counted
from lightning_gradtrace.analysis.scores._base import Candidates, Method

PRIOR = 500.0
"""Tokens that the prior weighs in all."""


def log_odds(candidates: Candidates) -> FloatArray:
    """Return the z-score of the log-odds ratio between the texts of a group and those of all other occurrences.

    With y the counts of the group, y' those of the other occurrences, n and n' their sums, and a prior that weighs
    a0 = 500 tokens in all, spread as the data, a(t) = a0 b(t) / sum b:

        delta(t) = ln (y + a) / (n + a0 - y - a)  -  ln (y' + a) / (n' + a0 - y' - a)
        z(t)     = delta(t) / sqrt(1 / (y + a) + 1 / (y' + a))

    Tokens count as independent draws, which they are not: a text that holds a word holds it again, and a text read in
    every epoch counts every time. So z is too large in absolute value; it ranks well, but read its p-value beside
    `hypergeometric` or `null_tokens`. With weights, y is the scaled weighted count, and y' what is left of all
    occurrences, at least 0.

    Source: Monroe, Colaresi and Quinn (2008), Fightin' Words, Political Analysis 16, equations 15 to 22.
    """
    counts = candidates.counts[candidates.row, candidates.column]
    return _z(counts, candidates.chunk.total[candidates.row], candidates.corpus, candidates.column)


def p_values(chunk: Counted, corpus: Corpus) -> FloatArray:
    """Return the upper tail of the normal distribution beyond z, for every group and token."""
    return special.ndtr(-_z(chunk.counts, chunk.total[:, None], corpus, np.arange(chunk.counts.shape[1])))


def _z(y: npt.NDArray[np.floating], n: FloatArray, corpus: Corpus, column: IntArray) -> FloatArray:
    prior = PRIOR * corpus.texts.background[column] / max(1, corpus.background_total)
    other = np.maximum(corpus.everything[column] - y, 0)
    rest = np.maximum(corpus.total - n, 0)
    one, two = y + prior, other + prior
    left, right = (np.maximum(a + PRIOR - b, 1e-300) for a, b in ((n, one), (rest, two)))
    return (np.log(one / left) - np.log(two / right)) / np.sqrt(1 / one + 1 / two)


METHOD = Method(log_odds, p_values)
