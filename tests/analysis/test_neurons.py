"""Neurons equal unions over entries taken with sets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import (
    _groups,
    attributed_samples,
    frequent_entries,
    neuron_samples,
    neurons,
    notable_tokens,
    permuted_links,
    with_tokens,
)
from lightning_gradtrace.store.views import TopKPerSample
from tests.analysis.traces import SHAPES, entry_name, random_trace, write_trace


def neurons_by_hand(raw, entries, notable, axis):
    members = {}
    for entry in entries:
        param, index = entry_name(raw, entry)
        if len(SHAPES[param]) == 2:
            n_in = SHAPES[param][1]
            members.setdefault((param, index % n_in if axis == "in" else index // n_in), set()).add(entry)
    rows = []
    for (param, neuron), own in members.items():
        occurrences = {o for o, chosen in enumerate(raw.selected) if own & set(chosen)}
        counts = {}
        for row in notable.itertuples():
            if row.entry in own:
                counts[row.token] = counts.get(row.token, 0) + row.count
        tokens = tuple(sorted(counts, key=lambda t: (-counts[t], t)))
        samples = {raw.sample_id[o] for o in occurrences}
        rows.append((param, neuron, len(own), len(occurrences), len(samples), len(tokens), tokens))
    names = list(SHAPES)
    return sorted(rows, key=lambda r: (-r[5], -r[3], names.index(r[0]), r[1]))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("per", ["sample", "step"])
def test_neurons_equal_brute_force(axis, per):
    raw = random_trace(per=per)
    entries = frequent_entries(raw.trace, 30)
    notable = notable_tokens(raw.trace, entries, min_count=8, n_relative=4, n_notable=2)
    table = neurons(raw.trace, entries, notable, axis)
    columns = ["param", "neuron", "n_entries", "n_occurrences", "n_samples", "n_notable", "tokens"]
    expected = neurons_by_hand(raw, entries["entry"].tolist(), notable, axis)
    assert list(table[columns].itertuples(index=False, name=None)) == expected
    assert table["n_notable"].nunique() > 1
    assert set(table["axis"]) == {axis}
    assert table["module"].tolist() == [param.rpartition(".")[0] for param in table["param"]]
    assert table["text"].tolist() == [tuple(f"w{t}" for t in tokens) for tokens in table["tokens"]]


def test_modulus_is_the_weights_own_width():
    # entry 5 of (6, 2) lies in column 1, row 2; entry 5 of (4, 3) in column 2, row 1
    first, second = (
        dict(zip(SHAPES, (0, 12, 15, 27, 31), strict=True))[n] + 5 for n in ("b.in_proj_weight", "c.weight")
    )
    trace = write_trace(SHAPES, np.array([[0]]), np.array([[first, second]]), text={0: [1]})
    empty = notable_tokens(trace, [first, second])
    by_column = neurons(trace, [first, second], empty, "in")
    by_row = neurons(trace, [first, second], empty, "out")
    assert dict(zip(by_column["param"], by_column["neuron"], strict=True)) == {"b.in_proj_weight": 1, "c.weight": 2}
    assert dict(zip(by_row["param"], by_row["neuron"], strict=True)) == {"b.in_proj_weight": 2, "c.weight": 1}


def test_blocks_that_split_occurrences_change_nothing(monkeypatch):
    raw = random_trace()
    entries = range(30)
    notable = notable_tokens(raw.trace, entries, min_count=3)
    whole = neurons(raw.trace, entries, notable)
    samples = neuron_samples(raw.trace, entries, "a.weight", 0)
    blocks = TopKPerSample.blocks

    def split(self):
        for block in blocks(self):
            for start in range(0, len(block), 3):
                part = slice(start, start + 3)
                yield type(block)(block.occurrence[part], block.entry[part], block.shift[part])

    monkeypatch.setattr(TopKPerSample, "blocks", split)
    assert neurons(raw.trace, entries, notable).equals(whole)
    monkeypatch.setattr(_groups, "_SCRATCH", 1)
    assert neurons(raw.trace, entries, notable).equals(whole)
    assert neuron_samples(raw.trace, entries, "a.weight", 0).equals(samples)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_samples_of_a_neuron_equal_brute_force(axis):
    raw = random_trace()
    entries = list(range(20))
    n_in = SHAPES["a.weight"][1]
    own = {e for e in entries if e < 12 and (e % n_in if axis == "in" else e // n_in) == 2}
    expected = [
        (o, raw.step[o], raw.sample_id[o], len(own & set(chosen)))
        for o, chosen in enumerate(raw.selected)
        if own & set(chosen)
    ]
    table = neuron_samples(raw.trace, entries, "a.weight", 2, axis)
    assert list(table.columns) == ["occurrence", "step", "sample_id", "n_entries"]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert max(table["n_entries"]) > 1


def test_many_neurons_at_once_equal_one_by_one():
    raw = random_trace()
    columns = neurons(raw.trace, range(43), notable_tokens(raw.trace, range(43)), "in")
    rows = neurons(raw.trace, range(43), notable_tokens(raw.trace, range(43)), "out")
    mixed = pd.concat([rows.head(4), columns.head(4)], ignore_index=True)
    links = permuted_links(raw.trace)
    table = attributed_samples(raw.trace, range(43), mixed, links=links)
    for place, row in mixed.iterrows():
        one = neuron_samples(raw.trace, range(43), row["param"], row["neuron"], row["axis"], links=links)
        part = table[table["place"] == place].drop(columns="place").reset_index(drop=True)
        assert part.equals(one)
        assert len(one) == row["n_occurrences"]


def test_tokens_of_other_links_replace_those_of_a_table():
    raw = random_trace()
    entries = range(43)
    found = notable_tokens(raw.trace, entries, min_count=4)
    other = notable_tokens(raw.trace, entries, min_count=4, links=permuted_links(raw.trace))
    mixed = pd.concat([neurons(raw.trace, entries, found, axis) for axis in ("in", "out")], ignore_index=True)
    replaced = with_tokens(raw.trace, entries, other, mixed)
    direct = pd.concat([neurons(raw.trace, entries, other, axis) for axis in ("in", "out")])
    key = ["param", "axis", "neuron"]
    expected = direct.set_index(key).loc[list(mixed[key].itertuples(index=False, name=None))]
    assert replaced["tokens"].tolist() == expected["tokens"].tolist()
    assert replaced["text"].tolist() == expected["text"].tolist()
    assert replaced["n_notable"].tolist() == expected["n_notable"].tolist()


def test_without_matrices_there_are_no_neurons():
    trace = write_trace({"b": (4,)}, np.array([[0]]), np.array([[1, 2]]), text={0: [1]})
    table = neurons(trace, [1, 2], notable_tokens(trace, [1, 2]))
    assert len(table) == 0
    assert list(table.columns[:4]) == ["param", "module", "axis", "neuron"]


def test_neurons_need_no_inputs():
    trace = write_trace(SHAPES, np.array([[0, 1], [1, 0]]), np.array([[1, 2]] * 4))
    none = pd.DataFrame({"entry": [], "token": [], "text": [], "count": []})
    assert neurons(trace, [1, 2], none)["n_samples"].tolist() == [2, 2]


def test_wrong_arguments_are_refused():
    raw = random_trace()
    notable = notable_tokens(raw.trace, range(5))
    with pytest.raises(ValueError, match="`axis` is 'row', expected \"in\""):
        neurons(raw.trace, range(5), notable, "row")
    with pytest.raises(ValueError, match=r"`notable` lacks the columns \['token'\]"):
        neurons(raw.trace, range(5), notable.drop(columns="token"))
    with pytest.raises(ValueError, match=r"`d.weight` is not tracked in this trace; it tracks `a.weight`, `a.bias`"):
        neuron_samples(raw.trace, range(5), "d.weight", 0)
    with pytest.raises(ValueError, match=r"`a.bias` has shape \(3,\); only parameters of shape \(out, in\)"):
        neuron_samples(raw.trace, range(5), "a.bias", 0)
    with pytest.raises(ValueError, match=r"so 4 columns \(0 to 3\), but `neuron` is 4"):
        neuron_samples(raw.trace, range(5), "a.weight", 4)
    with pytest.raises(ValueError, match=r"so 3 rows \(0 to 2\), but `neuron` is 3"):
        neuron_samples(raw.trace, range(5), "a.weight", 3, "out")
    twice = neurons(raw.trace, range(5), notable)
    with pytest.raises(ValueError, match="the table names some neurons twice"):
        attributed_samples(raw.trace, range(5), pd.concat([twice, twice]))
