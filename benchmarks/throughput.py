"""How fast dense rows get to the disk: through `TraceWriter`, and beside it in other ways."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorstore
import zarr

from lightning_gradtrace import Dense, Trace
from lightning_gradtrace.record import ParameterInfo
from lightning_gradtrace.store import TraceWriter

Rows = dict[str, np.ndarray]
Way = Callable[[Path, Sequence[Rows]], None]
BASE = "raw file, fsync"


def rows_of(trace: Trace) -> list[Rows]:
    """Return the shifts of every step that Dense holds: by parameter, shape (occurrence, *shape)."""
    of_row = trace.occurrences["step"].to_numpy()[trace.dense[next(iter(trace.dense))].occurrence]
    whole = {name: trace.dense[name][:] for name in trace.dense}
    return [{name: values[of_row == step] for name, values in whole.items()} for step in np.unique(of_row)]


def _empty(folder: Path) -> None:
    """Give back the space; removing the files is left for the end, since ext4 then searches longer for new ones."""
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_raw(folder: Path, steps: Sequence[Rows], sync: bool = True) -> None:
    """Append to one file."""
    with (folder / "a.bin").open("wb") as file:
        for rows in steps:
            for values in rows.values():
                file.write(values.data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_memmap(folder: Path, steps: Sequence[Rows]) -> None:
    """Fill a memmap for each parameter."""
    for name, first in steps[0].items():
        n = len(first)
        shape = (n * len(steps), *first.shape[1:])
        out = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", first.dtype, shape)
        for number, rows in enumerate(steps):
            out[number * n : (number + 1) * n] = rows[name]
        out.flush()
    _sync(folder)


def write_zarr(folder: Path, steps: Sequence[Rows]) -> None:
    """Append with zarr-python's defaults, one chunk for each step and parameter."""
    group = zarr.create_group(folder / "a.zarr")
    for name, first in steps[0].items():
        group.create_array(name, shape=(0, *first.shape[1:]), chunks=first.shape, dtype=first.dtype)
    for rows in steps:
        for name, values in rows.items():
            group[name].append(values)  # type: ignore[union-attr]
    _sync(folder)


def write_tensorstore(folder: Path, steps: Sequence[Rows]) -> None:
    """Write one uncompressed chunk for each step and parameter, all of a step at once."""
    arrays = {}
    for name, first in steps[0].items():
        grid = {"name": "regular", "configuration": {"chunk_shape": list(first.shape)}}
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        shape = [len(steps) * len(first), *first.shape[1:]]
        spec["metadata"] = {"shape": shape, "chunk_grid": grid, "data_type": "float32"}
        arrays[name] = tensorstore.open(spec, create=True).result()
    for number, rows in enumerate(steps):
        parts = {name: slice(number * len(values), (number + 1) * len(values)) for name, values in rows.items()}
        for future in [arrays[name][parts[name]].write(values) for name, values in rows.items()]:
            future.result()
    _sync(folder)


def write_trace(folder: Path, steps: Sequence[Rows], codec: Any = None) -> None:
    """Append steps with `TraceWriter`."""
    columns = ["name", "shape", "numel", "offset", "kind", "module"]
    shapes = {name: rows.shape[1:] for name, rows in steps[0].items()}
    sizes = np.array([int(np.prod(shape)) for shape in shapes.values()])
    table = zip(shapes, shapes.values(), sizes, np.cumsum(sizes) - sizes, strict=True)
    params = pd.DataFrame([(*row, "linear", "") for row in table], columns=columns)
    infos = [ParameterInfo(str(name), shape, 0) for name, shape in shapes.items()]
    writer = TraceWriter(folder / "a.zarr", params=params, specs=Dense(codec=codec).specs(infos), attrs={})
    n = len(next(iter(steps[0].values())))
    of_step = {name: np.zeros(n, np.int32) for name in ("micro_batch", "rank", "slot")}
    for number, rows in enumerate(steps):
        ids = {"sample_id": np.arange(n, dtype=np.int64)}
        records = {f"dense/{name}/shift": values for name, values in rows.items()}
        writer.append_step({"step": number}, {**of_step, **ids}, records)
    writer.close(complete=True)


WAYS: dict[str, Way] = {
    BASE: write_raw,
    "raw file, page cache only": lambda folder, steps: write_raw(folder, steps, sync=False),
    "GradTrace, Dense()": write_trace,
    'GradTrace, Dense(codec="fast")': lambda folder, steps: write_trace(folder, steps, "fast"),
    'GradTrace, Dense(codec="small")': lambda folder, steps: write_trace(folder, steps, "small"),
    "numpy memmap": write_memmap,
    "zarr-python, defaults": write_zarr,
    "tensorstore, uncompressed": write_tensorstore,
}
"""All of them but the second end with their data on the disk."""


def throughput(trace: Trace, folder: Path, rounds: int, megabytes: int) -> pd.DataFrame:
    """Write real shifts in every way, in turns, so that other load falls on all of them.

    Args:
        trace: a trace with Dense.
        folder: where to write.
        rounds: number of rounds; one more comes first, to warm up.
        megabytes: raw size that every way writes.

    Returns:
        One row per way: median MB of raw numbers per second; the ratio to the raw file of the same round, median,
        lowest and highest; CPU seconds per GB, and bytes on disk relative to the raw ones.
    """
    some = rows_of(trace)
    step_bytes = sum(values.nbytes for values in some[0].values())
    n_steps = max(1, megabytes * 10**6 // step_bytes)
    steps = [some[number % len(some)] for number in range(n_steps)]
    raw = n_steps * step_bytes
    lines = []
    for number in range(rounds + 1):
        order = list(WAYS)[number % len(WAYS) :] + list(WAYS)[: number % len(WAYS)]
        measured = {}
        for name in order:
            place = folder / f"out_{number}_{len(measured)}"
            place.mkdir()
            os.sync()  # what earlier ways left in the page cache is none of this one's
            start, cpu = time.perf_counter(), time.process_time()
            WAYS[name](place, steps)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            measured[name] = (raw / 1e6 / seconds, cpu / raw * 1e9, size / raw)
            _empty(place)
        if number:
            lines += [(name, *found, found[0] / measured[BASE][0]) for name, found in measured.items()]
    found = pd.DataFrame(lines, columns=["way", "MB/s", "CPU s/GB", "size", "x raw"]).groupby("way", sort=False)
    table = found.median()
    table["lowest"], table["highest"] = found["x raw"].min(), found["x raw"].max()
    return table.loc[list(WAYS), ["MB/s", "x raw", "lowest", "highest", "CPU s/GB", "size"]]
