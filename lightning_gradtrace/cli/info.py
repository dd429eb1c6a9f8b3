"""`gradtrace info`."""

from __future__ import annotations

from lightning_gradtrace.cli._options import Json, Output, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for


def info(trace: TracePath, as_json: Json = False, output: Output = None) -> None:
    """Say what a trace holds: model, optimizer, steps, records, ledger, tracked parameters.

    \b
    Example:
      gradtrace info runs/a.zarr

    Reads the small tables only, so it is quick on a trace of any size. A run that was killed or still runs shows
    "incomplete" and what was committed.

    Next: `gradtrace verify` reads every chunk and checks it.
    """
    import pandas as pd

    from lightning_gradtrace.report import run_summary

    check_output(output)
    opened = open_for(trace)
    table = run_summary(opened.attrs, opened.steps)
    facts = {
        "records": ", ".join(opened.records) or "none",
        "weight snapshots": f"{len(opened.weight_steps):,}",
        "samples with stored inputs": f"{opened.committed['sample']:,}",
        "format": str(opened.attrs.get("encoding-version")),
        "tracked weights": f"{opened.n_entries:,} in {len(opened.params)} parameters",
    }
    rows = [*facts.items(), *((f"  {p}", " x ".join(map(str, s))) for p, s in opened.params[["param", "shape"]].values)]
    emit("info", pd.concat([table, pd.DataFrame(rows, columns=["name", "value"])]), as_json, output, rows=0)
