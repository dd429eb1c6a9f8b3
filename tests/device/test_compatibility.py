"""The table of docs/compatibility.md on a device: every share equals the oracle's there too."""

from __future__ import annotations

import pytest

from tests.compatibility.cells import SETUPS, Setup, run
from tests.compatibility.models import ENTRIES, Entry
from tests.compatibility.transformers_models import TRANSFORMERS
from tests.device.devices import Device

ALL = [*ENTRIES, *TRANSFORMERS]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_every_share_of_every_parameter_is_the_oracles(entry: Entry, setup: Setup, device: Device) -> None:
    assert run(entry, setup, device.trainer).result == "exact"
