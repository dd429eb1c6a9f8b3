"""Whatever a run assigns to a module - tensors, layers, numbers - stands there as before when the training goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.probing.memory import Memory
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


@pytest.mark.parametrize("keeps_mode", [True, False])
def test_what_talks_with_other_processes_does_not_train(keeps_mode: bool) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(2), nn.BatchNorm1d(2))
    with undisturbed(model, keeps_mode) as before:
        for _ in range(2):
            assert [part.training for part in model] == [False, keeps_mode]
            before.restore()
    assert [part.training for part in model] == [True, True]


def test_memory_is_recalled_by_copies() -> None:
    model = Queue()
    model.hidden, model.log, model.big = [torch.ones(4, 2), None], {"a": (1, 2)}, list(range(10**6))
    model.learned, model.shared, model.memory.shared = torch.ones(2, requires_grad=True), model.hidden, model.hidden
    model.endless = []
    model.endless.append(model.endless)
    memory = Memory(model)
    kept, rows, learned = model.hidden[0], model.memory.rows, model.learned
    values = rows.clone()
    model.hidden[0].zero_()
    model.memory.rows.zero_()
    model.memory.pointer, model.step, model.log = torch.ones(()), 7, None
    order = torch.tensor([1, 2, 3, 0])
    with undisturbed(model):
        for given, with_buffers in (((), False), ((order,), False), ((order, True), True)):
            memory.recall(*given)
            assert torch.equal(model.hidden[0], torch.ones(4, 2)) and model.hidden[0] is not kept
            assert model.log == {"a": (1, 2)} and model.memory.pointer == 0 and model.step == 7
            assert model.learned is learned and len(model.big) == 10**6
            assert torch.equal(model.memory.rows, values[order] if with_buffers else values)
            model.hidden.append(1)
            assert model.shared is model.hidden and len(model.memory.shared) == 3
    assert model.hidden == [kept, None] and not kept.any() and model.memory.rows is rows and not rows.any()
    assert model.step == 7 and model.log is None and model.memory.pointer == 1
