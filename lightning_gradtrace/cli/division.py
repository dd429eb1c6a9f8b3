"""`gradtrace division`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Rows, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, parse_steps, working


def division(
    trace: TracePath,
    components_of: Annotated[
        str | None,
        typer.Option("--components-of", metavar="PARAM", help="By component of a parameter that has a basis."),
    ] = None,
    by_step: Annotated[bool, typer.Option("--by-step", help="Every step by itself.")] = False,
    steps: StepRange = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Say how shifts, carry and decay divide the change of each parameter, and who makes its norm grow.

    \b
    Examples:
      gradtrace division runs/a.zarr
      gradtrace division runs/a.zarr --by-step --steps 100:200

    `share` is the part of the change, negative if it works against it; `growth` is what the part adds to the squared
    norm. `rest` is what the ledger can't explain. Needs the record `Division()`.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    keys = [*(["step"] if by_step else []), "param" if components_of is None else "component"]
    with working("division"):
        table = analysis.division(open_for(trace), components_of=components_of, steps=parse_steps(steps))
        table = analysis.divided(table, keys)
    emit("division", table, as_json, output, rows)
