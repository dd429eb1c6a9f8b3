"""What the studies of attention heads share: switching heads off, and whose samples moved a head when it formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch

from examples.mechanisms.study import Run
from examples.models import CircuitModel
from examples.models.circuits import Attention
from lightning_gradtrace.analysis import change_points, head_shifts, pattern_enrichment

Head = tuple[int, int]
"""Layer and head."""


def all_heads(model: CircuitModel) -> list[Head]:
    """Return every head of a model."""
    layers = [layer for layer in model.network.attention if isinstance(layer, Attention)]
    return [(number, head) for number, layer in enumerate(layers) for head in range(len(layer.head_scale))]


def best_head(measures: pd.DataFrame, name: str) -> Head:
    """Return the head with the largest value of a measure ``name.<layer>.<head>`` at the end."""
    last = measures.filter(like=f"{name}.").iloc[-1]
    _, layer, head = str(last.idxmax()).rsplit(".", 2)
    return int(layer), int(head)


@contextmanager
def switched_off(model: CircuitModel, head: Head) -> Iterator[None]:
    """Switch a head off: what it adds to the residual stream is zero."""
    attention = model.network.attention[head[0]]
    assert isinstance(attention, Attention)
    scale = attention.head_scale
    attention.head_scale = torch.where(torch.arange(len(scale)) == head[1], 0.0, 1.0)
    try:
        yield
    finally:
        attention.head_scale = scale


def ablations(run: Run, measure: str) -> dict[Head | None, float]:
    """Return a measure of the trained model with each head switched off in turn, by head; None: with none.

    They are also written to ``ablations.csv``.
    """
    model = run.model()
    with torch.no_grad():
        found: dict[Head | None, float] = {None: run.task.measure(model.network)[measure]}
        for head in all_heads(model):
            with switched_off(model, head):
                found[head] = run.task.measure(model.network)[measure]
    rows = [["none" if head is None else f"{head[0]}.{head[1]}", value] for head, value in found.items()]
    pd.DataFrame(rows, columns=["head", measure]).to_csv(run.path / "ablations.csv", index=False)
    return found


def rise(series: pd.Series, low: float = 0.02, high: float = 0.5) -> slice:
    """Return the steps between which a series goes from `low` to `high` of the way from its start to its end.

    The slow last part is left out: there the mechanism is there already, and what moves it are details.
    """
    way = (series - series.iloc[0]) / (series.iloc[-1] - series.iloc[0])
    return slice(int((way >= low).idxmax()), int((way >= high).idxmax()))


def main_change(measures: pd.DataFrame, name: str) -> int:
    """Return the step of the largest change point of a measure, the first if there is none."""
    table = measures[[name]].rename_axis("step").reset_index()
    found = change_points(table, name).sort_values("jump", key=abs)
    return int(found["step"].iloc[-1]) if len(found) else int(measures.index[0])


def who_moved(run: Run, head: Head, pattern: str, steps: slice) -> dict[str, dict[str, float]]:
    """Say by part of a head how enriched the samples with a pattern are in what moved it within some steps.

    Counted are the shifts along the change that the head's weights made in these steps; the share of a pattern is more
    than 1 if the other samples worked against the change. The table in ``who_moved.csv`` has the same for the absolute
    size of the shifts, in which also counts what samples undo of each other.

    Args:
        run: a finished run.
        head: layer and head.
        pattern: a column of the task's patterns.
        steps: first and last step.

    Returns:
        Columns of `pattern_enrichment` by part ("query", "key", "value", "output"), along the change.
    """
    trace = run.trace
    steps = slice(*trace.steps.loc[steps].index[[0, -1]])
    before, after = np.searchsorted(trace.weight_steps, [steps.start, steps.stop])
    first, last = trace.weight_steps[max(0, before - 1)], trace.weight_steps[min(after, len(trace.weight_steps) - 1)]
    module = f"network.attention.{head[0]}"
    names = [name for name in trace.params["param"] if name.startswith(f"{module}.")]
    change = {name: trace.weights(name, int(last)) - trace.weights(name, int(first)) for name in names}
    moved = head_shifts(trace, steps=steps, along=change)
    mine = moved[(moved["module"] == module) & (moved["head"] == head[1])]
    seen = trace.occurrences[trace.occurrences["step"].between(steps.start, steps.stop)]
    has = run.sequences.patterns[pattern].astype(bool)
    tables = {
        amount: pattern_enrichment(mine, has, amount=amount, by=["part"], occurrences=seen, n_resamples=499)
        for amount in ("along", "size")
    }
    pd.concat(tables, names=["amount"]).droplevel(1).to_csv(run.path / "who_moved.csv")
    rows = tables["along"].to_dict("records")
    return {str(row["part"]): {str(k): v for k, v in row.items() if k != "part"} for row in rows}
