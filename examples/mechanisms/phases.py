"""The phases of grokking, from the measures of a run by fixed thresholds, and the change points beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import change_points

NAMES = ("memorisation", "circuit formation", "clean-up", "afterwards")
"""Phases in order, named as in Nanda et al., 2023."""

LEARNED = 0.99
"""Accuracy from which pairs count as known."""

FALLEN = 0.9
"""Share of its plateau below which the test loss has begun to fall."""


def find_phases(measures: pd.DataFrame) -> pd.DataFrame:
    """Divide a run by when it knows the training pairs, when its test loss falls for good and when it knows the others.

    Memorisation ends when the training accuracy first reaches `LEARNED`, clean-up when the test accuracy does. In
    between, the median of the test loss is its plateau, and circuit formation ends at the last step at which the test
    loss is at least `FALLEN` of that. A phase that does not come has no steps.

    Args:
        measures: columns train_accuracy, test_accuracy and test_loss, by step.

    Returns:
        Columns phase, start and stop: the phase has the steps from `start` to before `stop`.
    """
    last = int(measures.index[-1])
    memorised = _first(measures["train_accuracy"] >= LEARNED, last)
    known = _first(measures["test_accuracy"].loc[memorised:] >= LEARNED, last)
    loss = measures["test_loss"].loc[memorised:known]
    falls = int(loss.index[np.flatnonzero(loss >= FALLEN * loss.median())[-1]])
    edges = [int(measures.index[0]), memorised, falls, known, last]
    return pd.DataFrame({"phase": NAMES, "start": edges[:-1], "stop": edges[1:]})


def label_steps(steps: pd.Series, phases: pd.DataFrame) -> pd.Series:
    """Return the phase of each step, as an ordered categorical; the last step of all belongs to the last phase."""
    edges = phases["stop"].to_numpy()[:-1]
    names = list(phases["phase"])
    number = np.searchsorted(edges, steps.to_numpy(), side="right")
    found = pd.Categorical([names[n] for n in number], categories=names, ordered=True)
    return pd.Series(found, steps.index)


def changes(series: Mapping[str, pd.Series]) -> pd.DataFrame:
    """Return the change points of some series by step, the largest of each first: series, step, before, after, jump.

    Losses are taken by their logarithm, as they run over several orders of magnitude.
    """
    rows = []
    for name, values in series.items():
        values = np.log(values.clip(lower=1e-12)) if name.endswith("loss") else values
        table = values.rename("value").rename_axis("step").reset_index()
        rows.append(change_points(table, "value").assign(series=name).sort_values("jump", key=abs, ascending=False))
    columns = ["series", "step", "before", "after", "jump"]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def _first(holds: pd.Series, otherwise: int) -> int:
    return int(holds.index[int(holds.to_numpy().argmax())]) if holds.any() else otherwise
