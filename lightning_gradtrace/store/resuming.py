"""Going on with a trace where a checkpoint was made: it is compared, cut back, and appended to.

The cut is safe at every point. First the root document is replaced by one with fewer rows, in one atomic step; from
then on a reader sees what the checkpoint saw. Only then are chunks beyond it removed and half-full ones rewritten. A
run that is killed in between leaves chunks that nobody reads, and the next cut removes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync

from lightning_gradtrace.store.buffers import ArrayBuffer
from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.commit import Committer
from lightning_gradtrace.store.cursor import Cursor
from lightning_gradtrace.store.opening import remove_groups, trace_root
from lightning_gradtrace.store.reading import read_rows
from lightning_gradtrace.store.schema import INPUT_SPECS, WEIGHT_STEP_SPEC, ArraySpec, unescape, weight_spec
from lightning_gradtrace.store.tables import read_params
from lightning_gradtrace.store.target import StoreError

_MAY_DIFFER = ("on_error", "params")
"""Arguments of GradTrace that may change between runs; what `params` selects is compared as a table."""


def find_trace(store: Store, name: str, cursor: Cursor) -> dict[str, Any]:
    """Return the root document of the trace that a checkpoint belongs to.

    Args:
        store: where it should be.
        name: of the store, for messages.
        cursor: what the checkpoint says.

    Returns:
        The root document.

    Raises:
        StoreError: if there is no trace, one of another run, or one that ends before the checkpoint.
    """
    help_ = "restore it, resume from another checkpoint, or give `GradTrace` a new path to begin a new trace there"
    root = trace_root(store, name)
    step = cursor.rows["step"]
    if root is None:
        raise StoreError(f"`{name}` holds no trace, but the checkpoint belongs to one of {step} recorded steps: {help_}")
    attributes = root["attributes"]
    if attributes.get("run_id") != cursor.run_id:
        raise StoreError(
            f"`{name}` holds the trace of another run ({attributes.get('run_id')}), the checkpoint belongs to run "
            f"{cursor.run_id}: {help_}"
        )
    committed = attributes["committed"]
    found = {axis: committed.get(axis, 0) for axis in cursor.rows}
    behind = [f"{n} along `{axis}`, found {found[axis]}" for axis, n in cursor.rows.items() if found[axis] < n]
    if behind:
        raise StoreError(
            f"`{name}` ends before the checkpoint, which expects rows: {'; '.join(behind)}. It may be an older copy: "
            f"{help_}"
        )
    return root


def differences(
    store: Store, root: Mapping[str, Any], specs: list[ArraySpec], table: Mapping[str, np.ndarray], attrs: Mapping[str, Any]
) -> list[str]:
    """List what distinguishes the run that wrote a trace from the one that wants to go on with it.

    Args:
        store: where the trace is.
        root: its root document.
        specs: arrays that the new run declares.
        table: params table of the new run, as arrays by path.
        attrs: root attributes of the new run.

    Returns:
        One text each; none if the runs agree.
    """
    found = []
    old = root["attributes"]
    for name in ("model", "quantity"):
        if old.get(name) != attrs.get(name):
            found.append(f"{name} was {old.get(name)}, is {attrs.get(name)}")
    found += _setting_differences(_settings(old), _settings(attrs))
    group = zarr.open_group(store, mode="r", zarr_format=3)
    before = read_params(group)
    was = dict(zip(before["param"], before["shape"], strict=True))
    now = dict(zip(table["params/name"].tolist(), map(_shape, table["params/shape"].tolist()), strict=True))
    for name in was.keys() | now.keys():
        if was.get(name) != now.get(name):
            found.append(f"parameter `{name}` was {_tracked(was.get(name))}, is {_tracked(now.get(name))}")
    if was == now and list(was) != list(now):
        found.append("the tracked parameters come in another order")
    members = root["consolidated_metadata"]["metadata"]
    for spec in specs:
        found += _array_differences(spec, members.get(spec.path))
    late = {spec.path for spec in INPUT_SPECS} | {spec.path for spec in specs}
    arrays = (path for path, member in members.items() if member["node_type"] == "array")
    found += [f"array `{path}` is missing" for path in arrays if path not in late and not path.startswith("weights/")]
    return sorted(found)


def _settings(attrs: Mapping[str, Any]) -> dict[str, Any]:
    config = attrs.get("config")
    settings = config.get("gradtrace") if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}


def _setting_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare the arguments of GradTrace; functions are written down with their address, which tells nothing."""
    found = []
    for name in was.keys() | now.keys():
        before, after = was.get(name), now.get(name)
        if name not in _MAY_DIFFER and before != after and " at 0x" not in f"{before}{after}":
            found.append(f"`{name}` was {before!r}, is {after!r}")
    return found


