"""A trace of several ranks as an xarray DataTree."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_gradtrace.store.interop import need_xarray, with_coordinates

if TYPE_CHECKING:
    import xarray as xr

    from lightning_gradtrace.store.merged.trace import MergedTrace


def merged_tree(trace: MergedTrace) -> xr.DataTree:
    """Open the merged trace as a DataTree, as `lightning_gradtrace.store.interop.to_xarray` does with a single part.

    With dask installed arrays are read lazily, chunk by chunk; without it they are read when this is called.

    Args:
        trace: the trace.

    Returns:
        The tree.

    Raises:
        ImportError: if xarray is not installed.
    """
    need_xarray()
    import xarray as xr

    paths = sorted({path for part in trace.parts for path, _ in part.group.members(max_depth=None)})
    datasets: dict[str, Any] = {"/": xr.Dataset(attrs=trace.attrs)}
    for path in paths:
        array = next((part.group[path] for part in trace.parts if part.has(path)), None)
        if not hasattr(array, "dtype"):  # a group
            datasets.setdefault(f"/{path}", xr.Dataset())
            continue
        group, _, name = path.rpartition("/")
        merged = trace.checked(path)
        variable = xr.Variable(merged.dims, _lazy(merged), merged.attrs)
        place = f"/{group}"
        # As xarray does: an array with the name of its only axis is the index of that axis.
        kind = "assign_coords" if merged.dims == (name,) else "assign"
        datasets[place] = getattr(datasets.get(place, xr.Dataset()), kind)({name: variable})
    return xr.DataTree.from_dict({path: with_coordinates(trace, path, one) for path, one in datasets.items()})


def _lazy(array: Any) -> Any:
    if array.dtype.kind in "OTU" or importlib.util.find_spec("dask") is None:
        return array[:]
    import dask.array as da

    chunks = tuple(max(1, min(size, n)) for size, n in zip(array.chunks, array.shape, strict=True))
    return da.from_array(array, chunks=chunks, meta=None, asarray=True, fancy=False)
