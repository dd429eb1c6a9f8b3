"""`gradtrace phases`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Record, Rows, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, working


def phases(
    trace: TracePath,
    of: Annotated[
        list[str] | None, typer.Option("--of", metavar="SERIES", help="Only this series; may be given several times.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Steps within which changes belong together.")
    ] = None,
    every: Annotated[int | None, typer.Option("--every", min=1, help="Steps that share a point of a series.")] = None,
    series: Annotated[bool, typer.Option("--series", help="The series themselves instead.")] = False,
    changes: Annotated[bool, typer.Option("--changes", help="The change points of each series instead.")] = False,
    record: Record = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Find the steps at which many series of the training change together.

    \b
    Examples:
      gradtrace phases runs/a.zarr
      gradtrace phases runs/a.zarr --changes --of loss --of weight_norm

    The series are those that the trace holds: loss and gradient norm, by parameter movement, number of weights that
    carry a shift, norms of shifts and of weights. Compare `series` with `expected`, which chance would bring together.

    Next: `gradtrace movers --steps A:B` for the samples behind a boundary.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if series and changes:
        raise typer.BadParameter("give one of --series and --changes")
    with working("phases", open_for(trace, record)) as opened:
        table = analysis.trace_series(opened, every=every)
        known = list(table["series"].unique())
        if unknown := sorted(set(of or ()) - set(known)):
            raise typer.BadParameter(f"{unknown} are none of its series, which are {known}", param_hint="--of")
        table = table[table["series"].isin(of or known)].reset_index(drop=True)
        if changes:
            table = analysis.series_changes(table)
        elif not series:
            table = analysis.trace_phases(opened, table, window=window)
    emit("phases", table, as_json, output, rows)
