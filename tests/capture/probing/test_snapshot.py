"""Whatever a run assigns to a module - tensors, layers, numbers - stands there as before when the training goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.probing.snapshot import undisturbed


class Queue(nn.Module):
    """Has a pointer and rows, as a queue of negatives, in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.memory = nn.Module()
        self.memory.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.memory.register_buffer("rows", torch.randn(4, 2), persistent=False)


def moved_on(m: Queue) -> None:
    m.memory.pointer = (m.memory.pointer + 1) % 4


def written_and_moved_on(m: Queue) -> None:
    m.memory.rows[0] = 7.0
    m.memory.pointer += 1
    m.memory.rows = m.memory.rows.roll(1, 0)


def other_weights(m: Queue) -> None:
    m.layer.weight = nn.Parameter(m.layer.weight + 1)
    m.layer.bias = None


def another_layer(m: Queue) -> None:
    m.layer = nn.Linear(2, 2)
    m.more = nn.Linear(2, 2)


def taken_away(m: Queue) -> None:
    del m.layer, m.memory.rows
    m.memory.register_buffer("count", torch.ones(1))


@pytest.mark.parametrize("change", [moved_on, written_and_moved_on, other_weights, another_layer, taken_away])
@pytest.mark.parametrize("runs", [1, 2])
def test_names_lead_to_what_they_led_to(change: Callable[[Queue], None], runs: int) -> None:
    model = Queue()
    tensors = {name: (t, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    kept = [*model.state_dict()]
    parts = list(model.named_modules())
    with undisturbed(model) as before:
        for _ in range(runs):
            change(model)
            before.restore()
    assert list(model.named_modules()) == parts and [*model.state_dict()] == kept
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(now) == list(tensors)
    for name, (tensor, value) in tensors.items():
        assert now[name] is tensor and torch.equal(tensor, value), name
