"""`gradtrace coherence`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Rows, Seed, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, parse_steps, working


def coherence(
    trace: TracePath,
    null: Annotated[
        str | None, typer.Option("--null", metavar="PARAM", help="Compare this parameter with random signs instead.")
    ] = None,
    steps: StepRange = None,
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Say whether the samples of a step pull the same way, each its own way, or against each other.

    \b
    Examples:
      gradtrace coherence runs/a.zarr --steps 100:200
      gradtrace coherence runs/a.zarr --null layers.0.linear1.weight

    `coherence` is |sum of shifts|^2 / sum of |shift|^2: the number of samples if all pull the same way, 1 for random
    signs, less if they undo each other. Needs the records `Division()` and `Norms()`; --null needs a `Dense` or
    `Factored` record.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    chosen = parse_steps(steps)
    chosen = slice(chosen, chosen) if isinstance(chosen, int) else chosen or slice(None)
    with working("coherence"):
        opened = open_for(trace)
        inside = opened.steps.loc[chosen].index
        if null is None:
            table = analysis.coherence(opened)
            table = table[table["step"].isin(inside)].reset_index(drop=True)
        else:
            table = analysis.sign_null(opened, null, inside, seed=seed)
    emit("coherence", table, as_json, output, rows)
