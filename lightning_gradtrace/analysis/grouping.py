"""Does what a sample did depend on which group it belongs to?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

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


def _explained(away: FloatArray, member: FloatArray) -> FloatArray:
    """Between-group over total sum of squares of centred rows (n, sample), for membership (sample, group)."""
    between = ((away @ member) ** 2 / member.sum(0)).sum(1)
    total = (away**2).sum(1)
    return np.divide(between, total, out=np.full(len(away), np.nan), where=total > 0)
