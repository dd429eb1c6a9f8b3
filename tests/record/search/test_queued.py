"""A search on a device that waits for it once takes little memory, and leaves little to be fetched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_gradtrace.capture.shares import OuterShare
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts, TopK
from lightning_gradtrace.record.search import queued
from tests.record.test_topk import dense, sorted_per_sample, sorted_per_step


def test_on_a_device_little_more_than_is_kept_leaves_it(monkeypatch) -> None:
    """Thresholds rise on the device, from the very first step on, and every share finds room for its entries."""
    fetched = []
    original = queued.to_host
    monkeypatch.setattr(queued, "to_host", lambda tensors: fetched.append(tensors) or original(tensors))
    infos = [ParameterInfo(name, (96, 64), i * 96 * 64) for i, name in enumerate("abcdef")]
    record = TopK(50)
    record.specs(infos)
    record._searcher.on_device = True
    torch.manual_seed(0)
    for _ in range(3):
        fetched.clear()
        shares = [OuterShare(torch.randn(4, 9, 96) ** 3, torch.randn(4, 9, 64) ** 3) for _ in infos]
        record.reduce(StepShifts([4], [ParameterShifts(i, -0.1, [s]) for i, s in zip(infos, shares, strict=True)]), 0)
        ((of, position, shift),) = fetched
        assert len(of) == len(position) == len(shift) == 4 * 50


@pytest.mark.parametrize("per", ["sample", "step"])
def test_on_a_device_room_that_was_not_needed_is_freed_before_there_is_much_of_it(per: str, monkeypatch) -> None:
    """With a large k there is room for as many entries as the model has weights, of which hardly any are found."""
    room = []
    original = queued._counts
    monkeypatch.setattr(queued, "_counts", lambda many: room.append(sum(map(len, many))) or original(many))
    monkeypatch.setattr(queued, "HELD", 5000)
    infos = [ParameterInfo(str(i), (40, 30), i * 1200) for i in range(12)]
    record = TopK(300, per=per)
    record.specs(infos)
    record._searcher.on_device = True
    torch.manual_seed(0)
    for _ in range(3):
        shares = [OuterShare(torch.randn(4, 9, 40) ** 3, torch.randn(4, 9, 30) ** 3) for _ in infos]
        step = StepShifts([4], [ParameterShifts(i, -0.1, [s]) for i, s in zip(infos, shares, strict=True)])
        rows = record.reduce(step, 0)
        if per == "sample":
            np.testing.assert_array_equal(rows["topk/index"], sorted_per_sample(dense(step), 300)[0])
        else:
            np.testing.assert_array_equal(rows["topk_step/index"][0], sorted_per_step(dense(step), 300)[1])
        assert max(room) <= 5000 + queued.ROOM * 300 * 4
