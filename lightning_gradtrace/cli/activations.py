"""`gradtrace activations`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._chain import Chain
from lightning_gradtrace.cli._model import load_model
from lightning_gradtrace.cli._options import (
    Axis,
    BatchSize,
    Entries,
    Json,
    MinCount,
    MinRelative,
    Model,
    ModelArguments,
    Output,
    Rows,
    Samples,
    Seed,
    TracePath,
)
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, working


def activations(
    trace: TracePath,
    model: Model = None,
    model_arg: ModelArguments = None,
    top: Annotated[
        bool, typer.Option("--top", help="Samples that activate and samples that move each neuron.")
    ] = False,
    n_neurons: Annotated[int, typer.Option("--neurons", min=1, help="So many neurons with notable tokens.")] = 10,
    entries: Entries = 5000,
    min_count: MinCount = 20,
    min_relative: MinRelative = 0.0,
    axis: Axis = "in",
    samples: Samples = 500,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Compare with activations: does a neuron react to the words that the samples which moved it share?

    \b
    Example:
      gradtrace activations runs/a.zarr --model my_project.model:load --top

    The baseline of the 2023 post: rank of each flagged neuron by its mean activation on its notable tokens.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    opened = open_for(trace)
    network, forward = load_model(model, model_arg)
    chain = Chain(entries, min_count, min_relative=min_relative, axis=axis)
    with working("activations", opened) as watched:
        kept = chain.entries(watched)
        found = chain.components(watched, kept)
        found = found[found["n_notable"] > 0].head(n_neurons)
        common = {"n_samples": samples, "batch_size": batch_size, "forward": forward, "seed": seed}
        if top:
            table = analysis.top_samples(watched, network, found, kept, **common)
        else:
            table = analysis.activation_baseline(watched, network, found, **common)
    emit("activations", table, as_json, output, rows)
