"""Did samples with a pattern, texts with a token, or chosen loss tokens move something more than their number says?

A pattern is any function of a sample: it repeats a segment, it holds a closing bracket, it is a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis._bootstrap import bootstrap, ratio
from lightning_gradtrace.analysis._texts import read_texts

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

FloatArray = npt.NDArray[np.float64]
HEAD_PARTS = ("module", "head", "part")
COLUMNS = [
    "n_samples",
    "n_pattern",
    "expected",
    "share",
    "enrichment",
    "low",
    "high",
    "null_low",
    "null_high",
    "p_value",
]


def pattern_enrichment(
    moved: pd.DataFrame,
    pattern: pd.Series | Mapping[int, bool],
    *,
    amount: str = "size",
    by: Sequence[str] = HEAD_PARTS,
    occurrences: pd.DataFrame | None = None,
    confidence: float = 0.95,
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the share of samples with a pattern in what was moved with their share in the data.

    ``enrichment = (amount moved by samples with the pattern / amount moved) / (samples with it / samples)``: 1 is
    chance, whatever the pattern's frequency. The interval is a bootstrap over samples. The null permutes which samples
    have the pattern, and its interval is where chance alone puts the enrichment of a pattern as frequent as this one.
    Along a direction a share can be above 1: then the other samples worked against the change.

    Source: this project; a ratio of shares, without unit.

    Args:
        moved: one row per occurrence and thing that was moved, e.g. from `head_shifts`; needs `sample_id`, the column
            `amount` and the columns `by`.
        pattern: whether each sample has the pattern, by sample id; a number from 0 to 1 says how much of it.
        amount: column to add up.
        by: columns that name the thing that was moved.
        occurrences: all occurrences that could have moved it (column `sample_id`), e.g. `trace.occurrences` of the
            same steps; an occurrence without a row in `moved` moved nothing. None: those in `moved`.
        confidence: of the intervals.
        n_resamples: resamples and permutations.
        seed: of both.

    Returns:
        One row per thing, in the order of `by`: `n_samples`, `n_pattern`, `expected` and `share` of the pattern,
        `enrichment` with `low` and `high`, `null_low` and `null_high`, and `p_value` (two-sided, of the permutations).

    Raises:
        ValueError: a column is missing, or a sample's pattern is unknown.

    Example:
        >>> moved = pd.DataFrame({"sample_id": range(100), "thing": "a head", "size": [3.0] * 25 + [1.0] * 75})
        >>> found = pattern_enrichment(moved, pd.Series(range(100)) < 25, by=["thing"])
        >>> found[["expected", "share", "enrichment"]].round(2).to_numpy().tolist()
        [[0.25, 0.5, 2.0]]
    """
    _check(moved, {"sample_id", amount, *by})
    seen = _seen(moved if occurrences is None else occurrences)
    has = pd.Series(pattern).reindex(seen.index)
    if has.isna().any():
        unknown = has.index[has.isna()][:5].tolist()
        raise ValueError(
            f"`pattern` says nothing of samples {unknown}; expected a value for every sample that was seen"
        )
    marks, rows = np.asarray(has, float), []
    for key, total in _totals(moved, amount, by, seen):
        units = np.arange(len(seen))
        found = _enrichment(total, np.asarray(seen, float), marks, units, confidence, n_resamples, seed)
        rows.append([*key, *found])
    return pd.DataFrame(rows, columns=[*by, *COLUMNS])


