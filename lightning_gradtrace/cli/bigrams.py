"""`gradtrace bigrams`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._options import Json, Output, Rows, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, parse_steps, working


def bigrams(
    trace: TracePath,
    embedding: Annotated[str, typer.Option("--embedding", help="Name of the embedding's weight (vocabulary, d).")],
    head: Annotated[str | None, typer.Option("--head", help="Name of the output head's; none where tied.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pairs of each span.")] = 20,
    summed: Annotated[bool, typer.Option("--summed", help="From the first to the last snapshot at once.")] = False,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="How far the change goes with the bigrams of the texts instead.")
    ] = False,
    steps: Annotated[str | None, typer.Option("--steps", metavar="A:B", help="Snapshots in this range.")] = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """List the pairs (token, next token) whose direct score changed most between weight snapshots.

    \b
    Examples:
      gradtrace bigrams runs/a.zarr --embedding embed.weight --head head.weight --summed
      gradtrace bigrams runs/a.zarr --embedding embed.weight --head head.weight --alignment

    Needs snapshots of both weights: `GradTrace(..., weights_every_n_steps=100)`.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    chosen = parse_steps(steps)
    if isinstance(chosen, int):
        raise typer.BadParameter("expected a range A:B: a change lies between two snapshots", param_hint="--steps")
    with working("pairs of tokens"):
        if alignment:
            table = analysis.bigram_alignment(open_for(trace), embedding, head, summed=summed, steps=chosen)
        else:
            table = analysis.bigram_shifts(open_for(trace), embedding, head, n=n, summed=summed, steps=chosen)
    emit("bigrams", table, as_json, output, rows)
