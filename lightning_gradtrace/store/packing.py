"""A trace as one zip file, which is read where it lies."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from zarr.core.sync import sync

from lightning_gradtrace.store.parts import PARTS
from lightning_gradtrace.store.target import ROOT, StoreError, read_key

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


MOST_BYTES = 2**31
"""Size over which an object is not packed; a chunk holds at most 1 GiB."""


def pack(trace: Trace, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Copy a trace into a zip file, which `open_trace` reads like a directory.

    Chunks are compressed already and are stored as they are. The file takes its name when it is whole and on the disk.

    Args:
        trace: the trace; what it had committed when it was opened, if it is still being written.
        path: where the file goes; ends in ``.zip``.
        overwrite: whether a file that is there may be replaced.

    Returns:
        The path.

    Raises:
        StoreError: if there is something at the path already, it has another ending, or a part of the trace is missing.
    """
    target = Path(path)
    if target.suffix != ".zip":
        raise StoreError(f"`{target}` doesn't end in .zip; expected a name that does, by which the file is opened")
    if target.exists() and not (overwrite and target.is_file()):
        raise StoreError(f"`{target}` exists; pass overwrite=True to replace the file, or choose another path")
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                # The root first read, last written: what it promises is in the store before.
                roots = [ROOT, *(f"{PARTS}/{rank}/{ROOT}" for rank in range(trace.attrs.get("ranks", 0)))]
                first = {key: read_key(trace.store, key) for key in roots}
                for key in sync(_keys(trace, sorted(trace.group.group_keys()))):
                    data = first[key] if key in first else read_key(trace.store, key, MOST_BYTES)
                    if data is None:
                        raise StoreError(f"`{key}` disappeared while the trace was packed; pack it when it is complete")
                    archive.writestr(key, data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


async def _keys(trace: Trace, groups: list[str]) -> list[str]:
    """List the objects of the trace: the root, and those of its groups."""
    keys = [ROOT]
    for group in groups:
        found = [key async for key in trace.store.list_prefix(f"{group}/")]
        keys += sorted(key for key in found if not key.endswith(".partial"))
    return keys