def token_enrichment(
    moved: pd.DataFrame,
    trace: Trace,
    tokens: Sequence[int] | None = None,
    *,
    amount: str = "size",
    by: Sequence[str] = HEAD_PARTS,
    occurrences: pd.DataFrame | None = None,
    min_count: int = 20,
    confidence: float = 0.95,
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare how frequent tokens are in the texts of what moved something with how frequent they are in the data.

    As `pattern_enrichment`, the pattern being the token's share of the text: ``share`` is the frequency of the token
    over the texts weighted by the amount that each moved, ``expected`` its frequency over all of them.

    Source: this project; a ratio of shares, without unit.

    Args:
        moved: as in `pattern_enrichment`.
        trace: the trace, which keeps the texts.
        tokens: token ids; None for all that occur often enough.
        amount: as in `pattern_enrichment`.
        by: as in `pattern_enrichment`.
        occurrences: as in `pattern_enrichment`.
        min_count: smallest count of a token in the texts of `occurrences`, each sample once.
        confidence: as in `pattern_enrichment`.
        n_resamples: as in `pattern_enrichment`.
        seed: as in `pattern_enrichment`.

    Returns:
        One row per thing and token, the most enriched first within a thing: the columns `by`, `token`, `word` and those
        of `pattern_enrichment`, `n_pattern` being the number of texts that hold the token.

    Raises:
        ValueError: a column is missing, or the trace keeps no text of a sample.
    """
    _check(moved, {"sample_id", amount, *by})
    seen, texts = _seen(moved if occurrences is None else occurrences), read_texts(trace)
    place = pd.Index(texts.sample_id).get_indexer(seen.index)
    if (place < 0).any():
        unknown = seen.index[place < 0][:5].tolist()
        raise ValueError(f"the trace keeps no text of samples {unknown}; record the inputs of the whole run")
    counts, length = texts.counts[place], np.maximum(texts.length[place], 1)
    frequent = np.asarray(counts.sum(axis=0)).reshape(-1) >= min_count
    chosen = np.flatnonzero(frequent if tokens is None else frequent & np.isin(texts.token, np.asarray(tokens)))
    ids, words = texts.ids(chosen), texts.words(trace.vocab, chosen)
    rows = []
    for key, total in _totals(moved, amount, by, seen):
        units = np.arange(len(seen))
        for column, token, word in zip(chosen, ids, words, strict=True):
            marks = counts[:, [column]].toarray().reshape(-1) / length
            found = _enrichment(total, np.asarray(seen, float), marks, units, confidence, n_resamples, seed)
            rows.append([*key, token, word, *found])
    table = pd.DataFrame(rows, columns=[*by, "token", "word", *COLUMNS])
    return table.sort_values([*by, "enrichment"], ascending=[True] * len(by) + [False], ignore_index=True)


def loss_token_enrichment(
    moved: pd.DataFrame,
    loss_tokens: pd.DataFrame,
    pattern: pd.Series,
    *,
    amount: str = "size",
    by: Sequence[str] = HEAD_PARTS,
    confidence: float = 0.95,
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the share of some loss tokens in what was moved with their share among the loss tokens.

    As `pattern_enrichment`, counted over loss tokens instead of samples. The interval is a bootstrap over samples,
    whose loss tokens stay together; the null permutes which loss tokens have the pattern.

    Source: this project; a ratio of shares, without unit.

    Args:
        moved: from ``head_shifts(..., record="token_grads")``; needs `occurrence`, `position`, the column `amount` and
            the columns `by`.
        loss_tokens: all loss tokens that could have moved it: ``trace.token_grads.tokens(steps)``.
        pattern: whether each of them has the pattern, one value per row of `loss_tokens`; for instance
            ``loss_tokens["token"] == closing``.
        amount: as in `pattern_enrichment`.
        by: as in `pattern_enrichment`.
        confidence: as in `pattern_enrichment`.
        n_resamples: as in `pattern_enrichment`.
        seed: as in `pattern_enrichment`.

    Returns:
        As `pattern_enrichment`, `n_samples` and `n_pattern` being numbers of loss tokens.

    Raises:
        ValueError: a column is missing, `pattern` has another length, or `moved` holds loss tokens that are not in
            `loss_tokens`.
    """
    place = ["occurrence", "position"]
    _check(moved, {*place, amount, *by})
    if len(pattern) != len(loss_tokens):
        raise ValueError(
            f"`pattern` has {len(pattern)} values, expected one for each of {len(loss_tokens)} loss tokens"
        )
    seen = pd.Series(1.0, index=pd.MultiIndex.from_frame(loss_tokens[place]))
    if not pd.MultiIndex.from_frame(moved[place]).isin(seen.index).all():
        raise ValueError("`moved` holds loss tokens that are not in `loss_tokens`; take both from the same steps")
    units = pd.factorize(loss_tokens["sample_id"])[0]
    marks, rows = np.asarray(pattern, float), []
    for key, total in _totals(moved, amount, by, seen):
        found = _enrichment(total, np.ones(len(seen)), marks, units, confidence, n_resamples, seed)
        rows.append([*key, *found])
    return pd.DataFrame(rows, columns=[*by, *COLUMNS])


def _check(moved: pd.DataFrame, needed: set[str]) -> None:
    missing = needed - set(moved.columns)
    if missing:
        raise ValueError(f"`moved` lacks the columns {sorted(missing)}; it has {list(moved.columns)}")


def _seen(occurrences: pd.DataFrame) -> pd.Series:
    """Return how often each sample was seen, by sample id."""
    return occurrences["sample_id"].value_counts().sort_index()


def _totals(
    moved: pd.DataFrame, amount: str, by: Sequence[str], seen: pd.Series
) -> list[tuple[tuple[object, ...], FloatArray]]:
    """Return for each thing the amount that each row of `seen` moved it."""
    names = list(seen.index.names) if seen.index.nlevels > 1 else "sample_id"
    sums = [(key, part.groupby(names)[amount].sum()) for key, part in moved.groupby(list(by), sort=True)]
    return [(key, total.reindex(seen.index, fill_value=0).to_numpy(float)) for key, total in sums]


def _enrichment(
    total: FloatArray,
    seen: FloatArray,
    marks: FloatArray,
    units: npt.NDArray[np.integer],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> list[float]:
    """Return the columns of one row.

    Args:
        total: amount moved, by thing that has marks.
        seen: how often each was seen.
        marks: how much of the pattern each has.
        units: which unit of the bootstrap each belongs to, from 0.
        confidence: of the intervals.
        n_resamples: resamples and permutations.
        seed: of both.
    """
    rng = np.random.default_rng(seed)
    sums = [np.bincount(units, part) for part in (total * marks, total, seen * marks, seen)]

    def of_draws(weights: FloatArray) -> FloatArray:
        with_it, everything, seen_with_it, all_seen = (weights @ part for part in sums)
        return ratio(ratio(with_it, everything), ratio(seen_with_it, all_seen))

    effect = bootstrap(of_draws, [len(sums[0])], confidence=confidence, n_resamples=n_resamples, rng=rng)
    share, expected = ratio(total @ marks, total.sum()), seen @ marks / seen.sum()
    columns = [len(marks), int((marks > 0).sum()), *map(float, (expected, share, *effect))]
    if not np.isfinite(effect.effect):
        return [*columns, np.nan, np.nan, np.nan]
    drawn = np.array([np.stack([total, seen]) @ rng.permutation(marks) for _ in range(n_resamples)])
    permuted = ratio(drawn[:, 0] / total.sum(), drawn[:, 1] / seen.sum())
    low, high = np.nanquantile(permuted, [(1 - confidence) / 2, (1 + confidence) / 2])
    middle = np.nanmedian(permuted)
    extreme = int((np.abs(permuted - middle) >= abs(effect.effect - middle)).sum())
    return [*columns, float(low), float(high), (extreme + 1) / (n_resamples + 1)]
