"""`gradtrace tokens`."""

from __future__ import annotations

from typing import Annotated

import typer

from lightning_gradtrace.cli._chain import Chain
from lightning_gradtrace.cli._options import (
    Axis,
    Entries,
    HeadCount,
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
from lightning_gradtrace.cli._trace import heads_for, parse_heads, parse_steps, reading


def tokens(
    trace: TracePath,
    by: Annotated[str, typer.Option("--by", help="entry, neuron, head, head_part, param or module.")] = "entry",
    method: Annotated[
        str,
        typer.Option("--method", help="univariate, log_product, mahalanobis, kl, log_odds or hypergeometric (tests)."),
    ] = "univariate",
    ngram: Annotated[int, typer.Option("--ngram", min=1, help="Look for runs of so many tokens.")] = 1,
    weight: Annotated[str, typer.Option("--weight", help="Weigh a text by: none, shift or value.")] = "none",
    max_q: Annotated[float, typer.Option("--max-q", min=0, max=1, help="Largest q-value, for tests.")] = 1.0,
    entries: Entries = 5000,
    min_count: MinCount = 20,
    n_relative: NRelative = 200,
    n_notable: NNotable = 5,
    min_relative: MinRelative = 0.0,
    axis: Axis = "in",
    heads: HeadCount = None,
    steps: StepRange = None,
    record: Record = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Find the words that are notable in the samples which moved each entry, neuron, head or layer.

    \b
    Examples:
      gradtrace tokens runs/a.zarr --min-relative 2
      gradtrace tokens runs/a.zarr --by neuron --method hypergeometric --max-q 0.01
      gradtrace tokens runs/a.zarr --by head --heads 4 --ngram 2

    Read the column `relative`: near 1, a word is only common. Such words come up in every entry, also by chance.

    Next: `gradtrace neurons` gathers entries into neurons; `gradtrace ablate` asks whether the model needs them.
    """
    check_output(output)
    chain = Chain(entries, min_count, n_relative, n_notable, min_relative, axis, parse_steps(steps))
    number = parse_heads(heads)
    with reading("notable tokens", trace, record, scheduler) as (opened, client):
        blocks = heads_for(opened, by, number)
        table = chain.find_tokens(
            opened,
            chain.entries(opened, client),
            method=method,
            by=by,
            axis=axis,
            heads=blocks,
            ngram=ngram,
            weight=weight,
            max_q=max_q,
            steps=chain.steps,
            client=client,
        )
    emit("tokens", table, as_json, output, rows)
