"""Shared by the tests of the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_gradtrace.store import Trace
from tests.synthetic import write_trace


@pytest.fixture(autouse=True)
def quick_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait for the disk: only a power loss tells the difference, and `test_durability` asserts the order."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def make_trace(tmp_path: Path) -> Callable[..., Trace]:
    def make(name: str = "a.zarr", **options: Any) -> Trace:
        return write_trace(tmp_path / name, **options)

    return make
