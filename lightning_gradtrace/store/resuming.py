"""Going on with a trace where a checkpoint was made: it is compared, cut back, and appended to.

The cut is safe at every point. First the root document is replaced by one with fewer rows, in one atomic step; from
then on a reader sees what the checkpoint saw. Only then are chunks beyond it removed and half-full ones rewritten. A
run that is killed in between leaves chunks that nobody reads, and the next cut removes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync

from lightning_gradtrace.store.buffers import ArrayBuffer
from lightning_gradtrace.store.chunk_keys import place_of
from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.commit import Committer
from lightning_gradtrace.store.comparison import differences, find_trace
from lightning_gradtrace.store.cursor import Cursor
from lightning_gradtrace.store.opening import remove_groups
from lightning_gradtrace.store.reading import read_rows
from lightning_gradtrace.store.schema import AXES, ArraySpec, Codec, unescape
from lightning_gradtrace.store.target import StoreError


@dataclass(frozen=True)
class Restored:
    """What a writer has to know of the rows that are there.

    Attributes:
        last_step: number of the last step, -1 for none.
        sample_ids: samples whose inputs are stored, int64, shape (samples,).
        weights: shape and type of each parameter in the snapshots, None without snapshots.
        records: arrays of records that the data of a step declared.
    """

    last_step: int
    sample_ids: np.ndarray
    weights: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None
    records: dict[str, ArraySpec]


def resume_trace(
    store: Store,
    name: str,
    attrs: Mapping[str, Any],
    specs: list[ArraySpec],
    table: Mapping[str, np.ndarray],
    cursor: Cursor,
) -> tuple[Committer, Restored]:
    """Compare a trace with the run that wants to go on with it, and cut it back.

    Args:
        store: where the trace is.
        name: of the store, for messages.
        attrs: root attributes of the new run; those of the trace are kept.
        specs: arrays that the new run declares.
        table: params table of the new run, as arrays by path.
        cursor: where to go on.

    Returns:
        The arrays, ready to be appended to, and what the rows that are left say.

    Raises:
        StoreError: if the trace is not the one, or the runs differ; the message lists the differences.
    """
    root = find_trace(store, name, cursor)
    found = differences(store, root, specs, table, attrs)
    if found:
        raise StoreError(
            f"the trace `{name}` can't be resumed, this run differs from the one that began it:\n  - "
            + "\n  - ".join(found)
            + "\nResume with what the trace was begun with, or give `GradTrace` a new path to begin a new trace"
        )
    begun = {key: value for key, value in root["attributes"].items() if key != "committed"}
    resumed = {"steps": cursor.rows["step"], "versions": attrs.get("versions")}
    begun |= {"complete": False, "end_reason": None, "resumed": [*begun.get("resumed", []), resumed]}
    committer = Committer(store, begun, specs)
    return committer, _restore(committer, store, root, cursor)


def _restore(committer: Committer, store: Store, root: Mapping[str, Any], cursor: Cursor) -> Restored:
    """Bring all arrays to where the cursor says, those that were declared later too, and cut the trace back to it."""
    group = zarr.open_group(store, mode="r", zarr_format=3)
    members = root["consolidated_metadata"]["metadata"]
    late = _late_specs(members, committer.arrays.keys(), cursor)
    for spec in late:
        committer.add(spec)
    for path, array in committer.arrays.items():
        shape = members[path]["shape"]
        tail = (cursor.widths[path], *shape[2:]) if array.spec.grows else tuple(shape[1:])
        n_rows = cursor.rows.get(array.spec.counter, 0 if array.spec.own_rows else shape[0])
        _restore_array(array, group, n_rows, tail)
    n_steps, n_samples = cursor.rows["step"], cursor.rows.get("sample", 0)
    last_step = int(read_rows(group, "steps/step", n_steps - 1, n_steps)[0]) if n_steps else -1
    sample_ids = read_rows(group, "inputs/sample_id", 0, n_samples) if n_samples else np.empty(0, np.int64)
    committer.cut()
    stale = {path for path, member in members.items() if member["node_type"] == "array"} - committer.arrays.keys()
    remove_groups(store, sorted(stale))
    _remove_stale_chunks(store, committer.arrays)
    committer.commit()
    records = {spec.path: spec for spec in late if spec.own_rows}
    return Restored(last_step, sample_ids, _snapshot_types(committer.arrays), records)


def _snapshot_types(arrays: Mapping[str, ArrayBuffer]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None:
    found = {}
    for path, array in arrays.items():
        if path.startswith("weights/values/"):
            name = unescape(path.removeprefix("weights/values/"))
            found[name] = (array.spec.shape_tail, np.dtype(array.spec.dtype))
    return found or None


def _late_specs(members: Mapping[str, Any], known: Collection[str], cursor: Cursor) -> list[ArraySpec]:
    """Rebuild the declarations of arrays that were declared with their first rows, of those that had any by then."""
    specs = []
    for path, member in members.items():
        if member["node_type"] != "array" or path in known:
            continue
        group, axis = path.rpartition("/")[0], member["dimension_names"][0]
        own = group in cursor.rows and group not in AXES
        if cursor.rows.get(group if own else axis) and (own or axis in ("sample", "snapshot")):
            specs.append(_spec_of(path, member, own, path in cursor.widths))
    return specs


def _spec_of(path: str, document: Mapping[str, Any], own_rows: bool, grows: bool) -> ArraySpec:
    """Rebuild the declaration of an array from its metadata.

    Raises:
        StoreError: if this package would write other metadata.
    """
    attributes = dict(document["attributes"])
    chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
    fill = document["fill_value"]
    spec = ArraySpec(
        path,
        tuple(document["dimension_names"]),
        (chunks[1], *document["shape"][2:]) if grows else tuple(document["shape"][1:]),
        "str" if document["data_type"] == "string" else document["data_type"],
        attributes.pop("long_name", ""),
        attributes.pop("units", ""),
        chunk_rows=chunks[0],
        own_rows=own_rows,
        grows=grows,
        fill=math.nan if fill == "NaN" else fill,
        attrs=attributes,
    )
    for codec in get_args(Codec):
        found = replace(spec, codec=codec)
        if array_document(found, document["shape"][0], tuple(document["shape"][1:])) == document:
            return found
    raise StoreError(
        f"`{path}` was written by another version of this package, which stored it otherwise; expected the version "
        "that began the trace: resume with that one, or give `GradTrace` a new path"
    )


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
            for key in [key async for key in store.list_prefix(f"{path}/")]:
                place = place_of(path, key)
                if place is None or len(place) != len(counts):
                    continue
                if any(number >= count for number, count in zip(place, counts, strict=True)):
                    await store.delete(key)

    sync(remove())
