"""Copies on a side stream bring what plain copies bring, and nothing waits before a record is through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import Dense, Factored, Norms, Sketch
from lightning_gradtrace.record.transfer import Copy, HostCopies, SideStreams
from tests.device.devices import CUDA
from tests.device.test_training import Optimizer, adamw, record, sgd


@pytest.mark.parametrize("under_way", [1, 1 << 24, 1 << 40])
def test_copies_hold_what_was_put_while_the_device_goes_on(under_way: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(2048, 2048, generator=generator, device="cuda") / 45
    found: list[np.ndarray] = []
    expected = []
    with HostCopies(under_way) as host:
        x = a
        for i in range(40):
            x = (a @ x).tanh() + i  # freed in the next round: its memory is asked for again at once
            host.put(x if i % 2 else x.mT[: 100 + i], lambda array: found.append(array.copy()))
            expected.append((x if i % 2 else x.mT[: 100 + i]).clone())
    for array, tensor in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, tensor.cpu().numpy())


def test_putting_waits_for_nothing() -> None:
    a = torch.randn(512, 512, device="cuda")
    found: list[np.ndarray] = []
    with HostCopies() as host:
        host.put(a, found.append)  # the stream and pinned memory are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        with HostCopies() as host:
            for _ in range(10):
                host.put(a @ a, found.append)
            assert len(found) == 1
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 11


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_the_trace_is_that_of_plain_copies(
    optimizer: Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [Dense(), Factored(), Sketch(16), Norms()]
    beside = record(tmp_path / "a.zarr", CUDA.trainer, records, optimizer=optimizer)
    monkeypatch.setattr(SideStreams, "__call__", lambda self, tensor: Copy(tensor, tensor.cpu()))
    plain = record(tmp_path / "b.zarr", CUDA.trainer, records, optimizer=optimizer)
    assert beside.norms.frame().equals(plain.norms.frame())
    for name in plain.params["param"]:
        np.testing.assert_array_equal(beside.dense[name][:], plain.dense[name][:])
        kept = plain.factored[name].occurrence
        np.testing.assert_array_equal(beside.factored[name].shifts(kept), plain.factored[name].shifts(kept))
        path = f"sketch/{name}/shift"
        np.testing.assert_array_equal(beside.array(path)[:], plain.array(path)[:])
