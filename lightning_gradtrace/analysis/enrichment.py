"""Did samples with a pattern move something more than their number lets expect?

A pattern is any function of a sample: it repeats a segment, it holds a closing bracket, it is a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis._bootstrap import bootstrap, ratio

FloatArray = npt.NDArray[np.float64]
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
    by: Sequence[str] = ("module", "head", "part"),
    occurrences: pd.DataFrame | None = None,
    confidence: float = 0.95,
    n_resamples: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the share of samples with a pattern in what was moved with their share in the data.

    ``enrichment = (amount moved by samples with the pattern / amount moved) / (samples with it / samples)``: 1 is
    chance, whatever the pattern's frequency. The interval is a bootstrap over samples. The null permutes which samples
    have the pattern, and its interval is where chance alone puts the enrichment of a pattern as frequent as this one.

    Args:
        moved: one row per occurrence and thing that was moved, e.g. from `head_shifts`; needs `sample_id`, the column
            `amount` and the columns `by`.
        pattern: whether each sample has the pattern, by sample id.
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
    """
    missing = {"sample_id", amount, *by} - set(moved.columns)
    if missing:
        raise ValueError(f"`moved` lacks the columns {sorted(missing)}; it has {list(moved.columns)}")
    samples = (moved if occurrences is None else occurrences)["sample_id"]
    n_seen = samples.value_counts().sort_index()
    has = pd.Series(pattern).reindex(n_seen.index)
    if has.isna().any():
        unknown = has.index[has.isna()][:5].tolist()
        raise ValueError(
            f"`pattern` says nothing of samples {unknown}; expected a value for every sample that was seen"
        )
    marked, seen = np.asarray(has, bool), np.asarray(n_seen, float)
    rows = []
    for key, group in moved.groupby(list(by), sort=True):
        total = group.groupby("sample_id")[amount].sum().reindex(n_seen.index, fill_value=0)
        found = _enrichment(
            np.asarray(total, float), seen, marked, confidence, n_resamples, np.random.default_rng(seed)
        )
        rows.append([*(key if isinstance(key, tuple) else (key,)), *found])
    return pd.DataFrame(rows, columns=[*by, *COLUMNS])


def _enrichment(
    sums: FloatArray,
    seen: FloatArray,
    marked: npt.NDArray[np.bool_],
    confidence: float,
    n_resamples: int,
    rng: np.random.Generator,
) -> list[float]:
    """Return the columns of one row: `sums` moved and times `seen` by sample, and which samples are `marked`."""

    def of(weights: FloatArray, chosen: FloatArray) -> FloatArray:
        share = ratio(weights @ (sums * chosen), weights @ sums)
        return ratio(share, ratio(weights @ (seen * chosen), weights @ seen))

    def of_draws(weights: FloatArray) -> FloatArray:
        return of(weights, marked.astype(float))

    effect = bootstrap(of_draws, [len(sums)], confidence=confidence, n_resamples=n_resamples, rng=rng)
    once = np.ones((1, len(sums)))
    permuted = np.array([of(once, rng.permutation(marked).astype(float))[0] for _ in range(n_resamples)])
    low, high = np.nanquantile(permuted, [(1 - confidence) / 2, (1 + confidence) / 2])
    middle = np.nanmedian(permuted)
    extreme = int((np.abs(permuted - middle) >= abs(effect.effect - middle)).sum())
    expected = seen[marked].sum() / seen.sum()
    share = ratio(sums[marked].sum(), sums.sum())
    p_value = (extreme + 1) / (n_resamples + 1)
    return [len(sums), int(marked.sum()), *map(float, (expected, share, *effect, low, high, p_value))]
