"""Shared by the tests of the documentation."""

from __future__ import annotations

import pytest

from tests.examples.conftest import run_experiment as run_experiment


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait for the disk: only a power loss tells the difference."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
