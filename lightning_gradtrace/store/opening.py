"""Opening a target for writing or reading, and the errors that belong to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, ZipStore

from lightning_gradtrace.store.durable import DurableLocalStore
from lightning_gradtrace.store.schema import ENCODING_TYPE, ENCODING_VERSION
from lightning_gradtrace.store.target import (
    ROOT,
    StoreError,
    Target,
    describe,
    is_url,
    key_exists,
    read_key,
)
from lightning_gradtrace.store.validation import check_root

_HELP = "choose another path"


def check_free(store: Store, name: str, *, overwrite: bool) -> list[str]:
    """See whether a store has room for a new trace; nothing is changed yet.

    A trace that is there may be replaced when `overwrite` says so; anything else that is there never is.

    Args:
        store: a writable store.
        name: of the store, for messages.
        overwrite: whether an existing trace may be removed.

    Returns:
        The groups of the old trace, for `remove_groups`.

    Raises:
        StoreError: if the store holds a trace and may not be overwritten, holds something else, or can't be used.
    """
    try:
        attrs = _existing(store, name)
        if attrs is not None and not overwrite:
            state = "complete" if attrs.get("complete") else "incomplete"
            raise StoreError(
                f"`{name}` already holds a trace ({state}, {attrs.get('committed', {}).get('step', 0)} steps); "
                f"pass overwrite=True to replace it, or {_HELP}"
            )
        return [] if attrs is None else _groups_of_trace(store)
    except OSError as error:
        raise StoreError(_not_writable(name, error)) from error


def trace_root(store: Store, name: str) -> dict[str, Any] | None:
    """Return the checked root document of the trace in a store, None if the store is empty.

    Raises:
        StoreError: if it holds something else, or a damaged trace.
    """
    if _existing(store, name) is None:
        return None
    root: dict[str, Any] = json.loads(read_key(store, ROOT) or b"{}")
    try:
        check_root(root)
    except ValueError as error:
        raise StoreError(damaged(name, error)) from error
    return root


def remove_groups(store: Store, groups: Iterable[str]) -> None:
    """Remove groups or arrays of an old trace, after its root document was replaced; other people's files stay."""
    for group in groups:
        if isinstance(store, LocalStore):
            folder = store.root / group
            if folder.is_dir() and not folder.is_symlink() and folder.resolve().is_relative_to(store.root.resolve()):
                shutil.rmtree(folder)
        else:
            sync(store.delete_dir(group))


def _groups_of_trace(store: Store) -> list[str]:
    """Name the groups that the root of a trace lists and that are there: plain names only, and no links."""
    root = json.loads(read_key(store, ROOT) or b"{}")
    members = root.get("consolidated_metadata", {}).get("metadata", {})
    names = sorted({path.partition("/")[0] for path in members})
    names = [name for name in names if re.fullmatch(r"\w[\w.-]*", name) and key_exists(store, f"{name}/{ROOT}")]
    return [name for name in names if not (isinstance(store, LocalStore) and (store.root / name).is_symlink())]


def writable_store(target: Target) -> Store:
    """Open a target for writing; a directory that doesn't exist is made.

    Args:
        target: path, URL (fsspec) or zarr Store.

    Returns:
        A writable store.

    Raises:
        StoreError: if the target can't be written.
    """
    name = describe(target)
    if isinstance(target, ZipStore) or (not isinstance(target, Store) and name.endswith(".zip") and not is_url(target)):
        raise StoreError(
            f"`{name}` is a zip file, in which nothing can be replaced; write a directory and pack it afterwards: "
            "`open_trace(directory).to_zip(file)`"
        )
    if isinstance(target, Store):
        if target.read_only:
            raise StoreError(f"`{name}` is open read-only; expected a writable zarr Store")
        # A LocalStore handed over gets the same guarantees as its path.
        if type(target) is not LocalStore:
            return target
        target = target.root
    try:
        if is_url(target) and not name.startswith("file://"):
            return FsspecStore.from_url(name)
        path = Path(name.removeprefix("file://"))
        if path.exists() and not path.is_dir():
            raise StoreError(f"`{name}` exists and is a file, expected a directory or nothing; {_HELP}")
        return DurableLocalStore(path)
    except (OSError, ImportError, ValueError) as error:
        raise StoreError(_not_writable(name, error)) from error


