"""A trace as Parquet files: tables for tools that know no Zarr."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.store.target import StoreError
from lightning_gradtrace.store.views import TopKView

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


def to_parquet(trace: Trace, folder: str | os.PathLike[str], *, block_bytes: int = 64 * 2**20) -> list[Path]:
    """Write the tables and TopK records of a trace as Parquet files.

    ``params``, ``steps`` and ``occurrences`` are one file each, with the columns of the trace's tables. ``topk`` and
    ``topk_step`` have one row per kept entry: occurrence, step, slot, sample_id, param, index, shift. They are written
    block by block, in bounded memory. The root attributes are in the metadata of every file, under ``gradtrace``.

    Args:
        trace: the trace.
        folder: where the files go; it is made, and must hold none of them.
        block_bytes: memory that one block of entries may take.

    Returns:
        The files.

    Raises:
        ImportError: if pyarrow is not installed.
        StoreError: if a file is there already, or the trace is damaged.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "`to_parquet` needs pyarrow, which is not installed: pip install 'lightning-gradtrace[parquet]'"
        )
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    target = Path(folder)
    tables = {"params": _params, "steps": _steps, "occurrences": _occurrences}
    entries = [name for name in ("topk", "topk_step") if name in trace.records]
    taken = [name for name in (*tables, *entries) if (target / f"{name}.parquet").exists()]
    if taken:
        raise StoreError(f"`{target}` already holds {', '.join(f'{name}.parquet' for name in taken)}; choose another")
    target.mkdir(parents=True, exist_ok=True)
    metadata = {"gradtrace": json.dumps(trace.attrs)}
    files = []
    for name in (*tables, *entries):
        frames = iter([tables[name](trace)]) if name in tables else _entries(trace, name, block_bytes)
        file, partial = target / f"{name}.parquet", target / f".{name}.parquet.partial"
        writer = None
        try:
            for frame in frames:
                table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(metadata)
                writer = pq.ParquetWriter(partial, table.schema, compression="zstd") if writer is None else writer
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        partial.replace(file)
        files.append(file)
    return files


def _params(trace: Trace) -> pd.DataFrame:
    return trace.params.assign(shape=trace.params["shape"].map(list))


def _steps(trace: Trace) -> pd.DataFrame:
    return trace.steps.reset_index()


def _occurrences(trace: Trace) -> pd.DataFrame:
    return trace.occurrences.reset_index()


def _entries(trace: Trace, name: str, block_bytes: int) -> Iterator[pd.DataFrame]:
    view: TopKView = trace.using(name).topk
    where = trace.occurrences
    empty = True
    for block in view.blocks(block_bytes):
        empty = False
        yield _frame(trace, where, block.occurrence, block.entry, block.shift)
    if empty:
        none = where.index.to_numpy()[:0]
        yield _frame(trace, where, none, none, none.astype("float32"))


def _frame(
    trace: Trace, where: pd.DataFrame, occurrence: np.ndarray, entry: np.ndarray, shift: np.ndarray
) -> pd.DataFrame:
    located = trace.entries(entry)
    rows = where.iloc[occurrence]
    columns = {"occurrence": occurrence, **{name: rows[name].to_numpy() for name in ("step", "slot", "sample_id")}}
    columns |= {"param": located["param"].array, "index": located["index"].to_numpy(), "shift": shift}
    return pd.DataFrame(columns)
