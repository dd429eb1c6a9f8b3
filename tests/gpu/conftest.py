"""Everything here needs a CUDA device: deselected unless asked for by `-m gpu`, and then it fails without one."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
KNOWN = (
    "GPU available but not used",  # Lightning, where a test trains on the CPU to compare
    "Synchronization debug mode is a prototype feature",
    "RNN module weights are not part of single contiguous chunk",  # of the copy of a model that the oracle runs
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            for message in KNOWN:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
