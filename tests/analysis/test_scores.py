"""Every method of finding notable tokens equals its formula written with loops, for entries and for groups."""

from __future__ import annotations

from collections import Counter
from math import log, log10, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lightning_gradtrace.analysis import attention_heads, frequent_entries, neurons, notable_tokens
from lightning_gradtrace.analysis.scores import METHODS
from lightning_gradtrace.analysis.scores.log_odds import PRIOR
from tests.analysis.models import COMMON, planted_world
from tests.analysis.traces import SHAPES, entry_name, random_trace, write_trace


def grams(text, n):
    return [tuple(text[i : i + n]) if n > 1 else text[i] for i in range(len(text) - n + 1)]


def counted(raw, members, n=1, weights=None):
    """Counts of a group's occurrences, each once; with weights (occurrence, entry) -> size scaled to a mean of 1."""
    counts, samples, sizes = Counter(), set(), {}
    for occurrence, chosen in enumerate(raw.selected):
        own = members & set(chosen)
        if own:
            sizes[occurrence] = 1.0 if weights is None else sum(weights[occurrence, e] for e in own)
            samples.add(raw.sample_id[occurrence])
    scale = len(sizes) / sum(sizes.values()) if sizes else 1.0
    for occurrence, size in sizes.items():
        for token in grams(raw.text[raw.sample_id[occurrence]], n):
            counts[token] += size * scale
    return counts, samples


class World:
    def __init__(self, raw, n=1):
        self.b = Counter(t for text in raw.text.values() for t in grams(text, n))
        self.all = Counter(t for s in raw.sample_id for t in grams(raw.text[s], n))
        self.texts = {s: set(grams(raw.text[s], n)) for s in raw.sample_id}
        self.sum_b, self.sum_all = sum(self.b.values()), sum(self.all.values())

    def score(self, method, t, counts, samples):
        n = sum(counts.values())
        c, q = counts[t], self.b[t] / self.sum_b
        relative = c / n / q
        if method == "univariate":
            return c
        if method == "log_product":
            return (1 + log(c)) * (1 + log(relative))
        if method == "kl":
            return self.divergence(counts, None) - self.divergence(counts, t)
        if method == "mahalanobis":
            x = np.array([[v, v / n / (self.b[s] / self.sum_b)] for s, v in counts.items()], float)
            away = np.array([c, relative]) - x.mean(0)
            return away @ np.linalg.solve(np.cov(x.T), away)
        if method == "log_odds":
            a, y, z = PRIOR * q, c, max(self.all[t] - c, 0)
            rest = self.sum_all - n
            delta = log((y + a) / (n + PRIOR - y - a)) - log((z + a) / (rest + PRIOR - z - a))
            return delta / sqrt(1 / (y + a) + 1 / (z + a))
        return -log10(self.p_value(method, t, counts, samples))

    def p_value(self, method, t, counts, samples):
        if method == "log_odds":
            return stats.norm.sf(self.score(method, t, counts, samples))
        held = sum(t in self.texts[s] for s in samples)
        holding = sum(t in text for text in self.texts.values())
        return stats.hypergeom.sf(held - 1, len(self.texts), holding, len(samples))

    def divergence(self, counts, without):
        p = {t: c for t, c in counts.items() if t != without}
        q = {t: b for t, b in self.b.items() if t != without}
        n, m = sum(p.values()), sum(q.values())
        return sum(c / n * log(c / n / (q[t] / m)) for t, c in p.items()) if n else 0.0


def by_hand(raw, members, method, *, n=1, min_count=3, n_notable=3, weights=None):
    world = World(raw, n)
    counts, samples = counted(raw, members, n, weights)
    total = sum(counts.values())
    relative = {t: c / total / (world.b[t] / world.sum_b) for t, c in counts.items()}
    score = {t: world.score(method, t, counts, samples) for t, c in counts.items() if c >= min_count - 1e-9}
    best = sorted(score, key=lambda t: (-round(score[t], 9), -round(relative[t], 9), t))[:n_notable]
    return [(t, counts[t], relative[t], score[t]) for t in best]


