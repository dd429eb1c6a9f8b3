"""The application: its commands in the order in which they are used, and what its help says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from lightning_gradtrace.cli import (
    ablate,
    activations,
    bigrams,
    coherence,
    concentration,
    directions,
    division,
    enrichment,
    entries,
    export,
    formation,
    heads,
    info,
    movers,
    neurons,
    outliers,
    phases,
    plan,
    report,
    tokens,
    verify,
    weights,
)
from lightning_gradtrace.cli._errors import guarded

HELP = """
Read what a training recorded: which sample moved which weight, at every step.

\b
A first round:
  gradtrace info runs/a.zarr         what was recorded
  gradtrace verify runs/a.zarr       is it whole, and does the ledger close?
  gradtrace neurons runs/a.zarr      neurons, and the words their samples share
  gradtrace report runs/a.zarr       all of it on one page, to look at or to send

Every command shows a table. `--json` prints JSON instead, `--output FILE.csv` (or .json) writes all rows to a file.
A trace is a folder, a .zip file or a URL. Progress goes to stderr, and only to a terminal.

\b
Exit status:
  0  done
  1  something was found: `verify` found a problem
  2  the command line is wrong, or asks for what this trace or model doesn't have
  3  there is no trace, or it can't be read
  4  a file can't be read or written, or a package is missing
  70 a fault of this program; GRADTRACE_TRACEBACK=1 shows where
"""

app = typer.Typer(
    name="gradtrace",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

COMMANDS: dict[str, Callable[..., Any]] = {
    "info": info.info,
    "verify": verify.verify,
    "plan": plan.plan,
    "outliers": outliers.outliers,
    "entries": entries.entries,
    "tokens": tokens.tokens,
    "neurons": neurons.neurons,
    "heads": heads.heads,
    "enrichment": enrichment.enrichment,
    "movers": movers.movers,
    "formation": formation.formation,
    "directions": directions.directions,
    "phases": phases.phases,
    "concentration": concentration.concentration,
    "coherence": coherence.coherence,
    "division": division.division,
    "ablate": ablate.ablate,
    "activations": activations.activations,
    "bigrams": bigrams.bigrams,
    "weights": weights.weights,
    "report": report.report,
    "export": export.export,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(guarded(_command))


def _show_version(wanted: bool) -> None:
    if wanted:
        from lightning_gradtrace import __version__

        typer.echo(f"gradtrace {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options that come before a command; the help is that of `app`."""


_root.__doc__ = HELP


def main() -> None:
    """Run the command line of this process."""
    app()
