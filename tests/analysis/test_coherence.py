"""Coherence equals what the dense shifts lead to; a null of signs leaves nothing but chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import Dense, Division, GradTrace, Norms, TopK, open_trace
from lightning_gradtrace.analysis import coherence, sign_null
from lightning_gradtrace.capture.shares import DenseShare
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts
from lightning_gradtrace.store import Trace
from tests.record.steps import record_steps
from tests.test_callback import Model, fit


def test_coherence_is_that_of_the_dense_shifts(tmp_path: Path) -> None:
    torch.manual_seed(3)
    recorder = GradTrace(tmp_path / "a.zarr", [Dense(), Norms(schedule=2), Division()], params="*linear1*")
    fit(Model(), recorder, max_epochs=1)
    trace = open_trace(tmp_path / "a.zarr")
    table = coherence(trace)
    assert list(table["step"].unique()) == [step for step in trace.steps.index if step % 2 == 0]
    step = trace.occurrences["step"].to_numpy()
    for number, rows in table.groupby("step"):
        joint, single = 0.0, 0.0
        for name in trace.params["param"]:
            shifts = np.asarray(trace.dense[name], np.float64)[step == number]
            flat = shifts.reshape(len(shifts), -1)
            joint += (flat.sum(0) ** 2).sum()
            single += (flat**2).sum()
            row = rows[rows["param"] == name].iloc[0]
            assert row["coherence"] == pytest.approx((flat.sum(0) ** 2).sum() / (flat**2).sum(), rel=1e-4)
            pairs = flat @ flat.T
            mean = (pairs.sum() - np.trace(pairs)) / (row["n"] - 1) / np.trace(pairs)
            assert row["cosine"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert rows[rows["param"] == "all"]["coherence"].iloc[0] == pytest.approx(joint / single, rel=1e-4)


def trace_of(path: Path, shifts: torch.Tensor) -> Trace:
    info = ParameterInfo("w", tuple(shifts.shape[1:]), 0)
    step = StepShifts([len(shifts)], [ParameterShifts(info, 1.0, [DenseShare(shifts)])], 0)
    return record_steps(path, [Dense()], [step])


def test_equal_shifts_are_as_coherent_as_their_number_and_signs_are_chance(tmp_path: Path) -> None:
    equal = trace_of(tmp_path / "a.zarr", torch.ones(20, 3, 4))
    row = sign_null(equal, "w", [0]).iloc[0]
    assert row["coherence"] == pytest.approx(20)
    assert row["null_low"] < 1 < row["null_high"] < 20 and row["p_value"] == pytest.approx(1 / 200)
    torch.manual_seed(1)
    random = trace_of(tmp_path / "b.zarr", torch.randn(20, 3, 4))
    row = sign_null(random, "w", [0]).iloc[0]
    assert row["null_low"] < row["coherence"] < row["null_high"]
    balanced = trace_of(tmp_path / "c.zarr", torch.cat([torch.ones(10, 3, 4), -torch.ones(10, 3, 4)]))
    row = sign_null(balanced, "w", [0]).iloc[0]
    assert row["coherence"] == 0 and row["p_value"] == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    trace = record_steps(tmp_path / "a.zarr", [TopK(2)], [_step()])
    with pytest.raises(ValueError, match="the trace lacks division, norms; it holds topk"):
        coherence(trace)
    with pytest.raises(ValueError, match="reads a Dense or Factored record, and the trace holds topk"):
        sign_null(trace, "w", [0])
    with pytest.raises(ValueError, match="`n_draws` is 0"):
        sign_null(trace, "w", [0], n_draws=0)


def _step() -> StepShifts:
    return StepShifts([2], [ParameterShifts(ParameterInfo("w", (2, 2), 0), 1.0, [DenseShare(torch.ones(2, 2, 2))])], 0)
