"""The commit: what a reader sees moves from one whole step to a later one by one atomic put of the root document."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from zarr.abc.store import Store

from lightning_gradtrace.store.buffers import ArrayBuffer
from lightning_gradtrace.store.codecs import array_document, group_document
from lightning_gradtrace.store.opening import check_free, remove_groups
from lightning_gradtrace.store.schema import AXES, INPUT_SPECS, WEIGHT_STEP_SPEC, ArraySpec, weight_spec
from lightning_gradtrace.store.target import ROOT, StoreError, json_put, put_all, read_key, settle


class Committer:
    """All arrays of a trace that is being written, and the order in which they reach the store.

    A commit puts the chunks, then each array's own metadata, then (once these are on disk) the root document, which
    holds the number of committed rows of every axis and, as consolidated metadata, the shape of every array. Readers
    that start at the root therefore see whole committed steps, whatever has been put since.

    Args:
        store: where the trace goes.
        attrs: root attributes.
        specs: arrays that exist from the start, all lengths known.
    """

    def __init__(self, store: Store, attrs: dict[str, Any], specs: list[ArraySpec]) -> None:
        self._store = store
        self._attrs = dict(attrs)
        self._arrays: dict[str, ArrayBuffer] = {}
        self._on_disk: dict[str, dict[str, Any]] = {}
        self._groups: set[str] = set()
        self._members: dict[str, Any] = {}
        self._committed = dict.fromkeys(AXES, 0)
        self._roots: list[bytes] = []
        self.pending_bytes = 0
        self.last_commit = time.monotonic()
        self.seconds_of_commit = 0.0
        for spec in specs:
            self.add(spec)

    @property
    def committed(self) -> dict[str, int]:
        """Committed rows of every axis, and of every group with rows of its own."""
        return dict(self._committed)

    def add(self, spec: ArraySpec) -> None:
        """Declare one more array; the store learns of it with the next commit."""
        self._arrays[spec.path] = ArrayBuffer(spec)

    def append(self, rows: dict[str, np.ndarray]) -> None:
        """Add rows to arrays, by path; full chunks are put at once, and stay invisible until the commit."""
        put_all(self._store, (put for path, array in rows.items() for put in self._arrays[path].append(array)))
        self.pending_bytes += sum(array.nbytes for array in rows.values())

    def append_samples(self, sample_id: np.ndarray, tokens: np.ndarray, length: np.ndarray) -> None:
        """Add texts; declares the arrays of ``inputs/`` at the first call."""
        if "inputs/tokens" not in self._arrays:
            for spec in INPUT_SPECS:
                self.add(replace(spec, shape_tail=(max(64, tokens.shape[1]),)) if spec.grows else spec)
        self.append({"inputs/sample_id": sample_id, "inputs/length": length, "inputs/tokens": tokens})

    def append_weights(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Add a snapshot; declares the arrays of ``weights/`` at the first call."""
        specs = {name: weight_spec(name, value.shape, value.dtype.name) for name, value in values.items()}
        if WEIGHT_STEP_SPEC.path not in self._arrays:
            for spec in (WEIGHT_STEP_SPEC, *specs.values()):
                self.add(spec)
        rows = {specs[name].path: value[None] for name, value in values.items()}
        self.append({WEIGHT_STEP_SPEC.path: np.array([step]), **rows})

    def announce(self) -> None:
        """Put the root document of a trace without rows, so that the target counts as a trace."""
        documents = {path: array_document(array.spec, 0, None) for path, array in self._arrays.items()}
        self._replace_root(self.members_of(documents), dict.fromkeys(AXES, 0), {})

    @property
    def arrays(self) -> dict[str, ArrayBuffer]:
        """The arrays declared so far, by path."""
        return self._arrays

    @property
    def widths(self) -> dict[str, int]:
        """Columns of the arrays whose second axis grows, by path."""
        return {path: array.width for path, array in self._arrays.items() if array.width is not None}

    def cut(self, **attrs: Any) -> None:
        """Move the commit mark back to the rows that the arrays were restored with, before anything else is put."""
        documents = {path: array.document for path, array in self._arrays.items()}
        self._replace_root(self.members_of(documents), self._rows(), attrs)

    def commit(self, **attrs: Any) -> None:
        """Make everything appended so far visible, and set root attributes."""
        begun = time.monotonic()
        self._check_owner()  # before anything is put in the place of what may be somebody else's
        put_all(self._store, (put for array in self._arrays.values() for put in array.tail()))
        documents = {path: array.document for path, array in self._arrays.items()}
        new_groups = self._groups_of(documents) - self._groups
        changed = {path: document for path, document in documents.items() if self._on_disk.get(path) != document}
        changed |= {group: group_document() for group in new_groups}
        put_all(self._store, (json_put(f"{path}/{ROOT}", document) for path, document in changed.items()))
        self._on_disk |= changed
        self._groups |= new_groups
        self._replace_root(self.members_of(documents), self._rows(), attrs)
        self.pending_bytes = 0
        self.last_commit = time.monotonic()
        self.seconds_of_commit = self.last_commit - begun

    def mark(self, **attrs: Any) -> None:
        """Set root attributes and leave everything else as the last commit left it."""
        self._replace_root(self._members, self._committed, attrs)

    def _rows(self) -> dict[str, int]:
        committed = dict(self._committed)
        for array in self._arrays.values():
            if array.spec.own_rows or array.spec.axis in committed:
                committed[array.spec.counter] = array.n_rows
        return committed

    def _replace_root(self, members: dict[str, Any], committed: dict[str, int], attrs: dict[str, Any]) -> None:
        attrs = {**self._attrs, **attrs, "committed": committed}
        put = json_put(ROOT, {**group_document(attrs), **_consolidated(members)})
        self._check_owner()
        settle(self._store)
        # A put that fails may have been made all the same: both the old and the new document are then this writer's.
        self._roots = [*self._roots[-1:], b"".join(put[1])]
        put_all(self._store, [put])
        settle(self._store)
        self._attrs, self._members, self._committed = attrs, members, committed

    def _check_owner(self) -> None:
        """See whether somebody has taken the place: where no lock can be held, this is the best that can be done."""
        if self._roots:
            found = read_key(self._store, ROOT)
            if found not in self._roots:
                what = "removed" if found is None else "replaced"
                raise StoreError(
                    f"another run, or somebody, has {what} the trace `{self._store}` while this run was writing it; "
                    "expected one run for each path: choose another path for one of them"
                )

    @classmethod
    def members_of(cls, documents: dict[str, Any]) -> dict[str, Any]:
        """Return what the root lists: the documents of arrays, and those of the groups that hold them."""
        groups = {group: {**group_document(), **_consolidated({})} for group in cls._groups_of(documents)}
        # zarr expects the members of a group next to each other.
        return dict(sorted({**groups, **documents}.items()))

    @staticmethod
    def _groups_of(paths: Iterable[str]) -> set[str]:
        parents = (path.split("/")[:depth] for path in paths for depth in range(1, path.count("/") + 1))
        return {"/".join(parent) for parent in parents}


