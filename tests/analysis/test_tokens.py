"""Notable tokens equal the univariate heuristic written with loops and dictionaries."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import (
    _access,
    _sample_counts,
    _token_counts,
    frequent_entries,
    neurons,
    no_tokens,
    notable_tokens,
    permuted_links,
)
from tests.analysis.traces import SHAPES, random_trace, write_trace


def notable_by_hand(raw, entries, min_count, n_relative, n_notable, min_relative=0.0, links=None):
    background = Counter(token for text in raw.text.values() for token in text)
    all_tokens = sum(background.values())
    found = []
    for entry in entries:
        counts = Counter()
        for occurrence, chosen in enumerate(raw.selected):
            if entry in chosen:
                reader = occurrence if links is None else links[occurrence]
                counts.update(raw.text[raw.sample_id[reader]])
        total = sum(counts.values())
        rows = []
        for token, count in counts.items():
            relative = (count / total) / (background[token] / all_tokens)
            if count >= min_count and relative >= min_relative:
                rows.append((token, count, background[token], relative))
        rows = sorted(rows, key=lambda r: (-r[3], r[0]))[:n_relative]
        rows = sorted(rows, key=lambda r: (-r[1], -r[3], r[0]))[:n_notable]
        found += [(entry, token, c, b, relative, rank + 1) for rank, (token, c, b, relative) in enumerate(rows)]
    return found


def assert_same(table, expected):
    got = table[["entry", "token", "count", "background", "relative", "rank"]].to_numpy(float)
    assert got.shape[0] == len(expected) > 0
    np.testing.assert_allclose(got, np.array(expected, float), rtol=1e-12)


@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("thresholds", [(3, 200, 5), (1, 4, 2), (5, 3, 3), (2, 1, 5)])
def test_notable_tokens_equal_brute_force(per, thresholds):
    raw = random_trace(per=per)
    entries = frequent_entries(raw.trace, 20)
    min_count, n_relative, n_notable = thresholds
    table = notable_tokens(raw.trace, entries, min_count=min_count, n_relative=n_relative, n_notable=n_notable)
    assert_same(table, notable_by_hand(raw, entries["entry"], *thresholds))
    assert table["text"].tolist() == [f"w{token}" for token in table["token"]]


def test_minimum_of_relative_frequency_equals_brute_force():
    raw = random_trace()
    table = notable_tokens(raw.trace, range(20), min_count=2, min_relative=1.2)
    assert_same(table, notable_by_hand(raw, range(20), 2, 200, 5, 1.2))
    assert (table["relative"] >= 1.2).all()


def test_permuted_links_equal_brute_force():
    raw = random_trace()
    links = permuted_links(raw.trace, seed=7)
    table = notable_tokens(raw.trace, range(15), min_count=3, links=links)
    assert_same(table, notable_by_hand(raw, range(15), 3, 200, 5, links=links))


def test_groups_buffers_and_searching_change_nothing(monkeypatch):
    raw = random_trace()
    whole = notable_tokens(raw.trace, range(30), min_count=2)
    monkeypatch.setattr(_sample_counts, "_TABLE_BYTES", 15 * 7)
    monkeypatch.setattr(_token_counts, "_ROWS", 3)
    monkeypatch.setattr(_access, "_TABLE_LIMIT", 0)
    assert notable_tokens(raw.trace, range(30), min_count=2).equals(whole)


def test_order_of_the_entries_is_kept():
    raw = random_trace()
    table = notable_tokens(raw.trace, [5, 0, 3], min_count=1)
    assert table["entry"].drop_duplicates().tolist() == [5, 0, 3]


def test_counts_have_multiplicity_and_the_background_has_none():
    # sample 10 is seen three times by entry 1; the data holds it once
    trace = write_trace(
        SHAPES, np.array([[10], [10], [10], [11]]), np.array([[1]] * 3 + [[2]]), text={10: [4, 4, 5], 11: [5, 6]}
    )
    table = notable_tokens(trace, [1], min_count=1).set_index("token")
    assert table.loc[4, ["count", "background"]].tolist() == [6, 2]
    assert table.loc[5, ["count", "background"]].tolist() == [3, 2]
    assert table.loc[4, "relative"] == pytest.approx((6 / 9) / (2 / 5))


def test_tokens_without_vocabulary_are_shown_as_ids():
    raw = random_trace(vocab=False)
    table = notable_tokens(raw.trace, range(5), min_count=1)
    assert table["text"].tolist() == [str(token) for token in table["token"]]


def test_entry_without_enough_occurrences_has_no_rows():
    table = notable_tokens(random_trace().trace, range(5), min_count=10**6)
    assert len(table) == 0
    assert list(table.columns[:5]) == ["entry", "param", "index", "token", "text"]


@pytest.mark.parametrize("name", ["min_count", "n_relative", "n_notable"])
def test_thresholds_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, expected 1 or more"):
        notable_tokens(random_trace().trace, [0], **{name: 0})


def test_trace_without_inputs_is_refused():
    trace = write_trace(SHAPES, np.array([[0], [1]]), np.array([[1, 2], [1, 2]]))
    with pytest.raises(ValueError, match="the trace keeps no inputs; record with `GradTrace"):
        notable_tokens(trace, [1])


def test_missing_text_of_one_sample_is_refused():
    trace = write_trace(SHAPES, np.array([[0], [1], [7]]), np.array([[1, 2]] * 3), text={0: [1], 1: [2]})
    with pytest.raises(ValueError, match=r"1 of 3 occurrences have a sample whose text .*the first is sample 7"):
        notable_tokens(trace, [1])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0, 0], "`entries` names some entries twice"),
        ([0, 43], "`entries` holds numbers from 0 to 43, but this trace tracks entries 0 to 42"),
        ([-1], "holds numbers from -1"),
        (pd.DataFrame({"e": [1]}), "expected a column `entry`"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        notable_tokens(random_trace().trace, entries)


@pytest.mark.parametrize(
    ("links", "message"),
    [
        (np.arange(3), r"`links` has shape \(3,\) .* each of the 60 occurrences"),
        (np.zeros(60), "dtype float64"),
        (np.arange(1, 61), "`links` holds numbers from 1 to 60, expected 0 to 59"),
    ],
)
def test_links_that_do_not_fit_are_refused(links, message):
    with pytest.raises(ValueError, match=message):
        notable_tokens(random_trace().trace, [0], links=links)


def test_a_trace_without_inputs_has_neurons_without_words():
    trace = write_trace({"a.weight": (3, 4)}, np.arange(6).reshape(3, 2), np.array([[1, 6]] * 6))
    with pytest.raises(ValueError, match="the trace keeps no inputs"):
        notable_tokens(trace, [1, 6])
    found = neurons(trace, [1, 6], no_tokens())
    assert found[["neuron", "n_occurrences", "n_notable"]].to_numpy().tolist() == [[1, 6, 0], [2, 6, 0]]
