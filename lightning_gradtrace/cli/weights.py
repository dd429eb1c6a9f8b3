"""`gradtrace weights`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Axis, Json, Output, Rows, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, working


def weights(
    trace: TracePath,
    params: Annotated[
        list[str] | None, typer.Option("--params", help="Name of a parameter; may be given several times.")
    ] = None,
    spectra: Annotated[bool, typer.Option("--spectra", help="Singular values instead.")] = False,
    of_neurons: Annotated[bool, typer.Option("--neurons", help="Norm of every column or row instead.")] = False,
    axis: Axis = "in",
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Describe the weights over training: moments, norms, ranks, spectra, from the snapshots in a trace.

    \b
    Examples:
      gradtrace weights runs/a.zarr
      gradtrace weights runs/a.zarr --params layers.2.linear1.weight --spectra

    Needs snapshots: `GradTrace(..., weights_every_n_steps=100)`.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if spectra and of_neurons:
        raise typer.BadParameter("give one of --spectra and --neurons")
    opened = open_for(trace)
    with working("weights"):
        if spectra:
            table = analysis.weight_spectra(opened, params or None)
        elif of_neurons:
            table = analysis.neuron_weights(opened, params or None, axis)
        else:
            table = analysis.weight_statistics(opened, params or None)
    emit("weights", table, as_json, output, rows)
