"""Which tokens do the samples share that moved one weight (docs/concepts.md, 5, steps 2 and 3)?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._texts import Texts, read_texts, text_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Counts of one group of entries (entry x distinct token, 4 bytes each); more entries take another pass.
_GROUP_BYTES = 1 << 30
# Selections (entry, sample) held back until they are turned into token counts.
_BUFFER = 1 << 23
# Rows of the sparse product that are made dense at once.
_ROWS = 128


def notable_tokens(
    trace: Trace,
    entries: Entries,
    *,
    min_count: int = 20,
    n_relative: int = 200,
    n_notable: int = 5,
    min_relative: float = 0.0,
    links: IntArray | None = None,
    steps: Steps = None,
) -> pd.DataFrame:
    """Find the notable tokens of each parameter entry by the univariate heuristic of the 2023 post.

    For an entry p and its occurrences A(p), c(t) is the count of token t in the texts of A(p), with multiplicity, and
    b(t) its count in the data, each sample once; relative(t) = (c(t) / sum c) / (b(t) / sum b). Of the tokens with
    c(t) >= `min_count` the `n_relative` with the largest relative frequency are taken, of these the `n_notable` with
    the largest count. Padding counts nowhere.

    What can mislead: (1) where fewer than `n_relative` tokens pass `min_count`, the relative frequency decides nothing
    and the commonest words of the language come out, with a `relative` near 1; read that column, or set
    `min_relative`. (2) One sample selected in every epoch counts every time, so that `min_count` can be reached by a
    single text; `neurons` reports distinct samples, and `permuted_links(within="sample")` is the null that keeps such
    repetition. (3) Notable tokens are found in every entry with enough occurrences, also where the links carry no
    information: `null_tokens` says how many.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        entries: table with a column `entry` (from `frequent_entries`), or global entry numbers.
        min_count: smallest c(t).
        n_relative: how many tokens pass by relative frequency.
        n_notable: how many of these are notable, by count.
        min_relative: smallest relative frequency; 0 as in the post.
        links: (occurrence,) whose sample each occurrence is linked to, for null controls; None for the truth.
        steps: step numbers to look at; None for all.

    Returns:
        One row per entry and notable token, in the order of `entries`, then `rank`: `entry`, `param`, `index`,
        `token` (id), `text` (the id where the trace has no vocabulary), `count` c(t), `background` b(t), `relative`,
        `rank` (1 for the largest count; ties by relative frequency, then by id).

    Raises:
        ValueError: no `TopK` record, no inputs, unknown entries, `links` that don't fit, thresholds out of range.
    """
    for name, value in (("min_count", min_count), ("n_relative", n_relative), ("n_notable", n_notable)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, expected 1 or more")
    numbers = _access.entry_numbers(trace, entries)
    texts = read_texts(trace)
    rows: list[npt.NDArray[np.float64]] = []
    for first, counts in token_counts(trace, numbers, texts, links=links, steps=steps):
        found = _univariate(counts, texts.background, min_count, n_relative, n_notable, min_relative)
        found[:, 0] += first
        rows.append(found)
    row, column, count, relative, rank = np.concatenate([np.zeros((0, 5)), *rows]).T
    entry, column = numbers[row.astype(np.int64)], column.astype(np.int64)
    names = trace.entries(entry)
    token = texts.token[column].astype(np.int64)
    return pd.DataFrame(
        {
            "entry": entry,
            "param": names["param"].array,
            "index": names["index"].to_numpy(),
            "token": token,
            "text": pd.Series(_access.words(trace.vocab, token), dtype=str),
            "count": count.astype(np.int64),
            "background": texts.background[column],
            "relative": relative,
            "rank": rank.astype(np.int64),
        }
    )


def token_counts(
    trace: Trace, numbers: IntArray, texts: Texts, *, links: IntArray | None = None, steps: Steps = None
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Count the tokens in the texts of each entry's occurrences: c(t), with multiplicity.

    Memory is bounded by the counts of one group of entries (1 GiB) and a buffer of selections, whatever the length
    of the trace; one pass over the record per group.

    Args:
        trace: the trace.
        numbers: (e,) global entry numbers.
        texts: from `read_texts`.
        links: as in `notable_tokens`.
        steps: as in `notable_tokens`.

    Yields:
        number of the first entry of a chunk, and its counts (entry of the chunk, distinct token).
    """
    rows_of = text_rows(trace, texts, links).astype(np.int32)
    group = max(1, _GROUP_BYTES // (4 * max(1, texts.token.size)))
    for start in range(0, numbers.size, group):
        part = numbers[start : start + group]
        counts = np.zeros((part.size, texts.token.size), dtype=np.int32)
        held: list[tuple[IntArray, IntArray]] = []
        size = 0
        for occurrence, row in _access.selections(trace, part, np.arange(part.size), steps):
            held.append((row, rows_of[occurrence]))
            size += row.size
            if size >= _BUFFER:
                _add_tokens(counts, held, texts)
                held, size = [], 0
        _add_tokens(counts, held, texts)
        for first in range(0, part.size, _ROWS):
            yield start + first, counts[first : first + _ROWS]


def _add_tokens(counts: npt.NDArray[np.int32], held: list[tuple[IntArray, IntArray]], texts: Texts) -> None:
    if not held:
        return
    row, sample = (np.concatenate(parts).astype(np.int32, copy=False) for parts in zip(*held, strict=True))
    shape = (counts.shape[0], texts.sample_id.size)
    links = sparse.coo_array((np.ones(row.size, dtype=np.int32), (row, sample)), shape=shape).tocsr()
    for first in range(0, counts.shape[0], _ROWS):
        chunk = links[first : first + _ROWS]
        if chunk.nnz:
            counts[first : first + _ROWS] += (chunk @ texts.counts).toarray()


def _univariate(
    counts: npt.NDArray[np.int32],
    background: IntArray,
    min_count: int,
    n_relative: int,
    n_notable: int,
    min_relative: float,
) -> npt.NDArray[np.float64]:
    """Return (found, 5): row, column, count, relative, rank."""
    row, column = np.nonzero(counts >= min_count)
    count = counts[row, column].astype(np.float64)
    total = counts.sum(axis=1, dtype=np.int64)[row]
    relative = (count / total) / (background[column] / background.sum())
    keep = relative >= min_relative
    row, column, count, relative = row[keep], column[keep], count[keep], relative[keep]
    order = _first(row, (column, -relative), n_relative)
    row, column, count, relative = row[order], column[order], count[order], relative[order]
    order = _first(row, (column, -relative, -count), n_notable)
    row, column, count, relative = row[order], column[order], count[order], relative[order]
    rank = np.arange(row.size) - np.searchsorted(row, row) + 1
    return np.stack([row, column, count, relative, rank], axis=1).astype(np.float64)


def _first(row: IntArray, keys: tuple[npt.NDArray[Any], ...], most: int) -> IntArray:
    """Order by row and then by `keys` (last key first), and keep the first `most` of every row."""
    order = np.lexsort([*keys, row])
    ordered = row[order]
    return order[np.arange(row.size) - np.searchsorted(ordered, ordered) < most]
