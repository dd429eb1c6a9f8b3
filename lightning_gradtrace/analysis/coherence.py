"""Do the samples of a step pull the same way, each its own way, or against each other?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis._shift_sources import shift_blocks

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def coherence(trace: Trace) -> pd.DataFrame:
    """Compare the size of the sum of a step's shifts with the sizes of the shifts.

    ``coherence = |sum_i s[i]|^2 / sum_i |s[i]|^2`` is the mean over samples of what a sample finds along itself in the
    sum, itself included: n if all n shifts are equal, 1 if they are orthogonal or their signs are random, below 1 if
    they undo each other. ``cosine = (coherence - 1) / (n - 1)`` is the mean inner product of two of them, in units of
    the mean square.

    Source: m-coherence of gradients (Chatterjee and Zielinski 2020), here of shifts. It has no unit.

    Args:
        trace: an open trace with a `Division` and a `Norms` record.

    Returns:
        One row per step that both records hold and parameter, in order, and one with `param` "all" for all of them
        together: `step`, `param`, `n` (occurrences), `coherence`, `cosine`. NaN where nothing moved.

    Raises:
        ValueError: one of the records is missing.
    """
    missing = [name for name in ("division", "norms") if name not in trace.records]
    if missing:
        raise ValueError(
            f"this analysis reads a `Division` and a `Norms` record, and the trace lacks {', '.join(missing)}; it "
            f"holds {', '.join(trace.records) or 'none'}. Record with `GradTrace(..., record=[Division(), Norms()])`"
        )
    norms = trace.norms
    step = trace.occurrences["step"].to_numpy()[norms.occurrence]
    squares = norms.frame().to_numpy(np.float64) ** 2
    gram = trace.read("division/gram")[:, :, 1, 1]
    held = trace.row_labels("division", "step")
    rows = []
    for number in np.intersect1d(step, held):
        mine = step == number
        single, joint = squares[mine].sum(0), gram[held == number][0]
        single, joint = np.append(single, single.sum()), np.append(joint, np.nansum(joint))
        ratio = np.divide(joint, single, out=np.full(len(single), np.nan), where=single > 0)
        rows.append(pd.DataFrame({"step": number, "param": [*trace.params["param"], "all"], "n": mine.sum()}))
        rows[-1]["coherence"] = ratio
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["step", "param", "n", "coherence"])
    return table.assign(cosine=(table["coherence"] - 1) / (table["n"] - 1).clip(lower=1))


def sign_null(
    trace: Trace, param: str, steps: Iterable[int], *, n_draws: int = 199, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Say where chance puts the coherence of a step: the shifts keep their sizes and axes, their signs are drawn.

    Source: a permutation test over signs (Fisher 1935), of the coherence above.

    Args:
        trace: an open trace with a `Dense` or `Factored` record.
        param: name of a tracked parameter.
        steps: step numbers that the record holds.
        n_draws: draws of all signs.
        confidence: of the interval.
        seed: of the draws.

    Returns:
        One row per step: `step`, `param`, `coherence`, `null_low`, `null_high`, `p_value` (one-sided: as coherent or
        more).

    Raises:
        ValueError: the trace holds no such record, or an argument is out of range.
    """
    if n_draws < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"`n_draws` is {n_draws} and `confidence` {confidence}, expected 1 or more and a share below 1"
        )
    record = next((name for name in ("dense", "factored") if name in trace.records), None)
    if record is None:
        raise ValueError(
            f"this analysis reads a Dense or Factored record, and the trace holds {', '.join(trace.records) or 'none'}"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for step in steps:
        size = math.prod(trace.param(param)["shape"])
        total, drawn, single = np.zeros(size), np.zeros((n_draws, size)), 0.0
        for _, shifts in shift_blocks(trace, record, param, int(step)):
            flat = shifts.reshape(len(shifts), -1)
            signs = rng.choice(np.array([-1, 1], flat.dtype), (n_draws, len(flat)))
            total += flat.sum(0, dtype=np.float64)
            drawn += signs @ flat
            single += float((flat.astype(np.float64) ** 2).sum())
        found = float((total**2).sum()) / single if single > 0 else np.nan
        null = (drawn**2).sum(1) / single if single > 0 else np.full(n_draws, np.nan)
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
        rows.append([int(step), param, found, low, high, ((null >= found).sum() + 1) / (n_draws + 1)])
    return pd.DataFrame(rows, columns=["step", "param", "coherence", "null_low", "null_high", "p_value"])
