"""Norms are those of the dense shifts, on every way to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace.capture.shares import OuterShare
from lightning_gradtrace.record import Norms, ParameterInfo, ParameterShifts, StepShifts
from tests.record.steps import dense_shifts, make_step, record_steps


@pytest.mark.parametrize("gains", [False, True], ids=["number", "gains"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("positions", [(1, 1), (3, 2), (20, 30)], ids=str)
@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_norms_are_those_of_the_dense_shifts(tmp_path: Path, gains, dtype, positions, workspace, monkeypatch) -> None:
    for module in ("_parts", "norms"):
        monkeypatch.setattr(f"lightning_gradtrace.record.{module}.WORKSPACE", workspace)
    steps = [make_step(number, [3, 2], positions, gains, dtype) for number in range(2)]
    trace = record_steps(tmp_path / "a.zarr", [Norms()], steps)
    assert trace.verify().ok
    frame = trace.norms.frame()
    assert trace.array("norms/norm").dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    for name, shifts in dense_shifts(steps).items():
        expected = np.linalg.norm(shifts.reshape(len(shifts), -1).astype(np.float64), axis=1)
        np.testing.assert_allclose(frame[name], expected, rtol=tolerance)
    total = np.sqrt(np.square(frame.to_numpy(np.float64)).sum(1))
    np.testing.assert_allclose(trace.norms.total([4, 1]), total[[4, 1]], rtol=1e-6)


def test_short_sequences_are_not_written_out(monkeypatch) -> None:
    """Nor are look-ups, whatever their number."""
    monkeypatch.setattr("lightning_gradtrace.record.norms.shift_blocks", lambda *a: pytest.fail("shifts were formed"))
    step = make_step(0, [3], [2])
    step.parameters = [p for p in step.parameters if p.info.name in ("outer", "embedding", "tied", "heads", "kernel")]
    record = Norms()
    record.arrays([p.info for p in step.parameters])
    assert np.isfinite(record.reduce(step, 0)["norms/norm"]).all()


def test_terms_that_cancel_leave_a_norm_that_is_right() -> None:
    """Two positions of opposite sign: what is left is a ten-millionth of the terms."""
    torch.manual_seed(0)
    left, right = torch.randn(1, 1, 300), torch.randn(1, 1, 200)
    left, right = torch.cat([left, -left], 1), torch.cat([right, right * (1 + 1e-6)], 1)
    share = OuterShare(left, right)
    parameter = ParameterShifts(ParameterInfo("w", (300, 200), 0), 1.0, [share])
    record = Norms()
    record.arrays([parameter.info])
    found = record.reduce(StepShifts([1], [parameter]), 0)["norms/norm"][0, 0]
    exact = torch.linalg.vector_norm(left[0].double().T @ right[0].double())
    assert found == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_are_kept(bad: float) -> None:
    step = make_step(0, [3], [2])
    step.parameters[0].shares[0].left[1, 0, 2] = bad  # type: ignore[union-attr]
    record = Norms()
    record.arrays([p.info for p in step.parameters])
    finite = np.isfinite(record.reduce(step, 0)["norms/norm"])
    assert not finite[1, 0] and finite.sum() == finite.size - 1
