"""The texts behind the occurrences: tokens of the data as a sparse matrix, and which occurrence read which text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from lightning_gradtrace.analysis._access import IntArray, words

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


@dataclass(frozen=True)
class Texts:
    """All texts that a trace holds.

    Attributes:
        sample_id: (sample,) ids, in the order of the other arrays' first axis.
        tokens: (sample, position) token ids, -1 after the last one.
        token: (distinct,) ids that occur at all, ascending: the columns of `counts`. (distinct, n) for n-grams.
        counts: (sample, distinct) sparse, how often a text holds a token.
        background: (distinct,) b(t), its count in the data, each sample once.
    """

    sample_id: IntArray
    tokens: IntArray
    token: IntArray
    counts: sparse.csr_array
    background: IntArray

    @property
    def length(self) -> IntArray:
        """Tokens (or n-grams) of each text: (sample,)."""
        return np.asarray(self.counts.sum(axis=1)).reshape(-1)

    def ids(self, column: IntArray) -> list[int] | list[tuple[int, ...]]:
        """Return the token id of each column, a tuple of ids for n-grams."""
        found = self.token[column].tolist()
        return found if self.token.ndim == 1 else [tuple(ids) for ids in found]

    def words(self, vocab: Sequence[str] | None, column: IntArray) -> list[str]:
        """Return the text of each column, the words of an n-gram joined by blanks."""
        token = self.token[column]
        if token.ndim == 1:
            return words(vocab, token)
        flat = words(vocab, token.reshape(-1))
        return [" ".join(flat[i : i + token.shape[1]]) for i in range(0, len(flat), token.shape[1])]


def read_texts(trace: Trace, ngram: int = 1) -> Texts:
    """Read all texts of a trace, padding left out of every count.

    Args:
        trace: the trace.
        ngram: count runs of so many tokens instead of single ones; none of them holds padding.

    Raises:
        ValueError: the trace keeps no inputs, or `ngram` is below 1.
    """
    if ngram < 1:
        raise ValueError(f"`ngram` is {ngram}, expected 1 (tokens), 2 (pairs of neighbours) or more")
    sample_id, tokens = trace.tokens()
    if not len(sample_id):
        raise ValueError(
            "this analysis needs the text of each sample, and the trace keeps no inputs; record with "
            '`GradTrace(..., inputs="auto")` or give `inputs` a callable that returns token ids'
        )
    sample, token, column = _ngrams(tokens, ngram)
    ones = np.ones(sample.size, dtype=np.int32)
    counts = sparse.coo_array((ones, (sample, column)), shape=(len(sample_id), len(token))).tocsr()
    return Texts(sample_id, tokens, token, counts, np.bincount(column, minlength=len(token)))


def _ngrams(tokens: IntArray, n: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return the sample of every n-gram, the distinct ones (distinct[, n]), and the column of every one."""
    if n == 1:
        sample, position = np.nonzero(tokens >= 0)
        return sample, *np.unique(tokens[sample, position], return_inverse=True)
    width = max(0, tokens.shape[1] - n + 1)
    whole = np.ones((len(tokens), width), dtype=bool)
    for at in range(n):
        whole &= tokens[:, at : at + width] >= 0
    sample, position = np.nonzero(whole)
    distinct, column = np.zeros((1, 0), dtype=np.int64), np.zeros(sample.size, dtype=np.int64)
    for at in range(n):
        # One more token: distinct pairs of what was found so far and the next token.
        word = tokens[sample, position + at].astype(np.int64)
        span = int(word.max()) + 1 if word.size else 1
        pairs, column = np.unique(column * span + word, return_inverse=True)
        distinct = np.concatenate([distinct[pairs // span], (pairs % span)[:, None]], axis=1)
    return sample, distinct, column


def linked_samples(trace: Trace, links: IntArray | None) -> IntArray:
    """Return the sample id that every occurrence's shifts are attributed to: (occurrence,).

    Args:
        trace: the trace.
        links: (occurrence,) for each occurrence the occurrence whose sample it is linked to; None for the truth.

    Raises:
        ValueError: `links` has another length or points outside the trace.
    """
    sample_id = trace.occurrences["sample_id"].to_numpy()
    if links is None:
        return sample_id
    links = np.asarray(links)
    if links.shape != sample_id.shape or not np.issubdtype(links.dtype, np.integer):
        raise ValueError(
            f"`links` has shape {links.shape} and dtype {links.dtype}, expected an occurrence number for each of the "
            f"{sample_id.size} occurrences; see `permuted_links`"
        )
    if links.size and (links.min() < 0 or links.max() >= sample_id.size):
        raise ValueError(
            f"`links` holds numbers from {links.min()} to {links.max()}, expected 0 to {sample_id.size - 1}"
        )
    return sample_id[links]


def text_rows(trace: Trace, texts: Texts, links: IntArray | None = None) -> IntArray:
    """Return for every occurrence the row of its text in `texts`: (occurrence,).

    Raises:
        ValueError: an occurrence's sample has no text.
    """
    wanted = linked_samples(trace, links)
    rows = pd.Index(texts.sample_id).get_indexer(pd.Index(wanted))
    missing = int(np.count_nonzero(rows < 0))
    if missing:
        raise ValueError(
            f"{missing} of {wanted.size} occurrences have a sample whose text the trace doesn't hold (the first is "
            f"sample {wanted[rows < 0][0]}); the inputs must be recorded for the whole run"
        )
    return rows
