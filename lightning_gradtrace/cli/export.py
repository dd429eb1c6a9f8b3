"""`gradtrace export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_gradtrace.cli._options import TracePath
from lightning_gradtrace.cli._output import plain, to_csv, write_whole
from lightning_gradtrace.cli._trace import open_for, working

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def export(
    trace: TracePath,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go; made if it isn't there.")],
    form: Annotated[str, typer.Option("--format", help="parquet or csv.")] = "parquet",
) -> None:
    """Write params, steps, occurrences and TopK records as Parquet or CSV, for tools that know no Zarr.

    \b
    Examples:
      gradtrace export runs/a.zarr tables
      gradtrace export runs/a.zarr tables --format csv

    One file per table, one row per kept entry, written block by block in bounded memory. No file is overwritten.
    """
    if form not in ("parquet", "csv"):
        raise typer.BadParameter(f"`{plain(form)}` is neither parquet nor csv", param_hint="--format")
    with working("writing", open_for(trace)) as opened:
        if form == "parquet":
            from lightning_gradtrace.store.parquet import to_parquet

            files = to_parquet(opened, folder)
        else:
            files = _to_csv(opened, folder)
    for file in files:
        typer.echo(plain(str(file)))


def _to_csv(trace: Trace, folder: Path) -> list[Path]:
    records = [name for name in ("topk", "topk_step") if name in trace.records]
    files = [folder / f"{name}.csv" for name in ("params", "steps", "occurrences", *records)]
    taken = [file.name for file in files if file.exists()]
    if taken:
        raise FileExistsError(f"`{folder}` already holds {', '.join(taken)}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tables = (trace.params, trace.steps.reset_index(), trace.occurrences.reset_index())
    for file, table in zip(files, tables, strict=False):
        write_whole(file, to_csv(table))
    for record, file in zip(records, files[3:], strict=True):
        chosen, partial = trace.using(record), file.with_name(f".{file.name}.partial")
        try:
            with partial.open("w", encoding="utf-8", newline="") as out:
                out.write("occurrence,step,slot,sample_id,param,index,shift\n")
                for block in chosen.topk.blocks():
                    rows = trace.occurrences.iloc[block.occurrence][["step", "slot", "sample_id"]].reset_index(
                        drop=True
                    )
                    rows.insert(0, "occurrence", block.occurrence)
                    rows = rows.join(trace.entries(block.entry)).assign(shift=block.shift)
                    rows.to_csv(out, index=False, header=False)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return files
