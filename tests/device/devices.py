"""The devices that the tests here run on: a CUDA device, and one that machines without a card can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.device import pretend


@dataclass(frozen=True)
class Device:
    """A device, as a test needs it.

    Attributes:
        name: as torch calls it.
        trainer: arguments of a Trainer that trains on it, for a precision.
        forbid_waiting: from now on a program must not wait for the device.
        allow_waiting: it may again; an error, here or where it waited, says that it did.
    """

    name: str
    trainer: Callable[[str], dict[str, Any]]
    forbid_waiting: Callable[[], object]
    allow_waiting: Callable[[], object]


def _nothing_was_waited_for() -> None:
    found = pretend.take_waits()
    assert not found, f"the program would have waited for the device, for {found}"


CUDA = Device(
    "cuda",
    lambda precision: {"accelerator": "gpu", "precision": precision},
    lambda: torch.cuda.set_sync_debug_mode("error"),
    lambda: torch.cuda.set_sync_debug_mode("default"),
)
PRETEND = Device(pretend.NAME, pretend.trainer, pretend.take_waits, _nothing_was_waited_for)
