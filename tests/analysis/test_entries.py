"""Counts of selected entries equal counting them one by one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lightning_gradtrace.analysis import count_entries, entries, frequent_entries
from tests.analysis.traces import SHAPES, entry_name, random_trace, write_trace


def count_by_hand(raw, steps=None):
    counter = Counter()
    for step, chosen in zip(raw.step, raw.selected, strict=True):
        if steps is None or step in steps:
            counter.update(chosen)
    rows = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return [(entry, *entry_name(raw, entry), count) for entry, count in rows]


@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("steps", [None, [2, 3, 7], slice(3, 6), 5])
def test_counts_equal_brute_force(per, steps):
    raw = random_trace(per=per)
    named = {None: None, "[2, 3, 7]": {2, 3, 7}, "slice(3, 6, None)": {3, 4, 5, 6}, "5": {5}}
    expected = count_by_hand(raw, named[None if steps is None else str(steps)])
    table = count_entries(raw.trace, steps)
    assert list(table.columns) == ["entry", "param", "index", "count"]
    assert list(table.itertuples(index=False, name=None)) == expected


def test_sparse_counting_equals_dense_counting(monkeypatch):
    raw = random_trace()
    dense = count_entries(raw.trace)
    monkeypatch.setattr(entries, "_DENSE_LIMIT", 0)
    assert count_entries(raw.trace).equals(dense)


def test_frequent_entries_are_the_first_rows():
    raw = random_trace()
    everything = count_entries(raw.trace)
    assert frequent_entries(raw.trace, 6).equals(everything.head(6))
    assert frequent_entries(raw.trace, raw.trace.n_entries).equals(everything)


def test_zero_and_non_finite_shifts_are_not_counted():
    shift = np.array([[1.0, 0.0], [np.nan, -2.0], [np.inf, 0.0]])
    index = np.array([[1, 2], [1, 2], [1, 2]])
    trace = write_trace(SHAPES, np.array([[0], [1], [2]]), index, shift=shift)
    assert count_entries(trace)[["entry", "count"]].to_numpy().tolist() == [[1, 1], [2, 1]]


@pytest.mark.parametrize("number", [0, -3])
def test_n_entries_below_one_is_refused(number):
    with pytest.raises(ValueError, match=rf"`n_entries` is {number}, expected 1 or more"):
        frequent_entries(random_trace().trace, number)


def test_more_entries_than_there_are_is_refused():
    with pytest.raises(ValueError, match="`n_entries` is 5000, but this trace tracks 43 entries; pass at most that"):
        frequent_entries(random_trace().trace)


def test_trace_without_topk_is_refused():
    trace = write_trace(SHAPES, np.array([[0], [1]]), np.array([[1, 2], [1, 2]]), record=False)
    with pytest.raises(ValueError, match=r"the trace holds none; record with `GradTrace\(..., record=TopK\(1000\)\)`"):
        count_entries(trace)


def test_steps_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="`steps` matches no occurrence of this trace, which holds steps 0 to 11"):
        count_entries(random_trace().trace, [99])
