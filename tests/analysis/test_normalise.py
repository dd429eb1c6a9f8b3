"""Shifts in proportion to weights, against the same arithmetic entry by entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_gradtrace.analysis import relative_shifts
from tests.synthetic import write_trace


@pytest.mark.parametrize(("by", "axis"), [("param", "in"), ("neuron", "in"), ("neuron", "out"), ("weight", "in")])
def test_shifts_are_put_in_proportion_to_the_snapshot_before_them(by: str, axis: str, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "a.zarr", weight_steps=(0, 4))
    table = relative_shifts(trace, by, axis=axis)
    assert len(table) == len(trace.topk.frame())
    for row in table.sample(60, random_state=0).itertuples():
        assert row.snapshot == (0 if row.step < 4 else 4)
        weights = trace.weights(row.param, row.snapshot).astype(float)
        r, c = np.unravel_index(row[table.columns.get_loc("index") + 1], weights.shape)
        size = {"param": weights, "neuron": weights[:, c] if axis == "in" else weights[r], "weight": None}[by]
        factor = weights[r, c] if size is None else 1 / np.sqrt((size**2).mean())
        assert row.relative == pytest.approx(row.shift * factor, rel=1e-6)


def test_some_steps_only(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "a.zarr", weight_steps=(2,))
    assert set(relative_shifts(trace, steps=slice(2, 3))["step"]) == {2, 3}
    with pytest.raises(ValueError, match="no weights were stored at or before step 0; this trace has 1 snapshots"):
        relative_shifts(trace)


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="`by` is 'size', expected one of 'param', 'neuron', 'weight'"):
        relative_shifts(trace, "size")
    with pytest.raises(ValueError, match='expected "in"'):
        relative_shifts(trace, axis="up")
    with pytest.raises(ValueError, match=r"this trace has 0 snapshots; record them with `GradTrace\(weights_every"):
        relative_shifts(trace)
