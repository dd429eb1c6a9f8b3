"""Hypergeometric test: do more of a group's samples hold a token than chance allows (Fisher's exact test)?"""

from __future__ import annotations

import numpy as np

from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._hypergeometric import upper_tail
from lightning_gradtrace.analysis._token_counts import Corpus, Counted
from lightning_gradtrace.analysis.scores._base import Candidates, Method


def hypergeometric(candidates: Candidates) -> FloatArray:
    """Return -log10 of the p-value.

    Of N samples that were seen at all, K hold token t; n are attributed to the group, and k of these hold t. If the
    group had drawn its samples at random, k would be hypergeometric; p = P(X >= k). The unit is the sample, so a word
    that comes ten times in a text counts once, and so does a text that was selected in every epoch. Neighbouring
    samples of one document are still not independent.

    Source: Fisher's exact test, e.g. Rivals et al. (2007), Bioinformatics 23(4), on enrichment.
    """
    held, holding, n, population = _numbers(candidates.chunk, candidates.corpus)
    row, column = candidates.row, candidates.column
    p = upper_tail(held[row, column], population, holding[column], n[row])
    return -np.log10(np.maximum(p, np.finfo(float).tiny))


def p_values(chunk: Counted, corpus: Corpus) -> FloatArray:
    """Return P(X >= k) for every group and token; 1 where no sample of the group holds the token."""
    held, holding, n, population = _numbers(chunk, corpus)
    p = np.ones(held.shape)
    row, column = np.nonzero(held)
    p[row, column] = upper_tail(held[row, column], population, holding[column], n[row])
    return p


def _numbers(chunk: Counted, corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return k (row, distinct), K (distinct,), n (row,), N."""
    assert chunk.samples is not None
    seen = np.zeros(corpus.texts.sample_id.size, dtype=np.int32)
    seen[corpus.seen] = 1
    holds = corpus.texts.counts.copy()
    holds.data = np.ones_like(holds.data)
    held = (chunk.samples @ holds).toarray()
    n = np.asarray(chunk.samples.sum(axis=1)).reshape(-1)
    return held, np.asarray(holds.T @ seen).reshape(-1), n, int(seen.sum())


METHOD = Method(hypergeometric, p_values, needs_samples=True, weighted=False)