def _array_differences(spec: ArraySpec, old: dict[str, Any] | None) -> list[str]:
    if old is None:
        return [f"array `{spec.path}` is new"]
    new = array_document(spec, 0)
    pairs = {
        "type": (old["data_type"], new["data_type"]),
        "axes": (old["dimension_names"], new["dimension_names"]),
        "row shape": (old["shape"][1:], new["shape"][1:]),
        "chunks": (old["chunk_grid"], new["chunk_grid"]),
        "codecs": ([codec["name"] for codec in old["codecs"]], [codec["name"] for codec in new["codecs"]]),
    }
    return [f"{what} of `{spec.path}` was {was}, is {now}" for what, (was, now) in pairs.items() if was != now]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(json.loads(text))


def _tracked(shape: tuple[int, ...] | None) -> str:
    return "not tracked" if shape is None else f"tracked with shape {shape}"


@dataclass(frozen=True)
class Restored:
    """What a writer has to know of the rows that are there.

    Attributes:
        last_step: number of the last step, -1 for none.
        sample_ids: samples whose inputs are stored, int64, shape (samples,).
        weights: shape and type of each parameter in the snapshots, None without snapshots.
    """

    last_step: int
    sample_ids: np.ndarray
    weights: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None


def restore(committer: Committer, store: Store, root: Mapping[str, Any], cursor: Cursor) -> Restored:
    """Bring all arrays to where the cursor says, and cut the trace back to it.

    Args:
        committer: declares the arrays that exist from the start; those that came later are added here.
        store: where the trace is.
        root: its root document.
        cursor: where to.

    Returns:
        What the rows that are left say.
    """
    group = zarr.open_group(store, mode="r", zarr_format=3)
    members = root["consolidated_metadata"]["metadata"]
    for spec in _late_specs(members, cursor):
        committer.add(spec, grows=spec.path in cursor.widths)
    for path, array in committer.arrays.items():
        shape = members[path]["shape"]
        tail = (cursor.widths[path],) if path in cursor.widths else tuple(shape[1:])
        n_rows = cursor.rows.get(array.spec.axis, shape[0])
        _restore_array(array, group, n_rows, tail)
    n_steps, n_samples = cursor.rows["step"], cursor.rows.get("sample", 0)
    last_step = int(read_rows(group, "steps/step", n_steps - 1, n_steps)[0]) if n_steps else -1
    sample_ids = read_rows(group, "inputs/sample_id", 0, n_samples) if n_samples else np.empty(0, np.int64)
    committer.cut()
    stale = {path for path, member in members.items() if member["node_type"] == "array"} - committer.arrays.keys()
    remove_groups(store, sorted(stale))
    _remove_stale_chunks(store, committer.arrays)
    committer.commit()
    return Restored(last_step, sample_ids, _snapshot_types(committer.arrays))


def _snapshot_types(arrays: Mapping[str, ArrayBuffer]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None:
    found = {}
    for path, array in arrays.items():
        if path.startswith("weights/values/"):
            name = unescape(path.removeprefix("weights/values/"))
            found[name] = (array.spec.shape_tail, np.dtype(array.spec.dtype))
    return found or None


def _late_specs(members: Mapping[str, Any], cursor: Cursor) -> list[ArraySpec]:
    """Rebuild the declarations of arrays that are declared when they get their first rows."""
    specs = []
    if cursor.rows.get("sample"):
        width = members["inputs/tokens"]["chunk_grid"]["configuration"]["chunk_shape"][1]
        specs += [replace(s, shape_tail=(width,)) if s.path == "inputs/tokens" else s for s in INPUT_SPECS]
    if cursor.rows.get("snapshot"):
        specs.append(WEIGHT_STEP_SPEC)
        for path, member in members.items():
            if path.startswith("weights/values/"):
                name = unescape(path.removeprefix("weights/values/"))
                specs.append(weight_spec(name, tuple(member["shape"][1:]), member["data_type"]))
    return specs


def _restore_array(array: ArrayBuffer, group: zarr.Group, n_rows: int, tail: tuple[int, ...]) -> None:
    start = n_rows - n_rows % array.spec.chunk_shape[0]
    # Only arrays that can get more rows need those of their last chunk.
    last = read_rows(group, array.spec.path, start, n_rows, lambda region: region[1].start > 0)
    array.restore(n_rows, tail, last[(slice(None), *(slice(0, n) for n in tail))])


def _remove_stale_chunks(store: Store, arrays: Mapping[str, ArrayBuffer]) -> None:
    """Remove chunks beyond the rows and columns that are left: a wider text would make old columns visible again."""

    async def remove() -> None:
        for path, array in arrays.items():
            counts = array.chunk_counts
            for key in [key async for key in store.list_prefix(f"{path}/c/")]:
                place = key.removeprefix(f"{path}/c/").split("/")
                if len(place) == len(counts) and all(part.isdecimal() for part in place):
                    if any(int(part) >= count for part, count in zip(place, counts, strict=True)):
                        await store.delete(key)

    sync(remove())
