"""Outliers equal sorting everything that was recorded."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradtrace.analysis import outliers
from tests.analysis.traces import SHAPES, random_trace, write_trace


def recorded(raw):
    """All recorded shifts as a table of single rows."""
    table = raw.trace.topk.frame()
    table = table[(table["shift"] != 0) & np.isfinite(table["shift"])]
    param = table["param"].astype(str)
    width = param.map(lambda p: SHAPES[p][-1] if len(SHAPES[p]) == 2 else -1)
    neuron = (table["index"] % width).where(width > 0, -1)
    return table.assign(param=param, entry=param.map(raw.offset) + table["index"], neuron=neuron)


def largest(table, value, keys, n):
    table = table.assign(value=value)[np.isfinite(value)]
    table = table.sort_values(["value", "occurrence", "entry"], ascending=[False, True, True])
    return {key: part.head(n) for key, part in table.groupby(keys)}


KEYS = {
    "step": ["step"],
    "sample": ["sample_id"],
    "param": ["param"],
    "neuron": ["param", "neuron"],
    "entry": ["entry"],
}


@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("of", KEYS)
def test_outliers_equal_sorting(of, per):
    raw = random_trace(per=per)
    table = recorded(raw)
    if of == "neuron":
        table = table[table["neuron"] >= 0]
    expected = largest(table, table["shift"].abs().astype(float), KEYS[of], 3)
    found = outliers(raw.trace, of, n=3)
    groups = {key: part for key, part in found.groupby(KEYS[of])}
    assert groups.keys() == expected.keys()
    for key, part in groups.items():
        assert part["rank"].tolist() == list(range(1, len(part) + 1))
        for column in ("value", "occurrence", "entry", "sample_id", "param", "index"):
            assert part[column].tolist() == expected[key][column].tolist()
        np.testing.assert_allclose(part["shift"], expected[key]["shift"])


@pytest.mark.parametrize("normalise", ["param", "neuron"])
def test_normalised_shifts_are_divided_by_the_weights_of_their_time(normalise):
    rng = np.random.default_rng(2)
    shapes = {"a": (3, 4), "b": (2, 3)}
    weights = {
        s: {n: rng.normal(size=shape).astype(np.float32) * (1 + s) for n, shape in shapes.items()} for s in (0, 3, 6)
    }
    index = np.stack([np.sort(rng.permutation(18)[:5]) for _ in range(16)])
    shift = rng.normal(size=index.shape)
    trace = write_trace(shapes, np.arange(16).reshape(8, 2), index, shift=shift, weights=weights)
    found = outliers(trace, "step", n=4, normalise=normalise)
    values = []
    for occurrence in range(16):
        step = occurrence // 2
        snapshot = weights[max(s for s in weights if s <= step)]
        for entry, one in zip(index[occurrence], shift[occurrence].astype(np.float32), strict=True):
            name, at = ("a", entry) if entry < 12 else ("b", entry - 12)
            line = snapshot[name] if normalise == "param" else snapshot[name][:, at % shapes[name][1]]
            values.append((step, abs(one) / np.sqrt((line.astype(float) ** 2).mean()), int(entry)))
    for step, part in found.groupby("step"):
        expected = sorted((v for v in values if v[0] == step), key=lambda v: -v[1])[:4]
        np.testing.assert_allclose(part["value"], [v[1] for v in expected], rtol=1e-6)
        assert part["entry"].tolist() == [v[2] for v in expected]


def test_an_entry_is_compared_with_its_own_series():
    raw = random_trace()
    table = recorded(raw)
    size = table["shift"].abs().astype(float)
    series = size.groupby(table["entry"])
    count = series.transform("size")
    value = ((size - series.transform("mean")) / series.transform("std", ddof=0)).where(count >= 6)
    expected = largest(table, value, ["param"], 5)
    found = outliers(raw.trace, "param", n=5, normalise="series", min_count=6)
    assert {(param,) for param in found["param"]} == set(expected)
    for param, part in found.groupby(["param"]):
        np.testing.assert_allclose(part["value"], expected[param]["value"])
        assert part["entry"].tolist() == expected[param]["entry"].tolist()


def test_weights_of_zero_and_constant_series_give_no_outliers():
    trace = write_trace({"w": (2, 1)}, np.array([[0], [1]]), np.array([[0], [0]]), weights={0: {"w": np.zeros((2, 1))}})
    assert len(outliers(trace, "step", normalise="param")) == 0
    assert len(outliers(trace, "step", normalise="series", min_count=2)) == 0
    assert len(outliers(trace, "step")) == 2


def test_chosen_entries_and_steps():
    raw = random_trace()
    found = outliers(raw.trace, "sample", n=99, entries=[3, 1], steps=slice(2, 5))
    table = recorded(raw)
    expected = table[table["entry"].isin([1, 3]) & table["step"].between(2, 5)]
    assert len(found) == len(expected) > 0
    assert set(found["entry"]) == {1, 3}


def test_wrong_names_are_refused():
    trace = random_trace().trace
    for options, message in (
        ({"of": "layer"}, "`of` is 'layer', expected one of 'step', 'sample'"),
        ({"normalise": "std"}, "`normalise` is 'std', expected one of 'none', 'param'"),
        ({"n": 0}, "`n` is 0, expected 1 or more"),
        ({"normalise": "param"}, "needs the weights, and the trace keeps none; record with"),
    ):
        with pytest.raises(ValueError, match=message):
            outliers(trace, **options)
