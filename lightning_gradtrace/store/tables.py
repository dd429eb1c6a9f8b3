"""Tables of a trace, from the arrays of ``params/``, ``steps/`` and ``occurrences/``."""

from __future__ import annotations

import json
from typing import cast

import numpy as np
import pandas as pd
import zarr

from lightning_gradtrace.store.params import check_numbering
from lightning_gradtrace.store.reading import read_rows
from lightning_gradtrace.store.schema import OCCURRENCE_SPECS, PARAM_SPECS, STEP_SPECS, ArraySpec
from lightning_gradtrace.store.target import StoreError


def read_params(group: zarr.Group) -> pd.DataFrame:
    """Read the tracked parameters.

    Args:
        group: root of the trace.

    Returns:
        Columns param, shape (tuples), numel, offset, kind, module.

    Raises:
        StoreError: if the table is damaged: columns of different lengths, or entries that are not numbered through.
    """
    columns: dict[str, object] = {}
    for spec in PARAM_SPECS:
        values = read_rows(group, spec.path)
        if spec.name == "shape":
            columns["shape"] = [_shape(str(value)) for value in values]
        else:
            columns[spec.name] = [str(value) for value in values] if spec.dtype == "str" else values
    if len({len(cast("list[object]", column)) for column in columns.values()}) != 1:
        raise StoreError("the columns of `params/` have different lengths; expected one row for each parameter")
    table = pd.DataFrame(columns).rename(columns={"name": "param"})
    try:
        check_numbering(table)
    except ValueError as error:
        raise StoreError(f"`params/` is damaged: {error}") from error
    return table


def read_steps(group: zarr.Group, n_steps: int) -> pd.DataFrame:
    """Read the committed steps.

    Args:
        group: root of the trace.
        n_steps: committed rows.

    Returns:
        The columns of ``steps/`` by number of the step; learning rates of further parameter groups as lr_1, lr_2, ...,
        and so their momentum. A column that a trace of an earlier version lacks holds padding.
    """
    columns: dict[str, np.ndarray] = {}
    for spec in STEP_SPECS:
        # Only arrays that a later minor version added may be missing.
        known = spec.path in group or spec.name == "step"
        values = read_rows(group, spec.path, 0, n_steps) if known else _padding(spec, n_steps)
        if spec.dims[1:] == ("group",):
            columns |= {f"{spec.name}_{i}" if i else spec.name: values[:, i] for i in range(values.shape[1])}
        else:
            columns[spec.name] = values
    return pd.DataFrame(columns).set_index("step")


def read_occurrences(group: zarr.Group, n_occurrences: int) -> pd.DataFrame:
    """Read the committed occurrences.

    Args:
        group: root of the trace.
        n_occurrences: committed rows.

    Returns:
        Columns step, micro_batch, slot, rank, sample_id, by number of the occurrence.
    """
    columns = {spec.name: read_rows(group, spec.path, 0, n_occurrences) for spec in OCCURRENCE_SPECS}
    return pd.DataFrame(columns).rename_axis("occurrence")


def locate_entries(params: pd.DataFrame, entry_numbers: np.ndarray) -> pd.DataFrame:
    """Say which weights global entry numbers stand for.

    Example:
        >>> params = pd.DataFrame({"param": ["a", "b"], "offset": [0, 6], "numel": [6, 4]})
        >>> locate_entries(params, np.array([5, 6])).to_dict("list")
        {'param': ['a', 'b'], 'index': [5, 0]}

    Args:
        params: table of the tracked parameters.
        entry_numbers: shape (n,).

    Returns:
        Columns param (categorical, in the order of `params`) and index (flat, inside the parameter).

    Raises:
        IndexError: if a number is out of range.
    """
    numbers = np.asarray(entry_numbers).astype(np.int64, copy=False)
    n_entries = int(params["numel"].sum())
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < n_entries):
        raise IndexError(
            f"entries {numbers.min()} to {numbers.max()} were asked for; the trace has 0 to {n_entries - 1}"
        )
    offset = params["offset"].to_numpy()
    code = np.searchsorted(offset, numbers, side="right") - 1
    param = pd.Categorical.from_codes(code, categories=pd.Index(params["param"]))
    return pd.DataFrame({"param": param, "index": numbers - offset[code] if len(numbers) else numbers})


def _shape(text: str) -> tuple[int, ...]:
    """Read the shape of a parameter."""
    try:
        shape = json.loads(text)
        if isinstance(shape, list) and all(isinstance(n, int) and 0 <= n < 2**62 for n in shape):
            return tuple(shape)
    except (ValueError, RecursionError):
        pass
    raise StoreError(f"`params/shape` holds {text[:40]!r}; expected a shape, as JSON: the trace is damaged")


def _padding(spec: ArraySpec, n_rows: int) -> np.ndarray:
    return np.full((n_rows, *(1 for _ in spec.shape_tail)), spec.fill_value, spec.dtype)
