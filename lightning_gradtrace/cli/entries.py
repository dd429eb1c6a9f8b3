"""`gradtrace entries`."""

from __future__ import annotations

from lightning_gradtrace.cli._chain import Chain
from lightning_gradtrace.cli._options import Entries, Json, Output, Record, Rows, Scheduler, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import parse_steps, reading


def entries(
    trace: TracePath,
    n_entries: Entries = 5000,
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """List the weights that were among the most shifted ones most often.

    \b
    Examples:
      gradtrace entries runs/a.zarr
      gradtrace entries runs/a.zarr --steps 0:500 --entries 100 --output entries.csv

    The count says how often an entry was among the k largest, not how far it moved. With one k for all parameters,
    those with larger shifts crowd out the others: see `gradtrace outliers --normalise param`.

    Next: `gradtrace tokens` for the words behind each entry, `gradtrace neurons` for the columns they lie in.
    """
    check_output(output)
    chain = Chain(n_entries, steps=parse_steps(steps))
    with reading("entries", trace, record, scheduler) as (opened, client):
        table = chain.entries(opened, client)
    emit("entries", table, as_json, output, rows)
