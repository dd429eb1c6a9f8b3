"""The parts of a trace that several ranks write: each is a whole trace, under ``ranks/<rank>`` of the root."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from typing_extensions import override
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from lightning_gradtrace.store.opening import open_store
from lightning_gradtrace.store.target import StoreError, Target, describe, is_url
from lightning_gradtrace.store.writer import TraceWriter

PARTS = "ranks"
"""Group of the root that holds the parts."""


def part_target(target: Target, rank: int) -> Target:
    """Return where a rank writes its part.

    Example:
        >>> part_target("s3://bucket/a.zarr", 1)
        's3://bucket/a.zarr/ranks/1'

    Args:
        target: path, URL (fsspec) or zarr Store of the whole trace.
        rank: number of the rank.
    """
    if isinstance(target, Store):
        return part_store(target, rank)
    return f"{describe(target).rstrip('/')}/{PARTS}/{rank}" if is_url(target) else Path(target) / PARTS / str(rank)


def part_store(store: Store, rank: int) -> Store:
    """Return the store that holds the part of a rank, inside the store that holds the whole trace."""
    place = f"{PARTS}/{rank}"
    if isinstance(store, LocalStore):
        return LocalStore(store.root / place, read_only=store.read_only)
    if isinstance(store, FsspecStore):
        return FsspecStore(store.fs, read_only=store.read_only, path=f"{store.path.rstrip('/')}/{place}")
    return InnerStore(store, place)


def check_shared(target: Target, run_id: str | None) -> None:
    """See that this process finds what rank 0 has written: the root that holds the parts of all ranks.

    Memory belongs to one process, and a disk to one machine.

    Args:
        target: path, URL (fsspec) or zarr Store of the whole trace.
        run_id: of the run that has begun it.

    Raises:
        StoreError: if there is no root, or that of another run.
    """
    try:
        found = open_store(target)[1]["attributes"].get("run_id")
    except StoreError as error:
        found = error
    if isinstance(found, StoreError) or found != run_id:
        raise StoreError(
            f"`{describe(target)}` does not hold what rank 0 has just written there ({found}); expected a place that "
            "all processes share: a directory that every machine mounts, or a URL of an object store; not memory"
        )


class InnerStore(Store):
    """A place inside another store: every key gets a prefix. For stores that can't be opened at such a place.

    Args:
        store: the store.
        place: what keys begin with, without a slash at its end.
    """

    def __init__(self, store: Store, place: str) -> None:
        super().__init__(read_only=store.read_only)
        self._outer, self._prefix = store, f"{place}/"

    def __str__(self) -> str:
        """Name the store and the place inside it."""
        return f"{self._outer}/{self._prefix.rstrip('/')}"

    def __eq__(self, other: object) -> bool:
        """Say whether it is the same place of an equal store."""
        return isinstance(other, InnerStore) and (self._outer, self._prefix) == (other._outer, other._prefix)

    @override
    def with_read_only(self, read_only: bool = False) -> InnerStore:
        return InnerStore(self._outer.with_read_only(read_only), self._prefix.rstrip("/"))

    @property
    @override
    def supports_writes(self) -> bool:
        return self._outer.supports_writes

    @property
    @override
    def supports_deletes(self) -> bool:
        return self._outer.supports_deletes

    @property
    @override
    def supports_listing(self) -> bool:
        return self._outer.supports_listing

    @override
    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        return await self._outer.get(self._prefix + key, prototype, byte_range)

    @override
    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        return await self._outer.get_partial_values(prototype, [(self._prefix + key, part) for key, part in key_ranges])

    @override
    async def exists(self, key: str) -> bool:
        return await self._outer.exists(self._prefix + key)

    @override
    async def set(self, key: str, value: Any) -> None:
        await self._outer.set(self._prefix + key, value)

    @override
    async def delete(self, key: str) -> None:
        await self._outer.delete(self._prefix + key)

    @override
    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    @override
    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._outer.list_prefix(self._prefix + prefix):
            yield key.removeprefix(self._prefix)

    @override
    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in self._outer.list_dir((self._prefix + prefix).rstrip("/")):
            yield name


class PartWriter(TraceWriter):
    """Writes the part of one rank.

    Attributes:
        root: on rank 0, the writer of the root, which holds the place for all ranks and ends with this one.
    """

    root: TraceWriter | None = None

    @override
    def close(self, *, complete: bool, end_reason: str | None = None) -> None:
        try:
            super().close(complete=complete, end_reason=end_reason)
        except BaseException:
            complete = False
            raise
        finally:
            if self.root is not None:
                self.root.close(complete=complete, end_reason=end_reason)
