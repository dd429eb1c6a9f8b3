"""A trace as an xarray DataTree."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_gradtrace.store.record_view import Rows
from lightning_gradtrace.store.schema import AXES

if TYPE_CHECKING:
    import xarray as xr

    from lightning_gradtrace.store.reader import Trace

_COORDINATES = ("step", "micro_batch", "slot", "rank", "sample_id")


def to_xarray(trace: Trace) -> xr.DataTree:
    """Open a trace as a DataTree, one node per group; nothing is read but the coordinates.

    Arrays along "occurrence" carry step, micro_batch, slot, rank and sample_id as coordinates, arrays along "step" the
    step's number. Records with rows of their own carry the occurrences that have one as the index of that axis. With
    dask installed arrays are chunked as in the store, without it they are read when indexed.

    Args:
        trace: the trace.

    Returns:
        The tree.

    Raises:
        ImportError: if xarray is not installed.
    """
    need_xarray()
    import xarray as xr

    chunks: dict[str, int] | None = {} if importlib.util.find_spec("dask") is not None else None
    store: Any = trace.store  # xarray hands it on to zarr, though its signature doesn't say so
    datasets = xr.open_groups(store, engine="zarr", chunks=chunks, zarr_format=3)
    return xr.DataTree.from_dict({path: with_coordinates(trace, path, one) for path, one in datasets.items()})


def need_xarray() -> None:
    """Raise if xarray is not installed.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("xarray") is None:
        raise ImportError("`to_xarray` needs xarray, which is not installed: pip install 'lightning-gradtrace[xarray]'")


def with_coordinates(trace: Trace, path: str, dataset: xr.Dataset) -> xr.Dataset:
    """Cut a group of a trace to its committed rows, and say which steps and occurrences these belong to.

    Args:
        trace: the trace.
        path: of the group.
        dataset: its arrays.
    """
    group, committed = path.strip("/"), trace.committed
    rows = {axis: committed.get(group, committed[axis]) for axis in AXES if axis in dataset.dims}
    dataset = dataset.isel({axis: slice(0, n) for axis, n in rows.items()})
    if path in ("/occurrences", "/steps"):
        return dataset
    if "occurrence" in dataset.dims:
        of_row = trace.occurrences.iloc[Rows(trace, group).labels]
        columns = {name: ("occurrence", of_row[name].to_numpy()) for name in _COORDINATES}
        dataset = dataset.assign_coords({name: column for name, column in columns.items() if name not in dataset})
    if "step" in dataset.dims and "step" not in dataset.coords:
        dataset = dataset.assign_coords(step=Rows(trace, group, "step").labels)
    return dataset
