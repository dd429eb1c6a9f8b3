"""`gradtrace verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._errors import FOUND
from lightning_gradtrace.cli._options import Json, Output, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, working


def verify(
    trace: TracePath,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", min=0, help="Largest residual of the ledger; by default 1e-3, half precision 5e-2."
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Read a whole trace and check it: checksums, counts, order, and whether the ledger closes.

    \b
    Example:
      gradtrace verify runs/a.zarr && echo fine

    Exit status 1 if a problem was found; each is named with array, chunk and steps. Notes are no problems.

    Next: `gradtrace neurons`, or `gradtrace report` for a page.
    """
    import pandas as pd

    check_output(output)
    opened = open_for(trace)
    with working("reading every chunk"):
        found = opened.verify(residual_tolerance=tolerance)
    rows = [("problem", text) for text in found.problems] + [("note", text) for text in found.notes]
    if as_json or output is not None:
        summary = [("steps", str(found.n_steps)), ("chunks", str(found.n_chunks)), ("ok", str(found.ok).lower())]
        emit("verify", pd.DataFrame([*summary, *rows], columns=["kind", "text"]), as_json, output)
    else:
        from lightning_gradtrace.cli._output import plain

        typer.echo("\n".join(plain(line) for line in str(found).splitlines()))
    if not found.ok:
        raise typer.Exit(FOUND)