def assert_same(part, expected):
    assert part["token"].tolist() == [e[0] for e in expected]
    for place, name in enumerate(("count", "relative", "score"), 1):
        np.testing.assert_allclose(part[name].to_numpy(float), [e[place] for e in expected], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_entries_equal_the_formulas(method, ngram):
    raw = random_trace()
    entries = frequent_entries(raw.trace, 12)
    table = notable_tokens(raw.trace, entries, method=method, ngram=ngram, min_count=3, n_notable=3)
    assert len(table) > 20
    for entry in entries["entry"]:
        assert_same(table[table["entry"] == entry], by_hand(raw, {entry}, method, n=ngram))


@pytest.mark.parametrize("method", ["log_odds", "hypergeometric"])
def test_p_and_q_values_equal_scipy(method):
    raw, world = random_trace(), World(random_trace())
    table = notable_tokens(raw.trace, range(6), method=method, min_count=3, n_notable=99)
    for entry in range(6):
        counts, samples = counted(raw, {entry})
        tested = [t for t in world.b if world.all[t] >= 3]
        p = np.array([world.p_value(method, t, counts, samples) for t in tested])
        q = dict(zip(tested, zip(p, stats.false_discovery_control(p), strict=True), strict=True))
        part = table[table["entry"] == entry]
        expected = np.array([q[t] for t in part["token"]])
        np.testing.assert_allclose(part[["p_value", "q_value"]].to_numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["log_odds", "hypergeometric"])
def test_tokens_of_larger_q_are_left_out(method):
    trace = planted_world().trace
    options = {"by": "neuron", "method": method, "n_notable": 99}
    table = notable_tokens(trace, None, **options)
    few = notable_tokens(trace, None, **options, max_q=0.001)
    assert 0 < len(few) < len(table)
    pd.testing.assert_frame_equal(few, table[table["q_value"] <= 0.001].reset_index(drop=True))


def members_of(raw, by):
    """Entries of each group by the columns that name it, for the shapes of the random trace; b has two heads."""
    groups = {}
    for entry in range(43):
        param, index = entry_name(raw, entry)
        module = param.rpartition(".")[0]
        if by == "neuron" and len(SHAPES[param]) == 2:
            groups.setdefault((param, module, "in", index % SHAPES[param][1]), set()).add(entry)
        elif by == "param":
            groups.setdefault((param, module), set()).add(entry)
        elif by == "module":
            groups.setdefault((module,), set()).add(entry)
        elif by == "head" and param == "b.in_proj_weight":
            groups.setdefault((module, index // 2 % 2), set()).add(entry)
        elif by == "head_part" and param == "b.in_proj_weight":
            part = ("query", "key", "value")[index // 4]
            groups.setdefault((module, index // 2 % 2, part, param), set()).add(entry)
    return groups


@pytest.mark.parametrize("weight", ["none", "shift"])
@pytest.mark.parametrize("by", ["neuron", "head", "head_part", "param", "module"])
def test_groups_count_each_occurrence_once(by, weight):
    raw = random_trace()
    heads = attention_heads(raw.trace, 2)
    frame = raw.trace.topk.frame()
    weights = None
    if weight == "shift":
        offset = frame["param"].astype(str).map(raw.offset)
        keys = zip(frame["occurrence"], offset + frame["index"], strict=True)
        weights = dict(zip(keys, frame["shift"].abs().astype(float), strict=True))
    options = {"by": by, "heads": heads, "weight": weight, "min_count": 3, "n_notable": 3}
    table = notable_tokens(raw.trace, None, method="log_product", **options)
    expected = members_of(raw, by)
    names = list(table.columns[: list(table.columns).index("token")])
    found = {key if isinstance(key, tuple) else (key,): part for key, part in table.groupby(names, observed=True)}
    assert found.keys() == expected.keys()
    for key, members in expected.items():
        assert_same(found[key], by_hand(raw, members, "log_product", weights=weights))


def test_weights_of_an_entry_follow_the_snapshots():
    # one neuron of two entries; the weight of entry 0 doubles before step 1
    text, shapes = {0: [1, 1], 1: [2, 2]}, {"w": (2, 1)}
    weights = {0: {"w": np.array([[1.0], [3.0]], np.float32)}, 1: {"w": np.array([[-6.0], [3.0]], np.float32)}}
    index = np.array([[0], [0]])
    trace = write_trace(shapes, np.array([[0], [1]]), index, text=text, weights=weights)
    table = notable_tokens(trace, None, by="param", weight="value", min_count=1, n_notable=9).set_index("token")
    # sizes 1 and 6, scaled to a mean of 1: 2/7 and 12/7; two tokens each
    assert table.index.tolist() == [2]  # token 1 weighs 4/7, less than `min_count`
    assert table.loc[2, "count"] == pytest.approx(24 / 7)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_planted_words(method):
    world = planted_world()
    table = notable_tokens(world.trace, None, by="neuron", method=method, min_relative=2.0)
    hidden = table[table["param"] == "hidden.weight"]
    for neuron, words in enumerate(world.words):
        assert set(hidden.loc[hidden["neuron"] == neuron, "token"]) == words


@pytest.mark.parametrize("method", ["log_odds", "hypergeometric"])
def test_tests_find_nothing_where_nothing_is(method):
    world = planted_world(linked=False)
    table = notable_tokens(world.trace, None, by="neuron", method=method, max_q=0.001)
    assert (table["param"] == "hidden.weight").sum() <= 1
    linked = notable_tokens(planted_world().trace, None, by="neuron", method=method, max_q=0.001)
    assert (linked.loc[linked["param"] == "hidden.weight", "token"] >= COMMON).all()
    assert (linked["param"] == "hidden.weight").sum() == 20


def test_neurons_take_tokens_of_any_method():
    raw = random_trace()
    found = notable_tokens(raw.trace, range(20), method="kl", ngram=2, min_count=2)
    table = neurons(raw.trace, range(20), found)
    assert table["tokens"].map(len).sum() > 0
    assert all(isinstance(token, tuple) for tokens in table["tokens"] for token in tokens)


def test_wrong_methods_are_refused():
    trace = random_trace().trace
    for options, message in (
        ({"method": "tf-idf"}, "`method` is 'tf-idf', expected one of 'univariate', 'log_product'"),
        ({"by": "layer"}, "`by` is 'layer', expected one of 'entry', 'neuron'"),
        ({"by": "head"}, "`by` is 'head', which needs `heads`; pass `attention_heads"),
        ({"weight": "norm"}, "`weight` is 'norm', expected one of 'none', 'shift', 'value'"),
        ({"weight": "value"}, "the trace keeps none; record with `GradTrace\\(..., weights_every_n_steps"),
        ({"ngram": 0}, "`ngram` is 0, expected 1 \\(tokens\\)"),
        ({"method": "hypergeometric", "weight": "shift"}, "counts samples and takes no `weight`"),
        ({"max_q": 0.1}, "`max_q` is 0.1, but `method` 'univariate' is no test; those are 'log_odds', 'hyper"),
        ({"method": "log_odds", "max_q": 0.0}, "`max_q` is 0.0, expected a share above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            notable_tokens(trace, [0, 1], **options)
    with pytest.raises(ValueError, match='`entries` is None, which means all, with `by="entry"`'):
        notable_tokens(trace, None)
