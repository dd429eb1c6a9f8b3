"""Stores that fail or stop on purpose."""

from __future__ import annotations

from typing import Any

from zarr.storage import MemoryStore


class Killed(BaseException):
    """The process ends here, as far as the store can tell."""


class StoppingStore(MemoryStore):
    """Takes a number of changes (puts and removals); from then on every change is a kill.

    Args:
        store_dict: what is in the store from the start; belongs to the store.
        changes: how many changes are taken.
    """

    def __init__(self, store_dict: Any = None, changes: int = 10**9, *, read_only: bool = False) -> None:
        super().__init__(store_dict, read_only=read_only)
        self.room = changes
        self.n_changes = 0

    def _change(self) -> None:
        if self.n_changes >= self.room:
            self._fail()
        self.n_changes += 1

    def _fail(self) -> None:
        raise Killed

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        self._change()
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        self._change()
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        self._change()
        await super().delete_dir(prefix)

    @property
    def objects(self) -> dict[str, Any]:
        """What a process that comes after the kill finds."""
        return dict(self._store_dict)


class FullOnceStore(StoppingStore):
    """Has no room for one change; then somebody has made room."""

    def _fail(self) -> None:
        self.room = 10**9
        raise OSError(28, "No space left on device")