def _not_writable(name: str, error: Exception) -> str:
    return f"`{name}` can't be written: {type(error).__name__}: {error}; {_HELP} or make it writable"


def _existing(store: Store, name: str) -> dict[str, Any] | None:
    """Return the attributes of the trace that is there, None if there is nothing."""
    data = read_key(store, ROOT)
    if data is not None:
        attributes = _attributes(data)
        if attributes is not None and attributes.get("encoding-type") == ENCODING_TYPE:
            return attributes
        found = "a Zarr hierarchy that is not a trace"
    else:
        entries = sync(_list_some(store))
        if not entries:
            return None
        found = "files that are not a trace, such as " + ", ".join(f"`{entry}`" for entry in entries)
    raise StoreError(f"`{name}` holds {found}; it is left as it is, also with overwrite=True: {_HELP}")


async def _list_some(store: Store, limit: int = 3) -> list[str]:
    entries: list[str] = []
    async for entry in store.list_dir(""):
        if not entry.endswith(".partial"):
            entries.append(entry)
        if len(entries) == limit:
            break
    return entries


def _attributes(data: bytes) -> dict[str, Any] | None:
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return attributes if isinstance(attributes, dict) else None


def open_store(target: Target) -> tuple[Store, dict[str, Any]]:
    """Open the trace at a target for reading.

    Args:
        target: path, URL (fsspec), path of a zip file, or zarr Store.

    Returns:
        The store and its root document.

    Raises:
        StoreError: if there is no trace, or one that this version can't read.
    """
    name = describe(target)
    store = _readable(target, name)
    data = read_key(store, ROOT)
    expected = f"expected a Zarr group whose `encoding-type` is `{ENCODING_TYPE}`"
    if data is None:
        raise StoreError(f"`{name}` is not a trace: found no `{ROOT}` in it, {expected}")
    attributes = _attributes(data)
    if attributes is None:
        raise StoreError(f"`{name}` is not a trace: found a `{ROOT}` that can't be read, {expected}")
    if attributes.get("encoding-type") != ENCODING_TYPE:
        raise StoreError(
            f"`{name}` is not a trace: found `encoding-type` {attributes.get('encoding-type')!r}, {expected}"
        )
    version = str(attributes.get("encoding-version"))
    newest = ENCODING_VERSION.partition(".")[0]
    major, _, minor = version.partition(".")
    if not major.isdecimal() or len(major) > 9 or int(major) > int(newest):
        raise StoreError(
            f"`{name}` was written by format {version}, this package reads up to {newest}.x: "
            "upgrade lightning-gradtrace"
        )
    root = json.loads(data)
    try:
        check_root(root)
    except ValueError as error:
        later = minor.isdecimal() and len(minor) < 9 and int(minor) > int(ENCODING_VERSION.partition(".")[2])
        hint = f"; it has format {version}, this package knows {ENCODING_VERSION}: upgrade lightning-gradtrace"
        raise StoreError(damaged(name, error) + (hint if later else "")) from error
    return store, root


def damaged(name: str, error: Exception) -> str:
    """Say that metadata can't be."""
    return f"`{name}` has damaged metadata: {type(error).__name__}: {error}"


def _readable(target: Target, name: str) -> Store:
    if isinstance(target, Store):
        return target
    try:
        if is_url(target) and not name.startswith("file://"):
            return FsspecStore.from_url(name, read_only=True)
        path = Path(name.removeprefix("file://"))
        if not path.exists():
            raise StoreError(f"`{name}` does not exist; expected the directory of a trace")
        if path.suffix == ".zip" and path.is_file():
            return sync(ZipStore.open(path, mode="r"))
        if not path.is_dir():
            raise StoreError(f"`{name}` is not a directory; expected the directory of a trace")
        return LocalStore(path, read_only=True)
    except (OSError, ImportError, ValueError) as error:
        raise StoreError(f"`{name}` can't be opened: {type(error).__name__}: {error}") from error
