"""Movement, movers and formation equal sums over lists; change points are where levels change."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import change_points, formation, movement, movers
from lightning_gradtrace.analysis import movement as movement_function
from tests.analysis.test_outliers import recorded
from tests.analysis.traces import random_trace, write_trace


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("by", ["neuron", "param"])
def test_movement_equals_sums(by, every):
    raw = random_trace()
    table = recorded(raw)
    keys = ["param", "neuron"] if by == "neuron" else ["param"]
    table = table[table["neuron"] >= 0] if by == "neuron" else table
    table = table.assign(bin=table["step"] // every * every, shift=table["shift"].astype(float))
    found = movement(raw.trace, by=by, every=every)
    n_bins = -(-12 // every)
    assert (found.groupby(keys).size() == n_bins).all()
    sums = table.groupby([*keys, "bin"])["shift"].agg(["size", "sum", lambda s: s.abs().sum()])
    sums.columns = ["shifts", "net", "moved"]
    got = found.set_index([*keys, "step"])
    assert got["shifts"].sum() == len(table)
    for column in sums:
        np.testing.assert_allclose(got.loc[sums.index, column], sums[column], atol=1e-12)


def test_rows_are_few_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sys.modules[movement_function.__module__], "_MOST_TIMES", 4)
    assert movement(random_trace().trace, by="param")["step"].unique().tolist() == [0, 3, 6, 9]


def test_movers_equal_sums(monkeypatch):
    raw = random_trace()
    table = recorded(raw).assign(shift=lambda t: t["shift"].astype(float))
    sums = table.groupby(["entry", "sample_id"])["shift"].agg([lambda s: s.abs().sum(), "sum"])
    sums.columns = ["moved", "net"]
    sums = sums.reset_index().sort_values(["entry", "moved", "sample_id"], ascending=[True, False, True])
    total = sums.groupby("entry")["moved"].sum()
    found = movers(raw.trace, range(20), "entry", n=3)
    assert found["entry"].nunique() > 15
    for entry, part in found.groupby("entry"):
        expected = sums[sums["entry"] == entry].head(3)
        assert part["sample_id"].tolist() == expected["sample_id"].tolist()
        np.testing.assert_allclose(part[["moved", "net"]], expected[["moved", "net"]])
        np.testing.assert_allclose(part["share"], expected["moved"] / total[entry])
    monkeypatch.setattr(sys.modules[movers.__module__], "_GROUP_BYTES", 16 * 15 * 4)
    assert movers(raw.trace, range(20), "entry", n=3).equals(found)


def test_neurons_form_in_the_planted_order():
    """Column 2 moves in the first steps, column 0 in the last ones, column 1 all the time."""
    index = np.array([[1, 2] if step < 4 else [0, 1] if step >= 8 else [1, 4] for step in range(12)])
    shift = np.where(index == 1, 1.0, 3.0)
    trace = write_trace({"w": (2, 3)}, np.arange(12).reshape(12, 1), index, shift=shift)
    table = formation(movement(trace, entries=[0, 1, 2], every=1))
    assert table["neuron"].tolist() == [2, 1, 0]
    assert table["order"].tolist() == [1, 2, 3]
    assert table["step_50"].tolist() == [1, 5, 9]
    assert table["moved"].tolist() == [12.0, 12.0, 12.0]


def test_change_points_are_found_where_they_were_planted():
    rng = np.random.default_rng(0)
    level = np.repeat([1.0, 4.0, 2.0], [40, 30, 50])
    step = np.arange(120) * 10
    noisy = pd.DataFrame({"step": step, "value": level + 0.3 * rng.normal(size=120), "name": "a"})
    flat = noisy.assign(name="b", value=0.3 * rng.normal(size=120))
    constant = noisy.assign(name="c", value=5.0)
    shuffled = pd.concat([noisy, flat, constant]).sample(frac=1.0, random_state=1)
    found = change_points(shuffled, "value", by="name")
    assert found["name"].tolist() == ["a", "a"]
    assert found["step"].tolist() == [400, 700]
    np.testing.assert_allclose(found["before"], [1, 4], atol=0.15)
    np.testing.assert_allclose(found["after"], [4, 2], atol=0.15)
    exact = change_points(noisy.assign(value=level), "value")
    assert exact["step"].tolist() == [400, 700]


def test_missing_ruptures_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(ImportError, match=r"needs ruptures, which is not installed: `pip install .*\[changes\]"):
        change_points(pd.DataFrame({"step": [1], "loss": [1.0]}), "loss")


def test_wrong_arguments_are_refused():
    trace = random_trace().trace
    with pytest.raises(ValueError, match="`every` is 0, expected 1 or more steps"):
        movement(trace, every=0)
    with pytest.raises(ValueError, match="`n` is 0, expected 1 or more samples"):
        movers(trace, n=0)
    with pytest.raises(ValueError, match=r"`shares` is \[0.5, 2\], expected shares above 0"):
        formation(movement(trace), shares=[2, 0.5])
    with pytest.raises(ValueError, match=r"`movement` lacks the columns \['moved'\]"):
        formation(movement(trace).drop(columns="moved"))
    with pytest.raises(ValueError, match=r"`table` lacks the columns \['loss'\]"):
        change_points(pd.DataFrame({"step": [1]}), "loss")
    with pytest.raises(ValueError, match="`penalty` is -1 and `min_size` 3"):
        change_points(pd.DataFrame({"step": [1], "loss": [1.0]}), "loss", penalty=-1)
