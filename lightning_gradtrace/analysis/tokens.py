"""Which tokens do the samples share that moved one weight (docs/concepts.md, 5, steps 2 and 3)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._groups import Groups, groups_of
from lightning_gradtrace.analysis._ranking import first_of_rows, ranks
from lightning_gradtrace.analysis._texts import read_texts
from lightning_gradtrace.analysis._token_counts import Corpus, Counted, corpus_of, token_counts
from lightning_gradtrace.analysis.scores import METHODS, Candidates, Method

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def notable_tokens(
    trace: Trace,
    entries: Entries | None,
    *,
    method: str = "univariate",
    by: str = "entry",
    axis: str = "in",
    heads: pd.DataFrame | None = None,
    ngram: int = 1,
    weight: str = "none",
    min_count: int = 20,
    n_relative: int = 200,
    n_notable: int = 5,
    min_relative: float = 0.0,
    max_q: float = 1.0,
    links: IntArray | None = None,
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """Find the notable tokens of each parameter entry, neuron, attention head, parameter or module.

    For an entry p and its occurrences A(p), c(t) is the count of token t in the texts of A(p), with multiplicity, and
    b(t) its count in the data, each sample once; relative(t) = (c(t) / sum c) / (b(t) / sum b). Padding counts nowhere.
    A(p) of a neuron, head, parameter or module holds every occurrence once that selected any of its kept entries.

    The univariate heuristic of the 2023 post: of the tokens with c(t) >= `min_count` the `n_relative` with the largest
    relative frequency are taken, of these the `n_notable` with the largest count. The other methods take, of the
    tokens with c(t) >= `min_count`, the `n_notable` with the largest score: "log_product", "mahalanobis", "kl"
    (docs/concepts.md, 5), "log_odds" with an informative Dirichlet prior, and "hypergeometric". The last two are
    tests: p-values are computed for all tokens that come `min_count` times in all occurrences, and q-values
    (Benjamini and Hochberg) over these tokens, for each entry or group apart.

    What can mislead: (1) where fewer than `n_relative` tokens pass `min_count`, the relative frequency decides nothing
    and the commonest words of the language come out, with a `relative` near 1; read that column, or set
    `min_relative`. (2) One sample selected in every epoch counts every time, so that `min_count` can be reached by a
    single text; `neurons` reports distinct samples, and `permuted_links(within="sample")` is the null that keeps such
    repetition. (3) Notable tokens are found in every entry with enough occurrences, also where the links carry no
    information: `null_tokens` says how many. (4) A q-value bounds the false discoveries among the tokens of one
    entry; over thousands of entries some are false all the same.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        entries: table with a column `entry` (from `frequent_entries`), or global entry numbers; None for everything
            that is tracked (with `by` other than "entry").
        method: "univariate", "log_product", "mahalanobis", "kl", "log_odds" or "hypergeometric".
        by: "entry", "neuron", "head", "head_part", "param" or "module": what shares tokens.
        axis: of neurons: "in" for columns, "out" for rows.
        heads: of heads: the table of `attention_heads`.
        ngram: look for runs of so many tokens.
        weight: how much the text of an occurrence counts: "none" for once; "shift" for the sum of |s| of the group's
            entries that it selected; "value" for the sum of their |W|, from the trace's snapshots. Weights are scaled
            to a mean of 1 in each group, so that `min_count` keeps its meaning.
        min_count: smallest c(t).
        n_relative: how many tokens pass by relative frequency (univariate).
        n_notable: how many of these are notable, by count, or by score.
        min_relative: smallest relative frequency; 0 as in the post.
        max_q: largest q-value, for methods that are tests.
        links: (occurrence,) whose sample each occurrence is linked to, for null controls; None for the truth.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per entry (or group) and notable token, in the order of `entries` (groups: of the model), then `rank`:
        `entry`, `param`, `index` (neurons: `param`, `module`, `axis`, `neuron`; heads: `module`, `head` and by part
        `part`, `param`; else `param`, `module`), `token` (id; a tuple of ids for n-grams), `text` (the id where the
        trace has no vocabulary), `count` c(t), `background` b(t), `relative`, `rank` (1 for the largest score; ties
        by relative frequency, then by id), `score` (of the method; c(t) of the univariate heuristic), and for tests
        `p_value`, `q_value`.

    Raises:
        ValueError: no `TopK` record, no inputs or (for `weight="value"`) no weights, unknown entries or names,
            `links` that don't fit, thresholds out of range.

    Source: docs/concepts.md, 5, steps 2 and 3, and the table of methods.
    """
    for name, value in (("min_count", min_count), ("n_relative", n_relative), ("n_notable", n_notable)):
        _access.check_count(name, value)
    how = _method(method, weight, max_q)
    if entries is None and by == "entry":
        raise ValueError('`entries` is None, which means all, with `by="entry"`; pass `frequent_entries(trace)`')
    groups = groups_of(trace, entries, by, axis=axis, heads=heads)
    texts = read_texts(trace, ngram)
    corpus = corpus_of(trace, texts, links=links, steps=steps, min_count=0 if how.all_tokens else min_count)
    options: dict[str, Any] = {"weight": weight, "steps": steps, "with_samples": how.needs_samples, "client": client}
    found: list[FloatArray] = [np.zeros((0, 8))]
    for chunk in token_counts(trace, groups, corpus, **options):
        candidates = _candidates(chunk, corpus, min_count, min_relative)
        if method == "univariate":
            keys = (candidates.column, -candidates.relative)
            candidates = _only(candidates, first_of_rows(candidates.row, keys, n_relative))
        found.append(_best(candidates, how, n_notable, max_q))
    table = _table(np.concatenate(found), groups, corpus, trace.vocab)
    if weight == "none":
        table["count"] = table["count"].astype(np.int64)
    return table if how.test else table.drop(columns=["p_value", "q_value"])


def no_tokens() -> pd.DataFrame:
    """Return a table of notable tokens without a row: for neurons of a trace that keeps no inputs.

    Returns:
        The columns of `notable_tokens` of single entries that `neurons` reads.

    Example:
        >>> no_tokens().columns.tolist()
        ['entry', 'token', 'text', 'count']
    """
    return pd.DataFrame({"entry": [], "token": [], "text": [], "count": []}).astype({"entry": int, "token": int})


def _table(found: FloatArray, groups: Groups, corpus: Corpus, vocab: Sequence[str] | None) -> pd.DataFrame:
    """Write out what `_best` returns."""
    row, column, count, relative, rank, score, p, q = found.T
    column, texts = column.astype(np.int64), corpus.texts
    table = groups.table.iloc[row.astype(np.int64)].reset_index(drop=True)
    return table.assign(
        token=pd.Series(texts.ids(column), dtype=np.int64 if texts.token.ndim == 1 else object),
        text=pd.Series(texts.words(vocab, column), dtype=str),
        count=count,
        background=texts.background[column],
        relative=relative,
        rank=rank.astype(np.int64),
        score=score,
        p_value=p,
        q_value=q,
    )


def _method(name: str, weight: str, max_q: float) -> Method:
    if name not in METHODS:
        raise ValueError(f"`method` is {name!r}, expected one of {', '.join(repr(m) for m in METHODS)}")
    method = METHODS[name]
    if weight != "none" and not method.weighted:
        raise ValueError(f'`method` {name!r} counts samples and takes no `weight` ({weight!r}); use "log_odds"')
    if not 0 < max_q <= 1:
        raise ValueError(f"`max_q` is {max_q}, expected a share above 0, at most 1")
    if max_q < 1 and method.test is None:
        tests = ", ".join(repr(m) for m, one in METHODS.items() if one.test)
        raise ValueError(f"`max_q` is {max_q}, but `method` {name!r} is no test; those are {tests}")
    return method


def _candidates(chunk: Counted, corpus: Corpus, min_count: int, min_relative: float) -> Candidates:
    row, column = np.nonzero(chunk.counts >= min_count)
    count = chunk.counts[row, column].astype(np.float64)
    background = corpus.texts.background[column] / max(1, corpus.background_total)
    relative = (count / chunk.total[row]) / background
    every = Candidates(row, column, count, relative, chunk, corpus)
    return _only(every, np.flatnonzero(relative >= min_relative))


def _only(candidates: Candidates, chosen: IntArray) -> Candidates:
    names = ("row", "column", "count", "relative")
    return replace(candidates, **{name: getattr(candidates, name)[chosen] for name in names})


def _best(candidates: Candidates, method: Method, n_notable: int, max_q: float) -> FloatArray:
    """Return (found, 8): group, column, count, relative, rank, score, p-value, q-value."""
    score = method.score(candidates)
    p, q = np.full((2, score.size), np.nan)
    if method.test is not None and score.size:
        every = method.test(candidates.chunk, candidates.corpus)
        p = every[candidates.row, candidates.column]
        q = stats.false_discovery_control(every, axis=1)[candidates.row, candidates.column]
        keep = np.flatnonzero(q <= max_q)
        candidates, score, p, q = _only(candidates, keep), score[keep], p[keep], q[keep]
    order = first_of_rows(candidates.row, (candidates.column, -candidates.relative, -score), n_notable)
    best = _only(candidates, order)
    columns = [
        best.row + best.chunk.first,
        best.column,
        best.count,
        best.relative,
        ranks(best.row),
        score[order],
        p[order],
    ]
    return np.stack([*columns, q[order]], axis=1).astype(np.float64)
