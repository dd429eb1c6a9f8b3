"""Counting the tokens in the texts of each group's occurrences, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._groups import Groups
from lightning_gradtrace.analysis._sample_counts import sample_counts
from lightning_gradtrace.analysis._texts import Texts, text_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Groups whose tokens are counted at once, and the memory that this may take.
_ROWS = 128
_DENSE_BYTES = 1 << 28
# Up to here every whole number is a float32.
_EXACT = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """The texts that take part, and what is counted of all of them.

    Attributes:
        texts: the texts; columns that no method may choose are taken out of `texts.counts`.
        rows: (occurrence,) row of each occurrence's text.
        seen: rows of the texts that any occurrence of the steps looked at read.
        everything: (distinct,) count of each token over all occurrences of the steps looked at.
        total: its sum over all tokens, those taken out included.
        background_total: likewise of b(t).
        length: (sample,) tokens of each text, those taken out included.
    """

    texts: Texts
    rows: IntArray
    seen: IntArray
    everything: IntArray
    total: int
    background_total: int
    length: IntArray


@dataclass(frozen=True)
class Counted:
    """Token counts of a chunk of neighbouring groups.

    Attributes:
        first: number of the first group.
        counts: (row, distinct) c(t), with multiplicity; with weights scaled so that a group's occurrences weigh 1 on
            average.
        total: (row,) sum of c over all tokens, those taken out of the corpus included.
        samples: (row, sample) sparse, 1 where a sample is attributed to the group; None unless asked for.
    """

    first: int
    counts: npt.NDArray[Any]
    total: FloatArray
    samples: sparse.csr_array | None = None


def corpus_of(
    trace: Trace, texts: Texts, *, links: IntArray | None = None, steps: Steps = None, min_count: int = 0
) -> Corpus:
    """Count the tokens of all occurrences, and take out those that come fewer than `min_count` times.

    What comes fewer times in all occurrences comes fewer times in any group of them.
    """
    rows = text_rows(trace, texts, links).astype(np.int32)
    mask = _access.occurrences_in(trace, steps)
    seen = np.bincount(rows if mask is None else rows[mask], minlength=texts.sample_id.size)
    everything = np.asarray(texts.counts.T @ seen).reshape(-1).astype(np.int64)
    background, length = int(texts.background.sum()), texts.length
    total = int(everything.sum())
    keep = everything >= min_count
    if not keep.all():
        counts = texts.counts.tocsc()[:, np.flatnonzero(keep)].tocsr()
        texts = replace(texts, token=texts.token[keep], counts=counts, background=texts.background[keep])
    return Corpus(texts, rows, np.flatnonzero(seen), everything[keep], total, background, length)


def token_counts(
    trace: Trace,
    groups: Groups,
    corpus: Corpus,
    *,
    weight: str = "none",
    steps: Steps = None,
    with_samples: bool = False,
    client: Any = None,
) -> Iterator[Counted]:
    """Count the tokens in the texts of each group's occurrences.

    First the selections are counted by sample (`sample_counts`), then these counts times the texts are the tokens.
    Memory is bounded by the first table (1 GiB), whatever the length of the trace.

    Args:
        trace: the trace.
        groups: from `groups_of`.
        corpus: from `corpus_of`, with the same steps.
        weight: as in `group_selections`.
        steps: step numbers to look at; None for all.
        with_samples: whether to say which samples are attributed to each group.
        client: a `dask.distributed.Client`, or None.

    Yields:
        The counts, chunk by chunk, in the order of the groups.
    """
    texts, n_samples = corpus.texts, corpus.texts.sample_id.size
    # Whole numbers of these types are exact, and their products are several times as fast as those of integers.
    dtype = np.float32 if weight == "none" and corpus.total < _EXACT else np.float64
    words = sparse.vstack([texts.counts.T, sparse.csr_array(corpus.length[None])], format="csr").astype(dtype)
    at_once = min(_ROWS, max(1, _DENSE_BYTES // (8 * max(words.shape))))
    options: dict[str, Any] = {"weight": weight, "steps": steps, "client": client}
    for run in sample_counts(trace, groups, corpus.rows, n_samples, **options):
        for first in range(0, len(run.number), at_once):
            chosen = slice(first, first + at_once)
            table: npt.NDArray[np.floating[Any]] = run.table[:, chosen].astype(dtype)
            if weight != "none":
                mass = table.sum(axis=0)
                table *= np.divide(run.number[chosen], mass, out=np.zeros(mass.size), where=mass > 0)
            counts = (words @ table).T
            samples = sparse.csr_array((table.T > 0).astype(np.int32)) if with_samples else None
            wide = np.ascontiguousarray(counts, dtype=np.float64)
            yield Counted(run.first + first, wide[:, :-1], wide[:, -1], samples)
