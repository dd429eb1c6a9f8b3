"""Tests on a device. Every one that takes `device` runs twice: on CUDA (`-m gpu`) and on a made-up one (`-m pretend`).

Both are deselected unless asked for. The tests for CUDA fail where there is none. The made-up device is for a process
of its own: once it is there, torch takes it for the accelerator.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device import pretend
from tests.device.devices import CUDA, PRETEND, Device

HERE = Path(__file__).parent
KNOWN = (
    "GPU available but not used",  # Lightning, where a test trains on the CPU to compare
    "Synchronization debug mode is a prototype feature",
    "RNN module weights are not part of single contiguous chunk",  # of the copy of a model that the oracle runs
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = [pytest.param(CUDA, marks=pytest.mark.gpu), pytest.param(PRETEND, marks=pytest.mark.pretend)]
        metafunc.parametrize("device", devices, ids=[CUDA.name, PRETEND.name], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """A device to run on."""
    found: Device = request.param
    if found is PRETEND:
        pretend.load()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            if not item.get_closest_marker("pretend"):
                item.add_marker(pytest.mark.gpu)
            for message in KNOWN:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
