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
from lightning_gradtrace.analysis._groups import Groups, group_selections
from lightning_gradtrace.analysis._texts import Texts, text_rows
from lightning_gradtrace.analysis._workers import over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Counts of one group of rows (row x distinct token, 4 bytes each); more rows take another pass.
_GROUP_BYTES = 1 << 30
# Selections (row, sample) held back until they are turned into token counts.
_BUFFER = 1 << 23
# Rows of the sparse product that are made dense at once.
_ROWS = 128


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

    Memory is bounded by the counts of one group of rows (1 GiB) and a buffer of selections, whatever the length
    of the trace; one pass over the record per group of rows.

    Args:
        trace: the trace.
        groups: from `groups_of`.
        corpus: from `corpus_of`, with the same steps.
        weight: as in `group_selections`.
        steps: step numbers to look at; None for all.
        with_samples: whether to say which samples are attributed to each group: a byte per group and sample besides.
        client: a `dask.distributed.Client`, or None.

    Yields:
        The counts, chunk by chunk, in the order of the groups.
    """
    texts = corpus.texts
    width = len(texts.token)
    cell = 4 if weight == "none" else 8
    n_groups, n_samples = len(groups.table), texts.sample_id.size
    shared = corpus if client is None else client.scatter(corpus, broadcast=True)
    most = max(1, _GROUP_BYTES // (cell * max(1, width) + (n_samples if with_samples else 0)))
    for start in range(0, n_groups, most):
        part = _part(groups, start, min(start + most, n_groups))
        n_rows = len(part.table)
        sums = over_steps(client, trace, steps, _count, Sums.add, part, shared, weight, with_samples)
        counts, total, seen = sums.counts, sums.total, sums.seen
        if weight != "none":
            scale = np.divide(sums.number, sums.mass, out=np.zeros(n_rows), where=sums.mass > 0)
            counts *= scale[:, None]
            total *= scale
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, first + _ROWS)
            samples = None if seen is None else sparse.csr_array(seen[rows].astype(np.int32))
            yield Counted(start + first, counts[rows], total[rows], samples)


@dataclass
class Sums:
    """What adds up over steps: token counts of groups and their totals; `seen` unites.

    Attributes:
        counts: (row, distinct).
        total: (row,) tokens.
        number: (row,) occurrences, only counted with weights.
        mass: (row,) sum of their weights.
        seen: (row, sample), None unless asked for.
    """

    counts: npt.NDArray[Any]
    total: FloatArray
    number: FloatArray
    mass: FloatArray
    seen: npt.NDArray[np.bool_] | None

    def add(self, other: Sums) -> Sums:
        """Return the sums over the steps of both."""
        seen = None if self.seen is None or other.seen is None else self.seen | other.seen
        total, number, mass = self.total + other.total, self.number + other.number, self.mass + other.mass
        return Sums(self.counts + other.counts, total, number, mass, seen)


def _count(trace: Trace, groups: Groups, corpus: Corpus, weight: str, with_samples: bool, steps: Steps) -> Sums:
    texts, n_rows = corpus.texts, len(groups.table)
    counts = np.zeros((n_rows, len(texts.token)), dtype=np.int32 if weight == "none" else np.float64)
    total, number, mass = (np.zeros(n_rows) for _ in range(3))
    seen = np.zeros((n_rows, texts.sample_id.size), dtype=bool) if with_samples else None
    held: list[tuple[Any, ...]] = []
    size = 0
    for occurrence, row, heavy in group_selections(trace, groups, weight=weight, steps=steps):
        sample = corpus.rows[occurrence]
        length = corpus.length[sample]
        total += np.bincount(row, length if heavy is None else heavy * length, minlength=n_rows)
        if heavy is not None:
            number += np.bincount(row, minlength=n_rows)
            mass += np.bincount(row, heavy, minlength=n_rows)
        if seen is not None:
            seen[row, sample] = True
        held.append((row, sample, heavy))
        size += row.size
        if size >= _BUFFER:
            _add_tokens(counts, held, texts)
            held, size = [], 0
    _add_tokens(counts, held, texts)
    return Sums(counts, total, number, mass, seen)


def _part(groups: Groups, start: int, stop: int) -> Groups:
    if start == 0 and stop == len(groups.table):
        return groups
    inside = (groups.row >= start) & (groups.row < stop)
    return Groups(groups.by, groups.entry[inside], groups.row[inside] - start, groups.table.iloc[start:stop])


def _add_tokens(counts: npt.NDArray[Any], held: list[tuple[Any, ...]], texts: Texts) -> None:
    if not held:
        return
    row, sample = (np.concatenate(parts).astype(np.int32, copy=False) for parts in list(zip(*held, strict=True))[:2])
    heavy = np.ones(row.size, dtype=np.int32) if held[0][2] is None else np.concatenate([h[2] for h in held])
    links = sparse.coo_array((heavy, (row, sample)), shape=(counts.shape[0], texts.sample_id.size)).tocsr()
    for first in range(0, counts.shape[0], _ROWS):
        chunk = links[first : first + _ROWS]
        if chunk.nnz:
            counts[first : first + _ROWS] += (chunk @ texts.counts).toarray()
