"""The default series of a trace are those of the analyses; boundaries are where series change together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import Norms, TopK
from lightning_gradtrace.analysis import (
    movement,
    phase_boundaries,
    self_influence,
    series_changes,
    shift_sparsity,
    trace_phases,
    trace_series,
)
from tests.analysis.traces import random_trace
from tests.record.steps import make_step, record_steps


def test_series_of_a_trace_are_those_of_the_analyses(tmp_path: Path) -> None:
    steps = [make_step(number, [3], [2]) for number in range(6)]
    trace = record_steps(tmp_path / "a.zarr", [TopK(9), Norms()], steps)
    found = trace_series(trace, every=2)
    kinds = {"moved", "participation", "self_influence_gini", "shift_norm"}
    assert set(found["series"]) == kinds  # no loss was given, and no weights
    moved = found[found["series"] == "moved"]
    assert moved["value"].tolist() == movement(trace, by="param", every=2)["moved"].tolist()
    gini = self_influence(trace, every=2).query("param == ''")["gini"]
    assert found[found["series"] == "self_influence_gini"]["value"].tolist() == gini.tolist()
    sparse = shift_sparsity(trace, every=2).query("param != ''")["participation"].dropna()
    assert found[found["series"] == "participation"]["value"].tolist() == sparse.tolist()
    assert np.isfinite(found["value"]).all()


def test_a_trace_with_one_record_has_its_series_too() -> None:
    found = trace_series(random_trace(1).trace)
    assert {"moved", "participation"} <= set(found["series"])
    assert list(found.columns) == ["series", "param", "step", "value"]
    with pytest.raises(ValueError, match="`every` is 0"):
        trace_series(random_trace(1).trace, every=0)


def test_a_change_that_series_share_is_a_boundary_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for number, at in enumerate([50, 51, 52, 20]):
        value = np.where(np.arange(100) < at, 0.0, 8.0) + rng.normal(size=100)
        parts.append(pd.DataFrame({"series": "moved", "param": f"p{number}", "step": range(100), "value": value}))
    changes = series_changes(pd.concat(parts))
    found = phase_boundaries(changes, window=5, span=(0, 99))
    assert len(found) == 1
    row = found.iloc[0]
    assert (row["series"], row["of"], row["names"]) == (3, 4, "moved")
    assert 49 <= row["first_step"] <= row["last_step"] <= 53
    assert row["expected"] == pytest.approx((1 - 0.95 ** changes.groupby("param").size()).sum())


def test_expected_counts_series_with_several_changes() -> None:
    table = pd.DataFrame({"series": ["a", "a", "b"], "param": "", "step": [0, 9, 9]})
    found = phase_boundaries(table, window=2, span=(0, 9))
    assert found["expected"].iloc[0] == pytest.approx((1 - 0.8**2) + (1 - 0.8))
    assert found["first_step"].tolist() == [9]


def test_without_changes_there_is_no_boundary_and_bad_input_is_named() -> None:
    assert phase_boundaries(pd.DataFrame({"series": [], "param": [], "step": []}), 3).empty
    with pytest.raises(ValueError, match=r"lacks the columns \['param', 'series'\]"):
        phase_boundaries(pd.DataFrame({"step": [1]}), 3)


def test_phases_of_a_trace_are_the_boundaries_of_its_series() -> None:
    trace = random_trace(3, n_steps=120).trace
    series = pd.DataFrame({"series": ["a", "b"] * 120, "param": "", "step": np.repeat(np.arange(120), 2)})
    series["value"] = (series["step"] >= 60) + 0.01 * np.random.default_rng(0).normal(size=240)
    found = trace_phases(trace, series)
    expected = phase_boundaries(series_changes(series), 3, span=(0, 119))  # a fortieth of the training
    pd.testing.assert_frame_equal(found, expected)
    assert found[["first_step", "last_step", "series"]].to_numpy().tolist() == [[60, 60, 2]]
    assert trace_phases(trace, series, window=200)["expected"].tolist() == [2.0]
