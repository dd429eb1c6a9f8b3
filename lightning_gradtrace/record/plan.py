"""How much a run is going to write: every array of every record, encoded as the store encodes it, before the run."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import nn

from lightning_gradtrace.capture.parameters import ParameterFilter, select_parameters
from lightning_gradtrace.record._base import ParameterInfo, Record
from lightning_gradtrace.record.factored import Factored
from lightning_gradtrace.record.made_up import made_up_rows
from lightning_gradtrace.record.parameters import parameter_infos
from lightning_gradtrace.store.buffers import ArrayBuffer
from lightning_gradtrace.store.commit import metadata_bytes
from lightning_gradtrace.store.schema import (
    OCCURRENCE_SPECS,
    ON_OPEN,
    PARAM_SPECS,
    STEP_SPECS,
    ArraySpec,
)
from lightning_gradtrace.store.sizes import padding_bytes, uncompressed_bytes
from lightning_gradtrace.store.target import Put

SAMPLE_BYTES = 2_000_000
"""Raw size of the rows that are made up and encoded to learn how far an array is compressed."""

MOST_DRAWS = 128
"""Samples of which kept entries are made up; a row of a whole step takes as many as it has."""

ATTRIBUTE_BYTES = 2_500
"""Size of the root attributes of a run without a configuration of its own."""

INDEX_SHARE = 0.75
"""Numbers of kept entries take this part of what they would if samples had nothing in common; 0.4 to 1.0 were seen."""

FACTOR_SHARE = 0.95
"""Inputs and cotangents take this part of what random numbers take; 0.6 (mostly zeros, after ReLU) to 1.0 were seen."""

_OF_FLOATS = ("float", "fast", "small")

_Size = Callable[[ArraySpec, int], float]


def plan(
    model: nn.Module | Sequence[ParameterInfo],
    records: Record | Sequence[Record],
    n_steps: int,
    n_samples: int,
    *,
    params: ParameterFilter = None,
    every_n_steps: int = 1,
    n_positions: int | None = None,
    gains: bool = False,
) -> pd.DataFrame:
    """Predict the size of a trace, without training.

    Rows that stand for those of the run are made up and encoded as the store does it. For Dense, Sketch, Norms and the
    values of TopK, which hardly compress, the outcome lies within 10 % of the prediction. How far the numbers of kept
    entries and the factors of Factored compress depends on the data. What is predicted of them is what is usual,
    `INDEX_SHARE` and `FACTOR_SHARE`; docs/performance.md has what was found in trainings. Values that are equal or zero
    (parameters that the loss doesn't reach, columns after ReLU) take less.

    Args:
        model: the model, or its tracked parameters.
        records: what is to be kept.
        n_steps: optimizer steps of the run.
        n_samples: samples of one step, all micro-batches together.
        params: which parameters of the model are tracked, as in `GradTrace`.
        every_n_steps: as in `GradTrace`.
        n_positions: positions of a sample's sequence, for Factored; None predicts the most that Factored takes.
        gains: whether the optimizer scales every weight on its own, as Adam does, for Factored.

    Returns:
        One row per array: ``record`` ("core" for params, steps, occurrences and metadata), ``array``, ``rows``,
        ``raw_bytes`` and ``bytes`` on disk. Their sum is the size of the trace, without inputs and weight snapshots.

    Raises:
        ValueError: ``n_steps`` or ``n_samples`` is no whole number, or negative.

    Example::

        >>> from lightning_gradtrace.record import Dense, TopK
        >>> table = plan(nn.Sequential(nn.Linear(100, 50)), [TopK(10), Dense()], n_steps=100, n_samples=8)
        >>> int(table.loc[table["array"] == "dense/0.weight/shift", "raw_bytes"].iloc[0])
        16000000
    """
    for name, value in (("n_steps", n_steps), ("n_samples", n_samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"`plan({name}={value!r})`: expected a whole number, at least 0")
    infos = parameter_infos(select_parameters(model, params)) if isinstance(model, nn.Module) else list(model)
    listed = [records] if isinstance(records, Record) else list(records)
    steps = [n for n in range(0, n_steps, every_n_steps) if any(record.due(n) for record in listed)]
    size = _measure(infos, max(1, n_samples))
    lines = []
    for name, spec, n in _arrays(infos, listed, steps, n_positions, gains):
        rows = n * (n_samples if spec.axis == "occurrence" else 1)
        raw = rows * np.dtype("O" if spec.dtype == "str" else spec.dtype).itemsize * math.prod(spec.shape_tail)
        lines.append((name, spec.path, rows, raw, round(size(spec, rows) * _share(spec))))
    documents = metadata_bytes([spec for _, spec, _ in _arrays(infos, listed, [], n_positions, gains)])
    lines.append(("core", "zarr.json", 0, 0, documents + ATTRIBUTE_BYTES))
    return pd.DataFrame(lines, columns=["record", "array", "rows", "raw_bytes", "bytes"])


def _arrays(
    infos: Sequence[ParameterInfo],
    records: Sequence[Record],
    steps: Sequence[int],
    n_positions: int | None,
    gains: bool,
) -> Iterator[tuple[str, ArraySpec, int]]:
    """Yield the record, the array, and how many params, steps, or steps' occurrences have rows in it."""
    for spec in PARAM_SPECS:
        yield "core", spec, len(infos)
    for spec in (*STEP_SPECS, *OCCURRENCE_SPECS):
        yield "core", replace(spec, shape_tail=(1,)) if ON_OPEN in spec.shape_tail else spec, len(steps)
    for record in records:
        due = sum(record.due(step) for step in steps)
        record = copy.copy(record)  # of a run that may be under way
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said about the arguments is said when the run begins
            specs = record.arrays(infos)
        if isinstance(record, Factored):
            specs = [*specs, *(spec for info in infos for spec in record.planned(info, n_positions, gains))]
        for spec in specs:
            yield type(record).__name__, spec, due


def _measure(infos: Sequence[ParameterInfo], n_samples: int) -> _Size:
    """Return a function of an array and its number of rows: bytes on disk."""
    known: dict[object, float] = {}

    def size(spec: ArraySpec, rows: int) -> float:
        if not rows:
            return 0.0
        spec = replace(spec, grows=False, shape_tail=tuple(max(1, n) for n in spec.shape_tail))
        if spec.codec == "none":
            return uncompressed_bytes(spec, rows)
        item = np.dtype("O" if spec.dtype == "str" else spec.dtype).itemsize
        row = item * math.prod(spec.shape_tail)
        most = SAMPLE_BYTES // row
        if spec.dims[1:] == ("k",):
            most = min(most, MOST_DRAWS // (n_samples if spec.axis == "step" else 1))
        # Values of one type that fill their mantissa compress alike in all large arrays.
        drawn = spec.codec in _OF_FLOATS and "k" not in spec.dims
        if rows <= (most if drawn else max(1, most)):
            return _encoded(spec, rows, infos, n_samples)
        alike = (spec.dtype, spec.attrs.get("keep_bits"), spec.codec, spec.group == "norms") if drawn else spec.path
        if alike not in known:
            few, sample = (_flat(spec, row), 1) if drawn else (spec, max(1, most))
            some = replace(few, chunk_rows=sample, inner_rows=None)
            raw = sample * item * math.prod(some.shape_tail)
            known[alike] = _encoded(some, sample, infos, n_samples) / raw
        return known[alike] * rows * row + padding_bytes(spec, rows)

    return size


def _share(spec: ArraySpec) -> float:
    """Return what part of the size of made-up rows those of a run are expected to take."""
    if spec.codec == "index":
        return INDEX_SHARE
    return FACTOR_SHARE if spec.codec == "float" and spec.path.startswith(("factored/", "factored_rows/")) else 1.0


def _flat(spec: ArraySpec, row: int) -> ArraySpec:
    """Turn the rows of an array into one row of as many numbers as a sample has."""
    numbers = SAMPLE_BYTES * math.prod(spec.shape_tail) // row
    return replace(spec, dims=(spec.axis, "number"), shape_tail=(numbers,))


def _encoded(spec: ArraySpec, rows: int, infos: Sequence[ParameterInfo], n_samples: int) -> int:
    """Make rows up and encode them as the store does."""
    values = made_up_rows(spec, rows, infos, n_samples)
    if "keep_bits" in spec.attrs:
        from lightning_gradtrace.record.dense import round_bits

        values = round_bits(values, spec.attrs["keep_bits"])
    buffer = ArrayBuffer(spec)
    return _length([*buffer.append(values), *buffer.tail()])


def _length(puts: Iterable[Put]) -> int:
    return sum(len(part) for _, parts in puts for part in parts)