def metadata_bytes(specs: Iterable[ArraySpec]) -> int:
    """Return the size of all metadata documents of a trace with these arrays, without the root's own attributes."""
    documents = {spec.path: array_document(spec, 0) for spec in specs}
    members = Committer.members_of(documents)
    root = {**group_document(), **_consolidated(members)}
    groups = [group_document()] * (len(members) - len(documents))
    return sum(len(part) for one in (root, *documents.values(), *groups) for part in json_put("", one)[1])


def create_trace(
    store: Store,
    name: str,
    attrs: dict[str, Any],
    specs: list[ArraySpec],
    tables: dict[str, np.ndarray],
    overwrite: bool,
) -> Committer:
    """Begin a new trace, in the place of an old one if `overwrite` says so.

    Args:
        store: where the trace goes.
        name: of the store, for messages.
        attrs: root attributes.
        specs: arrays that exist from the start.
        tables: rows of those that are written once, by path.
        overwrite: whether an existing trace may be removed.

    Returns:
        The arrays, ready to be appended to.

    Raises:
        StoreError: if the store holds a trace that may not be overwritten, or something else.
    """
    old_groups = check_free(store, name, overwrite=overwrite)
    committer = Committer(store, attrs, specs)
    # From here on the store counts as a trace, though one without params and steps.
    committer.announce()
    remove_groups(store, old_groups)
    committer.append(tables)
    committer.commit()
    return committer


def _consolidated(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata}}
