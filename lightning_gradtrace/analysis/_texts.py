"""The texts behind the occurrences: tokens of the data as a sparse matrix, and which occurrence read which text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from lightning_gradtrace.analysis._access import IntArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


@dataclass(frozen=True)
class Texts:
    """All texts that a trace holds.

    Attributes:
        sample_id: (sample,) ids, in the order of the other arrays' first axis.
        tokens: (sample, position) token ids, -1 after the last one.
        token: (distinct,) ids that occur at all, ascending: the columns of `counts`.
        counts: (sample, distinct) sparse, how often a text holds a token.
        background: (distinct,) b(t), its count in the data, each sample once.
    """

    sample_id: IntArray
    tokens: IntArray
    token: IntArray
    counts: sparse.csr_array
    background: IntArray


def read_texts(trace: Trace) -> Texts:
    """Read all texts of a trace, padding left out of every count.

    Raises:
        ValueError: the trace keeps no inputs.
    """
    sample_id, tokens = trace.tokens()
    if not len(sample_id):
        raise ValueError(
            "this analysis needs the text of each sample, and the trace keeps no inputs; record with "
            '`GradTrace(..., inputs="auto")` or give `inputs` a callable that returns token ids'
        )
    sample, position = np.nonzero(tokens >= 0)
    token, column = np.unique(tokens[sample, position], return_inverse=True)
    ones = np.ones(sample.size, dtype=np.int32)
    counts = sparse.coo_array((ones, (sample, column)), shape=(len(sample_id), token.size)).tocsr()
    return Texts(sample_id, tokens, token, counts, np.bincount(column, minlength=token.size))


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
