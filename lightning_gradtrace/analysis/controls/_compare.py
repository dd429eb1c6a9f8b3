"""The measures that every control compares, and the columns that every control returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray, Interval, bootstrap, ratio
from lightning_gradtrace.analysis._components import KEYS, kind_of
from lightning_gradtrace.analysis.flips import FLIPS, NOTABLE, NOTABLE_FLIPS, POSITIONS, count_flips, sample_flips

COLUMNS = ["control", "measure", "value", "control_value", "effect", "low", "high", "n", "n_control"]

# Ratios of sums over samples: columns of `sample_flips`.
RATIOS = {
    "flip_rate": (FLIPS, POSITIONS),
    "notable_flip_rate": (NOTABLE_FLIPS, NOTABLE),
    "notable_share": (NOTABLE_FLIPS, FLIPS),
}


@dataclass(frozen=True)
class Group:
    """Flips of one group of samples: counts (sample, 4) of `sample_flips`, and the post's share of flipped tokens."""

    counts: npt.NDArray[np.int64]
    token_share: float

    @classmethod
    def of(cls, pred: IntArray, ablated: IntArray, tokens: IntArray) -> Group:
        """Count the flips between two arrays of predictions (sample, position)."""
        return cls(sample_flips(pred, ablated, tokens), token_share(pred, ablated, tokens))


def token_share(pred: IntArray, ablated: IntArray, tokens: IntArray) -> float:
    """Return (notable flipped tokens) / (flipped tokens), NaN without flips."""
    table = count_flips(pred, ablated)
    flipped = table.loc[table["flips"] > 0, "token"]
    return float(flipped.isin(tokens).mean()) if len(flipped) else np.nan


def rate(weights: FloatArray, counts: npt.NDArray[np.int64], measure: str) -> FloatArray:
    """Return a ratio of sums over weighted samples: weights (resample, sample) -> (resample,)."""
    over, under = RATIOS[measure]
    return ratio(weights @ counts[:, over].astype(np.float64), weights @ counts[:, under].astype(np.float64))


def compare_groups(
    keys: dict[str, Any],
    control: str,
    group: Group,
    other: Group,
    *,
    confidence: float,
    n_resamples: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Compare all measures of two independent groups of samples; the samples are resampled."""
    rows = []
    sizes = (len(group.counts), len(other.counts))
    for measure in RATIOS:
        value, control_value = (float(rate(np.ones((1, len(g.counts))), g.counts, measure)[0]) for g in (group, other))

        def difference(a: FloatArray, b: FloatArray, measure: str = measure) -> FloatArray:
            return rate(a, group.counts, measure) - rate(b, other.counts, measure)

        found = bootstrap(difference, sizes, confidence=confidence, n_resamples=n_resamples, rng=rng)
        rows.append(row(keys, control, measure, value, control_value, found, sizes))
    found = Interval(group.token_share - other.token_share, np.nan, np.nan)
    rows.append(row(keys, control, "token_share", group.token_share, other.token_share, found, sizes))
    return rows


def row(
    keys: dict[str, Any],
    control: str,
    measure: str,
    value: float,
    control_value: float,
    found: Interval,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Return one row of a control table."""
    return {
        **keys,
        "control": control,
        "measure": measure,
        "value": value,
        "control_value": control_value,
        **found._asdict(),
        "n": sizes[0],
        "n_control": sizes[1],
    }


def table(rows: list[dict[str, Any]], components: pd.DataFrame, extra: Sequence[str] = ()) -> pd.DataFrame:
    """Return the rows as a control table of components, with its columns also where there are no rows."""
    return pd.DataFrame(rows, columns=[*KEYS[kind_of(components)], *extra, *COLUMNS])
