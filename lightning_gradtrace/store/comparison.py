"""Whether a trace may be resumed: it must be the one of the checkpoint, and the new run must record the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from lightning_gradtrace.store.chunk_keys import CHUNK_KEYS
from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.cursor import Cursor
from lightning_gradtrace.store.opening import trace_root
from lightning_gradtrace.store.schema import AXES, ENCODING_VERSION, INPUT_SPECS, STEP_SPECS, ArraySpec
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
        raise StoreError(
            f"`{name}` holds no trace, but the checkpoint belongs to one of {step} recorded steps: {help_}"
        )
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
    store: Store,
    root: Mapping[str, Any],
    specs: list[ArraySpec],
    table: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
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
    if any(member.get("chunk_key_encoding", CHUNK_KEYS) != CHUNK_KEYS for member in members.values()):
        version = old.get("encoding-version")
        found.append(f"the files of chunks have the names of format {version}, this package writes {ENCODING_VERSION}")
    for spec in specs:
        if spec in STEP_SPECS and spec.path not in members:
            version = old.get("encoding-version")
            found.append(f"`{spec.path}` is not in format {version}, this package writes {ENCODING_VERSION}")
            continue
        found += _array_differences(spec, members.get(spec.path))
    late = {spec.path for spec in INPUT_SPECS} | {spec.path for spec in specs}
    arrays = (path for path, member in members.items() if member["node_type"] == "array")
    # Groups with rows of their own may have been declared by the data of a step.
    own = root["attributes"]["committed"].keys() - set(AXES) | {"weights", "weights/values"}
    found += [
        f"array `{path}` is missing" for path in arrays if path not in late and path.rpartition("/")[0] not in own
    ]
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
        "attributes": (old["attributes"], new["attributes"]),
        "codecs": (_codec_names(old["codecs"]), _codec_names(new["codecs"])),
    }
    return [f"{what} of `{spec.path}` was {was}, is {now}" for what, (was, now) in pairs.items() if was != now]


def _codec_names(codecs: list[dict[str, Any]]) -> list[str]:
    """Name codecs, those inside shards too; their settings may change, since chunks tell them."""
    names = []
    for codec in codecs:
        names += [codec["name"], *_codec_names(codec.get("configuration", {}).get("codecs", []))]
    return names


def _shape(text: str) -> tuple[int, ...]:
    return tuple(json.loads(text))


def _tracked(shape: tuple[int, ...] | None) -> str:
    return "not tracked" if shape is None else f"tracked with shape {shape}"
