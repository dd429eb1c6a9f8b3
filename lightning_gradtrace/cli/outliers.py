"""`gradtrace outliers`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Axis, Json, Output, Record, Rows, Scheduler, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import parse_steps, reading


def outliers(
    trace: TracePath,
    of: Annotated[str, typer.Option("--of", help="step, sample, param, neuron or entry.")] = "step",
    n: Annotated[int, typer.Option("--n", min=1, help="How many of each.")] = 1,
    normalise: Annotated[
        str,
        typer.Option("--normalise", help="none, or in proportion to weights (param, neuron) or to the past (series)."),
    ] = "none",
    axis: Axis = "in",
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """List the largest recorded shifts of every step, sample, parameter, neuron or entry.

    \b
    Examples:
      gradtrace outliers runs/a.zarr --of neuron --n 3
      gradtrace outliers runs/a.zarr --normalise series --output outliers.csv

    A feature spread thinly over many weights has no outlier at all.

    Next: `gradtrace movers` for who moved a neuron most in total, `gradtrace neurons` for what its samples share.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    chosen = parse_steps(steps)
    with reading("largest shifts", trace, record, scheduler) as (opened, client):
        table = analysis.outliers(opened, of, n=n, normalise=normalise, axis=axis, steps=chosen, client=client)
    table = table.loc[:, ~table.columns.duplicated()]
    emit("outliers", table, as_json, output, rows)
