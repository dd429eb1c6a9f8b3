"""Controls find the planted effect, find nothing where there is nothing, and compare what they say they compare."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_gradtrace.analysis import (
    Predictor,
    attributed_samples,
    count_flips,
    frequency_control,
    neuron_ablation,
    neurons,
    notable_tokens,
    null_control,
    null_tokens,
    peer_control,
    permuted_links,
    pool_controls,
    random_control,
)
from lightning_gradtrace.analysis.flips import sample_flips
from lightning_gradtrace.analysis.switches import neuron_switch
from tests.analysis.models import TOPICS, WORDS, PlantedLM, TinyLM, planted_world
from tests.analysis.test_ablation import tiny_case
from tests.analysis.traces import random_trace, write_trace

COLUMNS = [
    *("param", "module", "axis", "neuron", "control", "measure"),
    *("value", "control_value", "effect", "low", "high", "n", "n_control"),
]
MEASURES = ["flip_rate", "notable_flip_rate", "notable_share", "token_share"]
ENTRIES = np.arange(16)
find_tokens = partial(notable_tokens, n_relative=5, n_notable=5)


@cache
def planted(linked=True):
    world = planted_world(linked)
    table = neurons(world.trace, ENTRIES, find_tokens(world.trace, ENTRIES))
    return world.trace, Predictor(PlantedLM(), world.trace.tokens()[1]), table


def measure(table, name):
    return table[table["measure"] == name].reset_index(drop=True)


@pytest.mark.parametrize("control", [random_control, peer_control, partial(null_control, find_tokens=find_tokens)])
def test_controls_find_the_planted_effect(control):
    trace, predictor, table = planted()
    found = control(trace, predictor, table, ENTRIES)
    assert found.columns.tolist()[: len(COLUMNS)] == COLUMNS
    assert found["measure"].tolist() == MEASURES * 4
    flip_rate = measure(found, "flip_rate")
    assert (flip_rate["low"] > 0.2).all()
    assert (flip_rate["low"] <= flip_rate["effect"]).all()
    assert (flip_rate["effect"] <= flip_rate["high"]).all()
    np.testing.assert_allclose(found["effect"], found["value"] - found["control_value"])
    assert measure(found, "token_share")[["low", "high"]].isna().all(axis=None)


def test_frequency_control_finds_the_planted_effect():
    trace, predictor, table = planted()
    found = frequency_control(trace, predictor, table, ENTRIES)
    assert found.columns.tolist() == COLUMNS
    assert (found["value"] == 1.0).all()
    assert (found["n"] == 5).all()
    assert (found["low"] > 0.3).all()


def test_without_a_link_the_effects_hold_zero():
    trace, predictor, table = planted(False)
    tables = [
        random_control(trace, predictor, table, ENTRIES),
        null_control(trace, predictor, table, ENTRIES, find_tokens=find_tokens),
    ]
    flip_rate = measure(pd.concat(tables), "flip_rate")
    assert (flip_rate["low"] <= 0).all()
    assert (flip_rate["high"] >= 0).all()


def test_null_of_tokens_finds_chance():
    trace, _, table = planted()
    true = null_tokens(trace, ENTRIES, table, find_tokens=find_tokens, n_permutations=10)
    strength = measure(true, "log2_relative")
    assert (strength["low"] > 0.5).all()
    overlap = measure(true, "overlap")
    assert (overlap["value"] == 1.0).all()
    # words of a topic come and go together, so that the draw is one of topic words
    drawn = measure(true, "n_notable")["control_value"].mean()
    assert overlap["control_value"].mean() == pytest.approx(drawn / (TOPICS * WORDS), abs=0.1)
    trace, _, table = planted(False)
    chance = null_tokens(trace, ENTRIES, table, find_tokens=find_tokens, n_permutations=10)
    strength = measure(chance, "log2_relative")
    assert ((strength["low"] <= 0) & (strength["high"] >= 0)).mean() >= 0.75
    assert (measure(chance, "n_notable")["effect"].abs() < 3).all()


def test_null_of_tokens_equals_the_pipeline_by_hand():
    raw = random_trace()
    entries = range(43)
    find = partial(notable_tokens, min_count=6, n_notable=3)
    table = neurons(raw.trace, entries, find(raw.trace, entries), "out")
    found = null_tokens(raw.trace, entries, table, find_tokens=find, n_permutations=3, seed=4, confidence=0.8)
    key = ["param", "axis", "neuron"]
    values = []
    for seed in (4, 5, 6):
        notable = find(raw.trace, entries, links=permuted_links(raw.trace, seed))
        other = neurons(raw.trace, entries, notable, "out").set_index(key)
        values.append([other.loc[tuple(row), "n_notable"] for row in table[key].itertuples(index=False)])
    counts = np.array(values)
    rows = measure(found, "n_notable")
    assert rows["value"].tolist() == table["n_notable"].tolist()
    np.testing.assert_allclose(rows["control_value"], counts.mean(axis=0))
    np.testing.assert_allclose(rows["low"], table["n_notable"] - np.quantile(counts, 0.9, axis=0))
    np.testing.assert_allclose(rows["high"], table["n_notable"] - np.quantile(counts, 0.1, axis=0))
    assert (rows["n_control"] == 3).all()


def test_random_samples_are_none_of_the_attributed_ones():
    model, trace, entries, table, *_ = tiny_case()
    texts = trace.tokens()[1]
    predictor = Predictor(model, texts)
    ids = trace.tokens()[0].tolist()
    table = table[table["n_samples"].between(6, 14)].reset_index(drop=True)
    assert len(table) > 2
    of_neuron = attributed_samples(trace, entries, table)
    found = random_control(trace, predictor, table, entries)
    for place, row in table.iterrows():
        own = {ids.index(s) for s in of_neuron.loc[of_neuron["place"] == place, "sample_id"]}
        seen = set(predictor._known[neuron_switch(row["param"], row["neuron"], row["axis"]).name])
        others = seen - own
        size = min(len(own), 20 - len(own))
        part = found.iloc[4 * place : 4 * place + 4]
        assert (part["n"] == size).all()
        assert (part["n_control"] == size).all()
        assert len(others) == size
        pred, ablated = (
            predictor(np.array(sorted(others)), n) for n in (None, (row["param"], row["neuron"], row["axis"]))
        )
        positions, flips, touched, touched_flips = sample_flips(pred, ablated, row["tokens"]).sum(axis=0)
        expected = [flips / positions, touched_flips / touched if touched else np.nan]
        np.testing.assert_allclose(part["control_value"].to_numpy()[:2], expected)


def test_neuron_to_which_every_sample_is_attributed_has_no_random_control():
    trace = write_trace(
        {"hidden.weight": (5, 6)}, np.array([[0, 1], [1, 2]]), np.array([[0]] * 4), text={0: [1, 2], 1: [3], 2: [4]}
    )
    table = neurons(trace, [0], notable_tokens(trace, [0], min_count=1))
    found = random_control(trace, TinyLM(), table, [0])
    assert (found["n_control"] == 0).all()
    assert found[["effect", "low", "high"]].isna().all(axis=None)


def test_values_are_those_of_the_ablation_summary():
    model, trace, entries, table, *_ = tiny_case()
    summary = neuron_ablation(trace, model, table, entries)
    found = peer_control(trace, model, table, entries, n_peers=2)
    assert measure(found, "flip_rate")["value"].tolist() == summary["flip_rate"].tolist()
    for name, column in (("notable_flip_rate", "notable_flip_rate"), ("token_share", "share")):
        np.testing.assert_allclose(measure(found, name)["value"], summary[column])


def test_neuron_control_averages_other_neurons_on_the_same_samples():
    model, trace, entries, table, *_ = tiny_case()
    row = table[table["param"] == "hidden.weight"].head(1)
    param, neuron, axis = row[["param", "neuron", "axis"]].iloc[0]
    everyone = peer_control(trace, model, row, entries, n_peers=100, n_resamples=50)
    size = 6 if axis == "in" else 5
    assert (everyone["n_control"] == size - 1).all()
    others = pd.concat([row.assign(neuron=n, tokens=row["tokens"]) for n in range(size) if n != neuron])
    # the same samples: those of the neuron, so give every other neuron all entries of it
    predictor = Predictor(model, trace.tokens()[1])
    ids = trace.tokens()[0].tolist()
    rows = np.array(sorted({ids.index(s) for s in attributed_samples(trace, entries, row)["sample_id"]}))
    rates = []
    for n in others["neuron"]:
        counts = sample_flips(predictor(rows), predictor(rows, (param, n, axis)), row["tokens"].iloc[0]).sum(axis=0)
        rates.append(counts[1] / counts[0])
    assert measure(everyone, "flip_rate")["control_value"][0] == pytest.approx(np.mean(rates))
    weight = dict(model.named_parameters())[param].detach().numpy()
    norms = np.linalg.norm(weight, axis=0 if axis == "in" else 1)
    assert everyone["norm"].iloc[0] == pytest.approx(norms[neuron])
    assert everyone["control_norm"].iloc[0] == pytest.approx(np.delete(norms, neuron).mean())


def test_frequency_control_matches_tokens_of_similar_count():
    torch.manual_seed(5)
    trace, _, table = planted()
    model = PlantedLM()
    with torch.no_grad():
        model.next.weight += torch.randn_like(model.next.weight)  # predictions of all tokens
    predictor = Predictor(model, trace.tokens()[1])
    options = {"n_matches": 3, "max_ratio": 3.0, "min_count": 4, "n_resamples": 50}
    found = frequency_control(trace, predictor, table, ENTRIES, by="token", **options)
    assert found.columns.tolist() == [*COLUMNS[:4], "token", "text", "count", *COLUMNS[4:]]
    samples = attributed_samples(trace, ENTRIES, table)
    checked = 0
    for place, row in table.iterrows():
        rows = np.unique(samples.loc[samples["place"] == place, "sample_id"])
        key = (row["param"], row["neuron"], row["axis"])
        flips = count_flips(predictor(rows), predictor(rows, key)).set_index("token")
        pool = {t: r for t, r in flips.iterrows() if t not in row["tokens"] and r["count"] >= 4}
        for one in found[found["neuron"] == row["neuron"]].itertuples():
            assert one.token in row["tokens"]
            assert one.count == flips.loc[one.token, "count"] >= 4
            assert one.value == pytest.approx(flips.loc[one.token, "proportion"])
            distance = {t: abs(np.log(r["count"] / one.count)) for t, r in pool.items()}
            near = sorted(d for d in distance.values() if d <= np.log(3.0) + 1e-9)[:3]
            assert one.n_control == len(near)
            sure = [t for t, d in distance.items() if d < near[-1] - 1e-9]  # ties at the end are drawn
            tied = [t for t, d in distance.items() if abs(d - near[-1]) <= 1e-9]
            ends = sorted(pool[t]["proportion"] for t in tied)
            missing = len(near) - len(sure)
            base = sum(pool[t]["proportion"] for t in sure)
            assert base + sum(ends[:missing]) <= one.control_value * len(near) + 1e-9
            assert one.control_value * len(near) <= base + sum(ends[len(ends) - missing :]) + 1e-9
            checked += 1
    assert checked > 4
    by_neuron = frequency_control(trace, predictor, table, ENTRIES, **options)
    grouped = found.groupby("neuron")[["value", "control_value"]].mean()
    for one in by_neuron[by_neuron["n"] > 0].itertuples():
        assert one.value == pytest.approx(grouped.loc[one.neuron, "value"])
        assert one.control_value == pytest.approx(grouped.loc[one.neuron, "control_value"])


def test_neuron_without_notable_tokens_has_no_frequency_control():
    trace, predictor, table = planted()
    bare = table.assign(tokens=[()] * len(table))
    found = frequency_control(trace, predictor, bare, ENTRIES)
    assert (found["n"] == 0).all()
    assert found[["value", "effect", "low"]].isna().all(axis=None)
    assert len(frequency_control(trace, predictor, bare, ENTRIES, by="token")) == 0
    shares = measure(random_control(trace, predictor, bare, ENTRIES), "notable_share")
    assert (shares["value"] == 0).all()


def test_controls_of_untied_random_links_average_to_nothing():
    torch.manual_seed(0)
    trace, _, table = planted(False)
    model = PlantedLM()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    found = random_control(trace, model, table, ENTRIES)
    pooled = pool_controls(found)
    row = pooled[pooled["measure"] == "flip_rate"].iloc[0]
    assert row["low"] <= 0 <= row["high"] or abs(row["effect"]) < 0.02


@pytest.mark.parametrize("within", ["trace", "epoch", "step", "sample"])
def test_permuted_links_keep_what_they_say(within):
    raw = random_trace()
    links = permuted_links(raw.trace, seed=1, within=within)
    step, sample = np.array(raw.step), np.array(raw.sample_id)
    assert not np.array_equal(links, np.arange(60))
    assert np.array_equal(links, permuted_links(raw.trace, seed=1, within=within))
    assert not np.array_equal(links, permuted_links(raw.trace, seed=2, within=within))
    if within == "sample":
        pairs = set(zip(sample.tolist(), sample[links].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(set(sample.tolist()))
        return
    assert np.array_equal(np.sort(links), np.arange(60))
    kept = {"trace": step * 0, "epoch": step // 4, "step": step}[within]
    assert np.array_equal(kept[links], kept)
    if within != "step":
        assert not np.array_equal(step[links], step)


def test_pooled_effects_are_means_over_neurons():
    rng = np.random.default_rng(0)
    controls = pd.DataFrame(
        {
            "param": ["b", "a"] * 20,
            "control": "random",
            "measure": "flip_rate",
            "value": rng.normal(1, 1, 40),
            "control_value": rng.normal(0, 1, 40),
        }
    )
    controls["effect"] = controls["value"] - controls["control_value"]
    controls.loc[3, ["value", "effect"]] = np.nan
    pooled = pool_controls(controls)
    assert pooled.columns.tolist() == [
        "control",
        "measure",
        "neurons",
        "value",
        "control_value",
        "effect",
        "low",
        "high",
    ]
    effect = controls["effect"].dropna()
    assert pooled["neurons"].tolist() == [39]
    assert pooled["effect"][0] == pytest.approx(effect.mean())
    assert pooled["value"][0] - pooled["control_value"][0] == pytest.approx(effect.mean())
    error = effect.std() / np.sqrt(39)
    assert pooled["high"][0] - pooled["low"][0] == pytest.approx(3.92 * error, rel=0.15)
    by = pool_controls(controls, "param")
    assert by["param"].tolist() == ["b", "a"]
    assert by["neurons"].tolist() == [20, 19]
    nothing = pool_controls(controls.assign(effect=np.nan))
    assert nothing["neurons"].tolist() == [0]
    assert nothing[["effect", "low"]].isna().all(axis=None)


def test_model_is_left_as_it_was():
    trace, _, table = planted()
    model = PlantedLM().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for control in (random_control, peer_control, frequency_control, null_control):
        control(trace, model, table.head(1), ENTRIES, n_samples=5, n_resamples=20)
    assert model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_same_seed_gives_the_same_table():
    trace, predictor, table = planted()
    for control in (random_control, peer_control, frequency_control, null_control):
        one, other = (control(trace, predictor, table, ENTRIES, n_samples=9, seed=3, n_resamples=20) for _ in range(2))
        pd.testing.assert_frame_equal(one, other)


def test_wrong_arguments_are_refused():
    trace, predictor, table = planted()
    with pytest.raises(ValueError, match='`within` is \'time\', expected "trace", "epoch", "step" or "sample"'):
        permuted_links(trace, within="time")
    for control in (null_control, lambda t, p, n, e, **o: null_tokens(t, e, n, **o)):
        with pytest.raises(ValueError, match="`n_permutations` is 0, expected 1 or more"):
            control(trace, predictor, table, ENTRIES, n_permutations=0)
    with pytest.raises(ValueError, match="`n_peers` is 0, expected 1 or more"):
        peer_control(trace, predictor, table, ENTRIES, n_peers=0)
    with pytest.raises(ValueError, match='`by` is \'word\', expected "component" or "token"'):
        frequency_control(trace, predictor, table, ENTRIES, by="word")
    with pytest.raises(ValueError, match=r"`max_ratio` 0.5, expected 1 or more each"):
        frequency_control(trace, predictor, table, ENTRIES, max_ratio=0.5)
    with pytest.raises(ValueError, match=r"has shape \(5, 6\) in `TinyLM`, but \(4, 4\)"):
        random_control(trace, TinyLM(), table, ENTRIES)
    with pytest.raises(ValueError, match=r"`controls` lacks the columns \['control', 'control_value', 'effect'"):
        pool_controls(table)
