"""`gradtrace report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightning_gradtrace.cli._model import load_model
from lightning_gradtrace.cli._options import (
    Axis,
    BatchSize,
    Entries,
    MaxShare,
    MinCount,
    MinRelative,
    Model,
    ModelArguments,
    NNotable,
    NRelative,
    Record,
    Samples,
    Seed,
    TracePath,
)
from lightning_gradtrace.cli._output import plain
from lightning_gradtrace.cli._trace import open_for, working


def report(
    trace: TracePath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; by default NAME.html beside TRACE.")
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", metavar="FOLDER", help="Take tables from these CSV files, such as controls.csv."),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    model: Model = None,
    model_arg: ModelArguments = None,
    n_ablated: Annotated[int, typer.Option("--ablate", min=1, help="With --model: switch so many neurons off.")] = 20,
    n_neurons: Annotated[int, typer.Option("--neurons", min=1, help="At most so many neurons on the page.")] = 1000,
    n_shown: Annotated[int, typer.Option("--n-samples", min=1, help="Samples shown for each neuron.")] = 10,
    entries: Entries = 5000,
    min_count: MinCount = 20,
    n_relative: NRelative = 200,
    n_notable: NNotable = 5,
    min_relative: MinRelative = 0.0,
    axis: Axis = "in",
    max_share: MaxShare = 0.9,
    samples: Samples = 500,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    record: Record = None,
) -> None:
    """Write one self-contained HTML page about a trace, to look at or to send.

    \b
    Examples:
      gradtrace report runs/a.zarr
      gradtrace report runs/a.zarr -o page.html --model load.py:model --model-arg last.ckpt
      gradtrace report runs/planted/trace.zarr --tables runs/planted/analysis/tables

    The page holds the run and its ledger, the loss with change points, a map of layers and neurons, and for each
    neuron its words, its samples, when it moved, and, with --model or --tables, what happens when it is switched off.
    It needs no network and no other file. The path of the page is printed.
    """
    file = _target(trace, output)
    opened = open_for(trace, record)
    given = None
    if tables is not None:
        from lightning_gradtrace.report import read_tables

        given = read_tables(tables)
    network, forward = (None, None) if model is None else load_model(model, model_arg)
    from lightning_gradtrace.overview import write_overview

    with working("analysing", opened) as watched:
        write_overview(
            watched,
            file,
            title=title or f"Trace of {Path(trace.rstrip('/')).name}",
            tables=given,
            n_entries=entries,
            n_neurons=n_neurons,
            n_samples=n_shown,
            axis=axis,
            model=network,
            forward=forward,
            n_ablated=n_ablated,
            max_sample_share=max_share,
            n_ablation_samples=samples,
            batch_size=batch_size,
            seed=seed,
            min_count=min_count,
            n_relative=n_relative,
            n_notable=n_notable,
            min_relative=min_relative,
        )
    typer.echo(plain(str(file)))


def _target(trace: str, output: Path | None) -> Path:
    if output is None:
        output = Path(f"{Path(trace.rstrip('/')).stem}.html") if "://" in trace else Path(trace).with_suffix(".html")
    if output.is_dir():
        raise typer.BadParameter(f"`{plain(str(output))}` is a folder, expected a file", param_hint="--output")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder `{plain(str(output.parent))}`", param_hint="--output")
    return output
