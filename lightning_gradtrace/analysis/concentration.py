"""How concentrated is what a step does: on few samples, on few weights, on the same ones?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray, ratio

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def gini(values: FloatArray) -> float:
    """Return the Gini coefficient of values that are not negative: 0 if all are equal, near 1 if one has everything.

    Args:
        values: (n,).

    Returns:
        NaN without values, or where all are zero.

    Example:
        >>> gini(np.ones(4)), gini(np.array([0.0, 0.0, 0.0, 1.0]))
        (0.0, 0.75)
    """
    ordered, n = np.sort(values), values.size
    total = ordered.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if n and total > 0 else float("nan")


def self_influence(trace: Trace, *, every: int = 1, steps: Steps = None) -> pd.DataFrame:
    """Follow the squared norms of the samples' shifts, and how unevenly the samples of a step share them.

    Under plain SGD with clipping factor c the inner product of a sample's gradient share with its own shift, which is
    what its step does to its own loss to first order (self-influence; Koh and Liang 2017, Pruthi et al. 2020), is
    `<g_i, s_i> = -|s_i|^2 / (lr c)`. Within a step the factor is the same for all samples, so that the concentration of
    |s_i|^2 is that of self-influence. Under Adam the two differ.

    Source: the papers above; `square` is in squared units of the weight, `gini` and `largest` are shares.

    Args:
        trace: an open trace with a `Norms` record.
        every: steps that share a row, counted from the trace's first step.
        steps: step numbers to look at; None for all that the record holds.

    Returns:
        Whole model first (`param` empty), then each parameter, by time: `param`, `step` (the first of its `every`
        steps), `samples` (occurrences), `square` (mean |s|^2), `gini` (of |s|^2 over the samples of a step, mean over
        the steps), `largest` (share of a step's largest sample, mean over the steps).

    Raises:
        ValueError: no `Norms` record, or `every` below 1.
    """
    if "norms" not in trace.records:
        raise ValueError(
            f"this analysis reads norms of shifts, and the trace holds {list(trace.records)}; record with "
            "`GradTrace(..., record=[..., Norms()])`"
        )
    view = trace.norms
    step = trace.occurrences["step"].to_numpy()[view.occurrence]
    squares = np.square(view.frame().to_numpy(np.float64))
    mask = _access.occurrences_in(trace, steps)
    chosen = np.isfinite(squares).all(axis=1) & (True if mask is None else mask[view.occurrence])
    step, squares = step[chosen], squares[chosen]
    times = _Times(trace, every)(step)
    columns = [("", squares.sum(axis=1)), *zip(trace.params["param"], squares.T, strict=True)]
    parts = []
    for name, square in columns:
        one = pd.DataFrame({"time": times, "step": step, "square": square}).groupby(["time", "step"])["square"]
        by_step = pd.DataFrame({"samples": one.size(), "sum": one.sum(), "max": one.max(), "gini": one.apply(_gini)})
        by_step["largest"] = ratio(by_step["max"].to_numpy(), by_step["sum"].to_numpy())
        by_time = by_step.groupby("time")
        table = by_time.agg(samples=("samples", "sum"), square=("sum", "sum"), gini=("gini", "mean"))
        table["square"] /= table["samples"]
        table["largest"] = by_time["largest"].mean()
        parts.append(table.rename_axis("step").reset_index().assign(param=name))
    found = pd.concat(parts, ignore_index=True)
    return found[["param", "step", "samples", "square", "gini", "largest"]]


def shift_sparsity(trace: Trace, *, every: int = 1, steps: Steps = None) -> pd.DataFrame:
    """Follow on how few weights the samples' shifts are concentrated, for the model and layer by layer.

    A `TopK` record holds the k largest shifts of each occurrence. Of these the participation ratio (sum s^2)^2 / sum
    s^4 says how many weights carry them: k if all are equal, 1 if one has everything. With a `Norms` record beside it,
    `kept_share` says how much of the squared norm of the whole shift these k are.

    What can mislead: by parameter the ratio is of what was kept of it, so that it can't be more than the number kept.

    Source: the participation ratio of Bell and Dean (1970); it counts weights.

    Args:
        trace: an open trace with a `TopK` record per sample.
        every: steps that share a row, counted from the trace's first step.
        steps: step numbers to look at; None for all.

    Returns:
        Whole model first (`param` empty), then each parameter, by time: `param`, `step`, `kept` (mean number of
        kept entries per occurrence), `participation` (mean over the occurrences that kept any; NaN if none),
        `kept_share` (squared norm of the kept over that of all, NaN without `Norms`), `share_of_kept` (of the
        squared norm of all that was kept).

    Raises:
        ValueError: no `TopK` record, or `every` below 1.
    """
    known = _access.shapes(trace)
    offsets, width = [p.offset for p in known], len(known)
    size = len(trace.occurrences)
    count, square, fourth = np.zeros((3, size * width))
    for occurrence, entry, shift in _access.moved(trace, steps):
        place = occurrence * width + np.searchsorted(offsets, entry, side="right") - 1
        wide = np.square(np.where(np.isfinite(shift), shift, 0).astype(np.float64))
        # Blocks are runs of occurrences: only their part of the sums is touched.
        low, high = int(place.min(initial=0)), int(place.max(initial=-1)) + 1
        for total, weights in ((count, None), (square, wide), (fourth, wide**2)):
            total[low:high] += np.bincount(place - low, weights, minlength=high - low)
    sums = [a.reshape(size, width) for a in (count, square, fourth)]
    sums = [np.concatenate([a.sum(axis=1, keepdims=True), a], axis=1) for a in sums]
    norms = _squared_norms(trace, [p.param for p in known])
    mask = _access.occurrences_in(trace, steps)
    inside = np.ones(size, dtype=bool) if mask is None else mask
    time = _Times(trace, every)(trace.occurrences["step"].to_numpy())
    parts = []
    for column, name in enumerate(["", *(p.param for p in known)]):
        kept, s2, s4 = (a[:, column] for a in sums)
        with_norm = np.isfinite(norms[:, column])
        table = pd.DataFrame(
            {
                "kept": kept,
                "participation": np.where(s4 > 0, ratio(s2**2, s4), np.nan),
                "square": s2,
                "all": sums[1][:, 0],
                "kept_square": np.where(with_norm, s2, 0),
                "norm_square": np.where(with_norm, norms[:, column], 0),
            }
        )
        by_time = table[inside].groupby(time[inside])
        means = by_time[["kept", "participation"]].mean()
        added = by_time[["square", "all", "kept_square", "norm_square"]].sum()
        means["kept_share"] = ratio(added["kept_square"].to_numpy(), added["norm_square"].to_numpy())
        means["share_of_kept"] = ratio(added["square"].to_numpy(), added["all"].to_numpy())
        parts.append(means.rename_axis("step").reset_index().assign(param=name))
    found = pd.concat(parts, ignore_index=True)
    return found[["param", "step", "kept", "participation", "kept_share", "share_of_kept"]]


def _gini(values: pd.Series) -> float:
    return gini(values.to_numpy(np.float64))


class _Times:
    """Maps steps to the first step of the time that they share a row with."""

    def __init__(self, trace: Trace, every: int) -> None:
        _access.check_count("every", every, of="steps")
        self._every, self._first = every, int(trace.steps.index[0]) if len(trace.steps) else 0

    def __call__(self, step: IntArray) -> IntArray:
        return self._first + (step - self._first) // self._every * self._every


def _squared_norms(trace: Trace, params: list[str]) -> FloatArray:
    """Return |s|^2 (occurrence, 1 + param), the whole first, NaN where the trace holds none."""
    found = np.full((len(trace.occurrences), 1 + len(params)), np.nan)
    if "norms" in trace.records:
        view = trace.norms
        squares = np.square(view.frame()[params].to_numpy(np.float64))
        found[view.occurrence, 0] = squares.sum(axis=1)
        found[view.occurrence, 1:] = squares
    return found


def selection_overlap(trace: Trace, *, every: int = 1, steps: Steps = None) -> pd.DataFrame:
    """Follow how far the samples of a step move the same weights.

    Source: this project; `overlap` is a share.

    Args:
        trace: an open trace with a `TopK` record per sample.
        every: steps that share a row, counted from the trace's first step.
        steps: step numbers to look at; None for all.

    Returns:
        By time: `step`, `kept` (entries per step, mean), `distinct` (different ones, mean), `overlap` (mean over the
        steps of 1 - (distinct - a) / (kept - a), with a = kept / samples: 1 if all samples of a step keep the same
        entries, 0 if no entry is kept twice; NaN for a step with one sample).

    Raises:
        ValueError: no `TopK` record, or `every` below 1.
    """
    of_step, occurrences = _Times(trace, every), trace.occurrences["step"].to_numpy()
    rows = []
    for step, occurrence, entry in _by_step(trace, occurrences, steps):
        distinct, samples = np.unique(entry).size, np.unique(occurrence).size
        one = entry.size / samples
        rows.append((step, entry.size, distinct, 1 - (distinct - one) / (entry.size - one) if samples > 1 else np.nan))
    table = pd.DataFrame(rows, columns=["step", "kept", "distinct", "overlap"])
    times = of_step(table["step"].to_numpy(np.int64))
    return table.drop(columns="step").groupby(times).mean().rename_axis("step").reset_index()


def _by_step(trace: Trace, step: IntArray, steps: Steps) -> Iterator[tuple[int, IntArray, IntArray]]:
    """Yield step, occurrence and entry of everything kept, a step at a time; blocks end anywhere."""
    rest: list[tuple[IntArray, IntArray]] = []
    for occurrence, entry, _ in _access.moved(trace, steps):
        cut = np.flatnonzero(np.diff(step[occurrence])) + 1
        pieces = list(zip(np.split(occurrence, cut), np.split(entry, cut), strict=True))
        if rest and step[rest[0][0][0]] != step[pieces[0][0][0]]:
            yield _whole(rest, step)
            rest = []
        for piece in pieces[:-1]:
            yield _whole([*rest, piece], step)
            rest = []
        rest.append(pieces[-1])
    if rest:
        yield _whole(rest, step)


def _whole(pieces: list[tuple[IntArray, IntArray]], step: IntArray) -> tuple[int, IntArray, IntArray]:
    occurrence, entry = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return int(step[occurrence[0]]), occurrence, entry
