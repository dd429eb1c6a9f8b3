"""Shifts in proportion to the weights they moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis._access import Steps, check_axis, matrix, topk

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

BY = ("param", "neuron", "weight")


def relative_shifts(trace: Trace, by: str = "param", *, axis: str = "in", steps: Steps = None) -> pd.DataFrame:
    """Put kept shifts in proportion to weights as they were in the last snapshot at or before the shift's step.

    - ``by="param"``: shift over the root mean square of its parameter's weights;
    - ``by="neuron"``: over the root mean square of the weights of its neuron, a column (``axis="in"``) or a row;
    - ``by="weight"``: shift times the weight's own value, so that weights that do little count little.

    The first two are of no unit; where all weights are zero the outcome is NaN (docs/concepts.md, 3 and 5). The record
    holds what was largest as it is: small shifts of small weights may be missing from it.

    Args:
        trace: a trace with a `TopK` record and weight snapshots, ``GradTrace(weights_every_n_steps=...)``.
        by: "param", "neuron" or "weight".
        axis: of neurons, "in" or "out".
        steps: step numbers, as in `trace.topk.frame`; None for all, which must fit into memory.

    Returns:
        The table of `trace.topk.frame` with two more columns: `snapshot`, the step before which the weights were taken,
        and `relative`.

    Raises:
        ValueError: `by` or `axis` is unknown, no snapshot was taken early enough, or a parameter has no neurons.

    Source: docs/concepts.md, 5.
    """
    if by not in BY:
        raise ValueError(f"`by` is {by!r}, expected one of {', '.join(repr(one) for one in BY)}")
    check_axis(axis)
    frame = topk(trace).frame(steps=steps)
    place = np.searchsorted(trace.weight_steps, frame["step"].to_numpy(), side="right") - 1
    if len(frame) and (not len(trace.weight_steps) or (place < 0).any()):
        raise ValueError(
            f"no weights were stored at or before step {frame['step'].min()}; this trace has {len(trace.weight_steps)} "
            "snapshots; record them with `GradTrace(weights_every_n_steps=...)`"
        )
    frame["snapshot"] = trace.weight_steps[place] if len(frame) else place
    frame["relative"] = np.nan
    for (snapshot, param), rows in frame.groupby(["snapshot", "param"], observed=True).groups.items():
        weights = trace.weights(str(param), int(snapshot)).astype(np.float64)
        index = frame.loc[rows, "index"].to_numpy()
        scale = _scale(trace, str(param), weights, by, axis, index)
        frame.loc[rows, "relative"] = frame.loc[rows, "shift"].to_numpy(np.float64) * scale
    return frame


def _scale(
    trace: Trace, param: str, weights: npt.NDArray[np.float64], by: str, axis: str, index: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return what the shifts of some weights of a parameter are multiplied by, shape (n,)."""
    if by == "weight":
        return np.asarray(weights.reshape(-1)[index])
    if by == "neuron":
        columns = matrix(trace, param).shape[1]
        size = np.sqrt(np.square(weights).mean(0 if axis == "in" else 1))
        size = size[index % columns if axis == "in" else index // columns]
    else:
        size = np.full(len(index), np.sqrt(np.square(weights).mean()))
    return np.divide(1.0, size, out=np.full(len(index), np.nan), where=size > 0)
