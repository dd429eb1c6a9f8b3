"""Flip tables and ablation summaries equal a loop over samples and positions with a zeroed copy of the model."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_gradtrace.analysis import Predictor, flip_table, neuron_ablation, neurons, notable_tokens
from tests.analysis.models import PlantedLM, TinyLM, planted_world
from tests.analysis.test_flips import flips_by_hand
from tests.analysis.test_predictions import predict_one_by_one, ragged
from tests.analysis.traces import write_trace

SHAPES = {"hidden.weight": (5, 6), "hidden.bias": (5,), "head.weight": (12, 5)}


def lively_model(seed):
    """Weights large enough for predictions to depend on the text."""
    torch.manual_seed(seed)
    model = TinyLM()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def tiny_case():
    model = lively_model(1)
    rng = np.random.default_rng(1)
    tokens = ragged(20, 9)
    text = {100 + i: row[row >= 0].tolist() for i, row in enumerate(tokens)}
    sample_id = 100 + np.stack([rng.permutation(20)[:6] for _ in range(10)])
    index = np.stack([np.sort(rng.permutation(95)[:4]) for _ in range(60)])
    trace = write_trace(SHAPES, sample_id, index, text=text, vocab=[f"w{t}" for t in range(12)])
    entries = np.arange(95)
    table = neurons(trace, entries, notable_tokens(trace, entries, min_count=4, n_notable=2), "in")
    rows = neurons(trace, entries, notable_tokens(trace, entries, min_count=4, n_notable=2), "out")
    mixed = pd.concat([table.head(6), rows.head(6)], ignore_index=True)
    return model, trace, entries, mixed, sample_id.reshape(-1), index, text


def zeroed(model, param, neuron, axis):
    model = copy.deepcopy(model)
    with torch.no_grad():
        weight = dict(model.named_parameters())[param]
        weight[(slice(None), neuron) if axis == "in" else neuron] = 0
    return model


@pytest.mark.parametrize(
    ("param", "neuron", "axis"), [("hidden.weight", 2, "in"), ("head.weight", 4, "in"), ("hidden.weight", 3, "out")]
)
def test_flip_table_equals_brute_force(param, neuron, axis):
    model, tokens = lively_model(0), ragged(40, 9)
    pred = predict_one_by_one(copy.deepcopy(model), tokens)
    flips, count = flips_by_hand(pred, predict_one_by_one(zeroed(model, param, neuron, axis), tokens))
    table = flip_table(model, tokens, param, neuron, axis, batch_size=4, vocab=[f"w{t}" for t in range(12)])
    got = {row.token: (row.flips, row.count) for row in table.itertuples()}
    assert got == {t: (flips[t], count[t]) for t in count}
    assert sum(flips.values()) > 0
    assert table["text"].tolist() == [f"w{t}" for t in table["token"]]
    assert model.training


def test_summary_of_neurons_equals_brute_force():
    model, trace, entries, table, sample_id, index, text = tiny_case()
    summary = neuron_ablation(trace, model, table, entries, batch_size=3)
    offset = {"hidden.weight": 0, "head.weight": 35}
    assert summary["flips"].sum() > 0
    for row, got in zip(table.itertuples(), summary.itertuples(), strict=True):
        n_in = SHAPES[row.param][1]
        own = set()
        for entry in range(95):
            at = entry - offset[row.param]
            if 0 <= at < int(np.prod(SHAPES[row.param])):
                own |= {entry} if (at % n_in if row.axis == "in" else at // n_in) == row.neuron else set()
        samples = sorted({s for s, chosen in zip(sample_id.tolist(), index.tolist(), strict=True) if own & set(chosen)})
        flips, count, positions, flipped, touched, touched_flips = {}, {}, 0, 0, 0, 0
        other = zeroed(model, row.param, row.neuron, row.axis)
        for sample in samples:
            one = np.array([text[sample]])
            if not one.size:
                continue
            pred = predict_one_by_one(copy.deepcopy(model), one)
            ablated = predict_one_by_one(other, one)
            f, c = flips_by_hand(pred, ablated)
            for token in c:
                flips[token], count[token] = flips.get(token, 0) + f[token], count.get(token, 0) + c[token]
            for p, a in zip(pred[0].tolist(), ablated[0].tolist(), strict=True):
                positions += 1
                flipped += p != a
                if {p, a} & set(row.tokens):
                    touched += 1
                    touched_flips += p != a
        tokens = {t for t in flips if flips[t]}
        notable_flipped = len(tokens & set(row.tokens))
        expected = (
            len(samples),
            positions,
            flipped,
            len(row.tokens),
            len(tokens),
            notable_flipped,
            touched,
            touched_flips,
        )
        found = (got.n_samples, got.n_predictions, got.flips, got.n_notable, got.flipped_tokens, got.notable_flipped)
        assert (*found, got.notable_positions, got.notable_flips) == expected
        assert got.flip_rate == pytest.approx(flipped / positions)
        for value, over, under in (
            (got.share, notable_flipped, len(tokens)),
            (got.notable_flip_rate, touched_flips, touched),
        ):
            assert value == pytest.approx(over / under if under else np.nan, nan_ok=True)


def test_draws_are_limited_reproducible_and_independent_of_other_rows():
    model, trace, entries, table, *_ = tiny_case()
    few = neuron_ablation(trace, model, table, entries, n_samples=3, seed=5)
    assert (few["n_samples"] == 3).all()
    assert neuron_ablation(trace, model, table, entries, n_samples=3, seed=5).equals(few)
    backwards = neuron_ablation(trace, model, table[::-1], entries, n_samples=3, seed=5)
    assert backwards[::-1].reset_index(drop=True).equals(few)
    assert not neuron_ablation(trace, model, table, entries, n_samples=3, seed=6).equals(few)


def test_planted_neurons_flip_their_words():
    world = planted_world()
    entries = np.arange(16)
    notable = notable_tokens(world.trace, entries, n_relative=5, n_notable=5)
    table = neurons(world.trace, entries, notable)
    assert all(set(row.tokens) == world.words[row.neuron] for row in table.itertuples())
    assert len(table) == 4
    summary = neuron_ablation(world.trace, PlantedLM(), table, entries)
    assert (summary["n_samples"] == 30).all()  # each sample once, though seen in two epochs
    assert (summary["notable_flip_rate"] == 1.0).all()
    assert (summary["share"] == 5 / 6).all()  # the five words, and the word 0 that they give way to


def test_a_predictor_takes_the_place_of_the_model():
    world = planted_world()
    entries = np.arange(16)
    table = neurons(world.trace, entries, notable_tokens(world.trace, entries))
    predictor = Predictor(PlantedLM(), world.trace.tokens()[1], batch_size=7)
    direct = neuron_ablation(world.trace, PlantedLM(), table, entries)
    assert neuron_ablation(world.trace, predictor, table, entries).equals(direct)


def test_no_neurons_give_an_empty_table():
    model, trace, entries, table, *_ = tiny_case()
    summary = neuron_ablation(trace, model, table.head(0), entries)
    assert len(summary) == 0
    assert list(summary.columns)[:7] == ["param", "module", "axis", "neuron", "n_samples", "n_predictions", "flips"]


def test_wrong_arguments_are_refused():
    model, trace, entries, table, *_ = tiny_case()
    with pytest.raises(ValueError, match=r"`Linear` has no parameter `h.*pass the model whose parameter names"):
        neuron_ablation(trace, model.head, table, entries)
    with pytest.raises(ValueError, match=r"has shape \(5, 8\) in `TinyLM`, but \(5, 6\) in the trace"):
        neuron_ablation(trace, TinyLM(width=8), table[table["param"] == "hidden.weight"], entries)
    with pytest.raises(ValueError, match="but lacks `tokens`; pass rows of `neurons` or `components`"):
        neuron_ablation(trace, model, table.drop(columns="tokens"), entries)
    with pytest.raises(ValueError, match="`n_samples` is 0, expected 1 or more"):
        neuron_ablation(trace, model, table, entries, n_samples=0)
    with pytest.raises(ValueError, match=r"the `Predictor` has texts of shape \(1, 1\) that differ"):
        neuron_ablation(trace, Predictor(model, np.zeros((1, 1), int)), table, entries)
    with pytest.raises(ValueError, match=r"`x.weight` is not tracked in this trace"):
        neuron_ablation(trace, model, table.assign(param="x.weight").head(1), entries)
