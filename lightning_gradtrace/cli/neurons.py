"""`gradtrace neurons`."""

from __future__ import annotations

from lightning_gradtrace.cli._chain import Chain
from lightning_gradtrace.cli._options import (
    Axis,
    Entries,
    Json,
    MinCount,
    MinRelative,
    NNotable,
    NRelative,
    Output,
    Record,
    Rows,
    Scheduler,
    StepRange,
    TracePath,
)
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import parse_steps, reading


def neurons(
    trace: TracePath,
    entries: Entries = 5000,
    min_count: MinCount = 20,
    n_relative: NRelative = 200,
    n_notable: NNotable = 5,
    min_relative: MinRelative = 0.0,
    axis: Axis = "in",
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Gather the most frequently moved entries into neurons, with the words that their samples share.

    \b
    Examples:
      gradtrace neurons runs/a.zarr --min-relative 2
      gradtrace neurons runs/a.zarr --axis out --output neurons.csv

    A neuron is a column (or row) of a weight. One to which nearly every sample is attributed says little. Of a trace
    that keeps no token ids (images, say) neurons come without words.

    Next: `gradtrace report` shows each with its samples; `gradtrace ablate` switches it off.
    """
    check_output(output)
    chain = Chain(entries, min_count, n_relative, n_notable, min_relative, axis, parse_steps(steps))
    with reading("neurons", trace, record, scheduler) as (opened, client):
        table = chain.components(opened, chain.entries(opened, client), without_words=True, client=client)
    emit("neurons", table, as_json, output, rows)
