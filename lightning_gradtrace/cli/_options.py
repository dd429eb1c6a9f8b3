"""Options that several commands share, as annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TracePath = Annotated[str, typer.Argument(metavar="TRACE", help="Folder, .zip file or URL of a trace.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: command, columns, rows.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all rows to FILE (.csv or .json).")
]
Rows = Annotated[int, typer.Option("--rows", min=0, help="Rows to show; 0 for all. JSON and files hold all.")]
StepRange = Annotated[
    str | None,
    typer.Option("--steps", metavar="A:B", help="Only these steps: 100:200 (both ends included), 100:, :200 or 150."),
]
Record = Annotated[
    str | None, typer.Option("--record", help="Which TopK record: topk (per sample) or topk_step (per step).")
]
Axis = Annotated[str, typer.Option("--axis", help="Neurons are columns (in) or rows (out) of a matrix.")]
Entries = Annotated[
    int, typer.Option("--entries", min=1, help="Look at the most frequently selected entries, at most so many.")
]
MinCount = Annotated[int, typer.Option("--min-count", min=1, help="Smallest count of a token.")]
NRelative = Annotated[int, typer.Option("--n-relative", min=1, help="Tokens that pass by relative frequency.")]
NNotable = Annotated[int, typer.Option("--n-notable", min=1, help="Notable tokens of each entry.")]
MinRelative = Annotated[float, typer.Option("--min-relative", min=0, help="Smallest relative frequency of a token.")]
HeadCount = Annotated[
    str | None,
    typer.Option("--heads", metavar="N|GLOB=N,...", help="Number of attention heads, for all modules or by glob."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Function that returns the trained model, or (model, forward); a file.py:FUNCTION will do. It is run.",
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="TEXT", help="Argument of that function; may be given several times."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples at once.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="At most so many samples.")]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="ADDRESS", help="Share the work with this dask cluster, e.g. tcp://host:8786."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all draws.")]
MaxShare = Annotated[
    float,
    typer.Option(
        "--max-share", min=0, max=1, help="Leave out neurons to which a larger share of samples is attributed."
    ),
]
