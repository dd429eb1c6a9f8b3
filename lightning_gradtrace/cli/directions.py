"""`gradtrace directions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_gradtrace.cli._options import Json, Output, Rows, Scheduler, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit, plain
from lightning_gradtrace.cli._trace import cluster, open_for, parse_steps, working


def directions(
    trace: TracePath,
    param: Annotated[str, typer.Option("--param", help="Name of the parameter.")],
    basis: Annotated[
        Path | None,
        typer.Option("--basis", metavar="FILE", help="Directions, one per row (.npy or .csv), e.g. of a probe."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Without --basis: directions along which it moved most.")] = 5,
    shifts: Annotated[bool, typer.Option("--shifts", help="Shift of every occurrence along them instead.")] = False,
    axis: Annotated[
        str, typer.Option("--axis", help="Directions of the input (in), the output (out) or of all weights (weight).")
    ] = "in",
    record: Annotated[
        str, typer.Option("--record", help="auto, dense, factored, topk or sketch: where shifts are taken from.")
    ] = "auto",
    steps: StepRange = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Measure shifts along directions: features that are spread over many neurons and are an outlier in none.

    \b
    Examples:
      gradtrace directions runs/a.zarr --param layers.0.linear1.weight
      gradtrace directions runs/a.zarr --param layers.0.linear1.weight --shifts --output shifts.csv
      gradtrace directions runs/a.zarr --param layers.0.linear1.weight --basis probe.npy --axis out

    Without --basis: the directions along which the parameter was moved most, and their share of all that it moved.

    A `TopK` record knows the largest shifts only, and is blind to what is spread thinly: record `Factored` or `Dense`
    for this question, or `Sketch` for directions of all weights.

    Next: `gradtrace neurons` for single columns, to compare with.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    chosen = parse_steps(steps)
    opened = open_for(trace)
    common: dict[str, Any] = {"axis": axis, "record": record, "steps": chosen}
    with working("shifts along directions"), cluster(scheduler) as client:
        common["client"] = client
        if basis is not None:
            table = analysis.direction_shifts(opened, param, _read(basis), **common)
        else:
            if axis == "weight":
                raise typer.BadParameter("directions of all weights need --basis", param_hint="--axis")
            found, table = analysis.principal_directions(opened, param, n, **common)
            table = analysis.direction_shifts(opened, param, found, **common) if shifts else table
    emit("directions", table, as_json, output, rows)


def _read(file: Path) -> Any:
    """Read directions, one per row; nothing in the file is run."""
    import numpy as np

    try:
        if file.suffix.lower() == ".npy":
            return np.load(file, allow_pickle=False)
        return np.loadtxt(file, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"`{plain(str(file))}` can't be read: {plain(str(error))}; expected a .npy file, or a .csv of numbers "
            "without a heading, one direction per line",
            param_hint="--basis",
        ) from None
