"""`gradtrace heads`."""

from __future__ import annotations

from lightning_gradtrace.cli._options import HeadCount, Json, Output, Record, Rows, Scheduler, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import parse_heads, parse_steps, reading


def heads(
    trace: TracePath,
    number: HeadCount = None,
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Find the attention heads among the tracked weights, and how much each part of them was moved.

    \b
    Examples:
      gradtrace heads runs/a.zarr --heads 4
      gradtrace heads runs/a.zarr --heads "encoder.*=4,decoder.*=8"

    Next: `gradtrace tokens --by head --heads 4` for their words, `gradtrace formation --by head` for when they formed,
    `gradtrace enrichment --heads 4` for what samples with a pattern moved in them.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    found, chosen = parse_heads(number), parse_steps(steps)
    with reading("heads", trace, record, scheduler) as (opened, client):
        blocks = analysis.attention_heads(opened, found)
        moved = analysis.movement(opened, by="head_part", heads=blocks, steps=chosen, client=client)
    keys = ["module", "head", "part", "param"]
    moved = moved.groupby(keys, sort=False, observed=True)[["shifts", "moved", "net"]].sum().reset_index()
    emit("heads", blocks.merge(moved.astype({"param": object}), on=keys, how="left"), as_json, output, rows)
