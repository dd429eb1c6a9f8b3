"""`gradtrace concentration`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Record, Rows, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, parse_steps, working

_OF = {"samples": "self_influence", "weights": "shift_sparsity", "overlap": "selection_overlap"}


def concentration(
    trace: TracePath,
    of: Annotated[
        str,
        typer.Option("--of", help="samples (who shares a step), weights (who carries a shift) or overlap (the same?)."),
    ] = "samples",
    every: Annotated[int, typer.Option("--every", min=1, help="Steps that share a row.")] = 1,
    steps: StepRange = None,
    record: Record = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Follow how concentrated a step is: on few samples, on few weights, on the same ones.

    \b
    Examples:
      gradtrace concentration runs/a.zarr --of samples --every 50
      gradtrace concentration runs/a.zarr --of weights --every 50

    Rows without a name are of the whole model. `samples` needs the record `Norms()`, the others a `TopK` per sample.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if of not in _OF:
        raise typer.BadParameter(f"{of!r} is none of {', '.join(_OF)}", param_hint="--of")
    with working("concentration", open_for(trace, record)) as opened:
        table = getattr(analysis, _OF[of])(opened, every=every, steps=parse_steps(steps))
    emit("concentration", table, as_json, output, rows)
