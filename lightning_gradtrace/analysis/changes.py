"""At which steps does a series change its level (loss, weights, movement, ...)?"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from lightning_gradtrace.analysis._bootstrap import FloatArray

# Standard deviation of a normal distribution over its median absolute deviation, for differences of neighbours.
_MAD = 1.4826 / np.sqrt(2)


def change_points(
    table: pd.DataFrame,
    value: str,
    *,
    by: str | Sequence[str] = (),
    at: str = "step",
    penalty: float | None = None,
    min_size: int = 3,
) -> pd.DataFrame:
    """Split each series of a table into segments of constant mean, and return where they meet.

    Exact least squares with a penalty per change (PELT; Killick, Fearnhead and Eckley 2012, JASA 107), by the package
    ruptures. The series is put in units of its noise, which is estimated from the differences of neighbours so that
    the changes themselves don't count as noise; the default penalty is then 3 ln(length): somewhat more than what
    the BIC charges for a mean and a position.

    What can mislead: a steady drift is returned as a staircase. Values that are not finite are left out. A series
    without any difference between most neighbours (a noise of zero) is scaled by its standard deviation instead.

    Args:
        table: tidy, e.g. of `movement` or `weight_statistics`, or `trace.steps.reset_index()`.
        value: column of the series.
        by: columns that name the series; none for a single one.
        at: column that orders them.
        penalty: cost of a change, in units of the noise variance; None for 3 ln(length).
        min_size: smallest number of points between changes.

    Returns:
        One row per change: the columns `by`, `at` (the first point of the new level), `before`, `after` (means of
        the segments around it), `jump` (their difference in units of the noise).

    Raises:
        ImportError: ruptures is not installed.
        ValueError: a column is missing, or `penalty` or `min_size` is out of range.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = {*by, at, value} - set(table.columns)
    if missing:
        raise ValueError(f"`table` lacks the columns {sorted(missing)}, it has {list(table.columns)}")
    if (penalty is not None and penalty <= 0) or min_size < 1:
        raise ValueError(f"`penalty` is {penalty} and `min_size` {min_size}, expected more than 0 and 1 or more")
    try:
        importlib.import_module("ruptures")
    except ImportError as error:
        raise ImportError(
            "`change_points` needs ruptures, which is not installed: `pip install 'lightning-gradtrace[changes]'`"
        ) from error
    parts = table.groupby(by, sort=False, observed=True) if by else [((), table)]
    rows: list[list[Any]] = []
    for key, part in parts:
        part = part[np.isfinite(part[value].to_numpy(float))].sort_values(at, kind="stable")
        points = part[at].to_numpy()
        rows += [[*key, points[i], *rest] for i, *rest in _changes(part[value].to_numpy(float), penalty, min_size)]
    return pd.DataFrame(rows, columns=[*by, at, "before", "after", "jump"])


def _changes(series: FloatArray, penalty: float | None, min_size: int) -> Iterator[tuple[int, float, float, float]]:
    if series.size < 2 * min_size or np.ptp(series) == 0:
        return
    noise = _MAD * float(np.median(np.abs(np.diff(series))))
    # Rounding is no noise either.
    if noise <= 1e-12 * float(np.abs(series).max()):
        noise = float(series.std())
    scaled = (series - series.mean()) / noise
    search = (
        importlib.import_module("ruptures")
        .KernelCPD(kernel="linear", min_size=min_size, jump=1)
        .fit(scaled.reshape(-1, 1))
    )
    ends = [0, *search.predict(pen=3 * np.log(series.size) if penalty is None else penalty)]
    means = [float(series[a:b].mean()) for a, b in pairwise(ends)]
    for place, before, after in zip(ends[1:-1], means[:-1], means[1:], strict=True):
        yield place, before, after, (after - before) / noise
