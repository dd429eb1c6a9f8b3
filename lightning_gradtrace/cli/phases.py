"""`gradtrace phases`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Record, Rows, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, working

SHOW = ("boundaries", "changes", "series")


def phases(
    trace: TracePath,
    show: Annotated[str, typer.Option("--show", help=f"Which table: {', '.join(SHOW)}.")] = "boundaries",
    window: Annotated[
        int | None,
        typer.Option("--window", min=1, help="Steps within which changes are one; else a fortieth of all."),
    ] = None,
    every: Annotated[int | None, typer.Option("--every", min=1, help="Steps that share a point of a series.")] = None,
    record: Record = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Find the steps at which loss, gradient norm, movement and weights change their level, and change together.

    \b
    Examples:
      gradtrace phases runs/a.zarr
      gradtrace phases runs/a.zarr --show changes --output changes.csv

    \b
    Tables (--show):
      boundaries  steps at which several series change, beside how many would by chance (`expected`)
      changes     the change points of each series, by parameter where it has one
      series      the series themselves

    The series of one run share its randomness, and a steady drift is a staircase of changes: agreement is no proof.

    Next: `gradtrace movers --steps A:B` for the samples behind a change.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if show not in SHOW:
        raise typer.BadParameter(f"`{show}` is none of {', '.join(SHOW)}", param_hint="--show")
    with working("series", open_for(trace, record)) as opened:
        if show == "boundaries":
            table = analysis.phases(opened, window=window, every=every)
        else:
            table = analysis.trace_series(opened, every=every)
            table = analysis.series_changes(table) if show == "changes" else table
    emit("phases", table, as_json, output, rows)
