"""Does what a sample did depend on which group it belongs to?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis.enrichment import HEAD_PARTS

FloatArray = npt.NDArray[np.float64]


def variance_explained(
    values: pd.Series, groups: pd.DataFrame, *, n_permutations: int = 999, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Say how much of the variance of a number by sample lies between the groups of each grouping.

    With many groups that is more than 0 by chance, about (groups - 1) / (samples - 1). The null permutes the values
    among the samples, and is what the share has to be compared with.

    Args:
        values: a finite number by sample id, e.g. how far the sample moved something.
        groups: one column per grouping, by sample id.
        n_permutations: of the null.
        confidence: of its interval.
        seed: of the permutations.

    Returns:
        One row per grouping: `grouping`, `n_groups`, `explained` (share of the variance, from 0 to 1; NaN if all values
        are equal), `null_mean`, `null_low`, `null_high`, `p_value` (one-sided: as much or more).

    Raises:
        ValueError: a sample's groups are unknown, or a value is not finite.

    Example:
        >>> values = pd.Series([1.0, 1.0, 5.0, 5.0])
        >>> float(variance_explained(values, pd.DataFrame({"pair": [0, 0, 1, 1]}))["explained"][0])
        1.0
    """
    known = groups.reindex(values.index)
    if known.isna().any(axis=None):
        unknown = known.index[known.isna().any(axis=1)][:5].tolist()
        raise ValueError(f"`groups` says nothing of samples {unknown}; expected every grouping for every sample")
    numbers = values.to_numpy(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"`values` holds {(~np.isfinite(numbers)).sum()} that are not finite; leave these samples out")
    away = numbers - numbers.mean()
    shuffled = np.random.default_rng(seed).permuted(np.tile(away, (n_permutations, 1)), axis=1)
    rows = []
    for name in known.columns:
        code, labels = pd.factorize(known[name])
        member = np.eye(len(labels))[code]
        found, null = _explained(away[None], member)[0], _explained(shuffled, member)
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
        p_value = ((null >= found).sum() + 1) / (n_permutations + 1)
        rows.append([name, len(labels), found, null.mean(), low, high, p_value if np.isfinite(found) else np.nan])
    columns = ["grouping", "n_groups", "explained", "null_mean", "null_low", "null_high", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def grouped_variance(
    moved: pd.DataFrame,
    groups: pd.DataFrame,
    *,
    amount: str = "size",
    by: Sequence[str] = HEAD_PARTS,
    occurrences: pd.DataFrame | None = None,
    n_permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Say for each thing that was moved how much of the variance between samples lies between their groups.

    Args:
        moved: one row per occurrence and thing that was moved, e.g. from `head_shifts`; needs `sample_id`, the column
            `amount`, which is added up by sample, and the columns `by`.
        groups: one column per grouping, by sample id.
        amount: column to add up.
        by: columns that name the thing that was moved.
        occurrences: all occurrences that could have moved it (column `sample_id`): a sample without a row in `moved`
            moved nothing. None: those in `moved`.
        n_permutations: as in `variance_explained`.
        confidence: as in `variance_explained`.
        seed: as in `variance_explained`.

    Returns:
        The columns `by` and those of `variance_explained`, in the order of `by`.

    Raises:
        ValueError: a column is missing; otherwise as in `variance_explained`.

    Example:
        >>> moved = pd.DataFrame({"sample_id": range(4), "thing": "a head", "size": [1.0, 1.0, 5.0, 5.0]})
        >>> groups = pd.DataFrame({"pair": [0, 0, 1, 1]})
        >>> grouped_variance(moved, groups, by=["thing"])[["thing", "grouping", "explained"]].to_numpy().tolist()
        [['a head', 'pair', 1.0]]
    """
    missing = {"sample_id", amount, *by} - set(moved.columns)
    if missing:
        raise ValueError(f"`moved` lacks the columns {sorted(missing)}; it has {list(moved.columns)}")
    seen = np.unique((moved if occurrences is None else occurrences)["sample_id"])
    columns = [*by, "grouping", "n_groups", "explained", "null_mean", "null_low", "null_high", "p_value"]
    parts = [pd.DataFrame(columns=columns)]
    for key, part in moved.groupby(list(by), sort=True, observed=True):
        values = part.groupby("sample_id")[amount].sum().reindex(seen, fill_value=0.0)
        found = variance_explained(values, groups, n_permutations=n_permutations, confidence=confidence, seed=seed)
        thing: dict[str, Any] = dict(zip(by, key, strict=True))
        parts.append(found.assign(**thing)[columns])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _explained(away: FloatArray, member: FloatArray) -> FloatArray:
    """Between-group over total sum of squares of centred rows (n, sample), for membership (sample, group)."""
    between = ((away @ member) ** 2 / member.sum(0)).sum(1)
    total = (away**2).sum(1)
    return np.divide(between, total, out=np.full(len(away), np.nan), where=total > 0)
