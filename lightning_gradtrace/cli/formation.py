"""`gradtrace formation`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import (
    Axis,
    HeadCount,
    Json,
    Output,
    Record,
    Rows,
    Scheduler,
    StepRange,
    TracePath,
)
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import heads_for, parse_heads, parse_steps, reading


def formation(
    trace: TracePath,
    by: Annotated[str, typer.Option("--by", help="entry, neuron, head, head_part, param or module.")] = "param",
    every: Annotated[int | None, typer.Option("--every", min=1, help="Steps that share a point in time.")] = None,
    series: Annotated[bool, typer.Option("--series", help="The series itself: movement at every time.")] = False,
    changes: Annotated[bool, typer.Option("--changes", help="Change points of each series instead.")] = False,
    axis: Axis = "in",
    heads: HeadCount = None,
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Say when each layer (or neuron, head) made 10, 50 and 90 % of its movement, and in which order.

    \b
    Examples:
      gradtrace formation runs/a.zarr --by neuron
      gradtrace formation runs/a.zarr --by param --changes

    A TopK record holds the largest shifts only, so these are sums over what was kept.

    Next: `gradtrace movers --steps A:B` for the samples behind a change.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if series and changes:
        raise typer.BadParameter("give one of --series and --changes")
    number, chosen = parse_heads(heads), parse_steps(steps)
    with reading("movement", trace, record, scheduler) as (opened, client):
        blocks = heads_for(opened, by, number)
        table = analysis.movement(opened, by=by, every=every, axis=axis, heads=blocks, steps=chosen, client=client)
        if changes:
            keys = [c for c in table.columns if c not in ("step", "shifts", "moved", "net")]
            table = analysis.change_points(table, "moved", by=keys)
        elif not series:
            table = analysis.formation(table)
    emit("formation", table, as_json, output, rows)
