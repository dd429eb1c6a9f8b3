"""`gradtrace movers`."""

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


def movers(
    trace: TracePath,
    by: Annotated[str, typer.Option("--by", help="entry, neuron, head, head_part, param or module.")] = "neuron",
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of each.")] = 3,
    axis: Axis = "in",
    heads: HeadCount = None,
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """List the samples that moved each neuron (or entry, head, layer) most.

    \b
    Example:
      gradtrace movers runs/a.zarr --by module --n 10 --steps 1000:2000

    `moved` adds up |s| over the recorded shifts, `share` is its part of all recorded movement of the neuron.

    Next: `gradtrace report` shows these samples as text.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    number, chosen = parse_heads(heads), parse_steps(steps)
    with reading("movers", trace, record, scheduler) as (opened, client):
        blocks = heads_for(opened, by, number)
        table = analysis.movers(opened, by=by, n=n, axis=axis, heads=blocks, steps=chosen, client=client)
    emit("movers", table, as_json, output, rows)
