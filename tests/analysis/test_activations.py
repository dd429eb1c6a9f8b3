"""Activations equal those that hooks see text by text; ranks and lists equal sorting."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lightning_gradtrace.analysis import activation_baseline, movers, neurons, notable_tokens, top_samples
from lightning_gradtrace.analysis._activation import activations
from tests.analysis.models import PlantedLM, TinyLM, planted_world
from tests.analysis.test_ablate import AttentionLM, EinsumLM, lively
from tests.analysis.test_predictions import ragged
from tests.analysis.traces import random_trace


def all_activations(model, tokens, param, axis, batch_size=4):
    found = {}
    for rows, values in activations(model, tokens, param, axis, batch_size, None):
        found |= dict(zip(rows.tolist(), values, strict=True))
    return found


def linear_inputs(model, module, text):
    """Input of a linear module for one text: (position, in)."""
    kept = []
    model = copy.deepcopy(model).eval()
    hook = lambda _, args: kept.append(args[0])  # noqa: E731
    model.get_submodule(module).register_forward_pre_hook(hook)
    with torch.enable_grad():  # keeps attention from its fused path
        model(torch.as_tensor(text)[None])
    return kept[0].detach().reshape(len(text), -1)


@pytest.mark.parametrize(
    ("kind", "module"),
    [(TinyLM, "hidden"), (TinyLM, "head"), (AttentionLM, "layer.linear1"), (AttentionLM, "layer.linear2")],
)
def test_activations_equal_those_of_hooks(kind, module):
    model, tokens = lively(kind), ragged(25, 9)
    weight = model.get_submodule(module).weight
    inputs = all_activations(model, tokens, f"{module}.weight", "in")
    outputs = all_activations(model, tokens, f"{module}.weight", "out")
    assert set(inputs) == set(np.flatnonzero((tokens >= 0).any(1)).tolist())
    for row, found in inputs.items():
        expected = linear_inputs(model, module, tokens[row][tokens[row] >= 0])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs[row], F.linear(expected, weight).detach(), rtol=1e-4, atol=1e-4)


def test_a_weight_that_no_module_calls():
    """The output projection of attention; its input times the weight is its output."""
    model, tokens = lively(AttentionLM), ragged(25, 9)
    inputs, outputs = (all_activations(model, tokens, "layer.self_attn.out_proj.weight", a) for a in ("in", "out"))
    weight = model.layer.self_attn.out_proj.weight.detach()
    for row, found in inputs.items():
        np.testing.assert_allclose(F.linear(torch.as_tensor(found), weight), outputs[row], rtol=1e-4, atol=1e-4)


def test_baseline_equals_means_over_positions():
    raw = random_trace()
    model = lively(TinyLM)
    table = pd.DataFrame(
        {"param": "hidden.weight", "axis": ["in", "in", "out"], "neuron": [1, 4, 2], "tokens": [(3, 5), (4,), (3, 99)]}
    )
    trace = trace_of_model(raw)
    found = activation_baseline(trace, model, table, batch_size=3)
    assert found[["neuron", "token"]].to_numpy().tolist() == [[1, 3], [1, 5], [4, 4], [2, 3]]
    for row in found.itertuples():
        at, everything = [], []
        for text in raw.text.values():
            values = linear_inputs(model, "hidden", np.array(text))
            values = F.linear(values, model.hidden.weight).detach() if row.axis == "out" else values
            everything.append(values)
            at.append(values[np.array(text) == row.token])
        mean = torch.cat(at).mean(0).numpy()
        assert row.positions == len(torch.cat(at))
        assert row.mean == pytest.approx(mean[row.neuron], rel=1e-4, abs=1e-5)
        assert row.mean_all == pytest.approx(float(torch.cat(everything).mean(0)[row.neuron]), rel=1e-4, abs=1e-5)
        order = np.argsort(-mean).tolist()
        assert row.rank_high == order.index(row.neuron) + 1
        assert row.rank_low == len(order) - order.index(row.neuron)
        assert row.n_neurons == len(mean)


def trace_of_model(raw):
    from tests.analysis.traces import write_trace

    shapes = {"hidden.weight": (5, 6), "head.weight": (12, 5)}
    index = np.stack([np.sort(np.random.default_rng(i).permutation(90)[:6]) for i in range(60)])
    sample_id = np.array(raw.sample_id).reshape(12, 5)
    return write_trace(shapes, sample_id, index, text=raw.text, vocab=[f"w{t}" for t in range(12)])


def test_top_samples_of_both_kinds():
    raw = random_trace()
    model, trace = lively(TinyLM), trace_of_model(raw)
    table = pd.DataFrame({"param": "hidden.weight", "axis": "in", "neuron": [4, 1]})
    found = top_samples(trace, model, table, n=4, batch_size=3)
    moved = movers(trace, None, "neuron", n=4)
    for neuron in (1, 4):
        part = found[(found["neuron"] == neuron) & (found["kind"] == "activation")]
        best = {}
        for sample, text in raw.text.items():
            values = linear_inputs(model, "hidden", np.array(text))[:, neuron].numpy()
            best[sample] = (abs(values).max(), values[abs(values).argmax()], abs(values).argmax())
        expected = sorted(best, key=lambda s: -best[s][0])[:4]
        np.testing.assert_allclose(part["value"], [best[s][1] for s in expected], rtol=1e-4)
        shifts = found[(found["neuron"] == neuron) & (found["kind"] == "shift")]
        own = moved[(moved["param"] == "hidden.weight") & (moved["neuron"] == neuron)]
        assert shifts["sample_id"].tolist() == own["sample_id"].tolist()
        np.testing.assert_allclose(shifts["value"], own["moved"])
        both = set(part["sample_id"]) & set(shifts["sample_id"])
        assert set(part.loc[part["both"], "sample_id"]) == both
        for row in part.itertuples():
            assert row.text == " ".join(f"w{t}" for t in raw.text[row.sample_id])


def test_planted_neurons_are_the_most_active_on_their_words():
    world = planted_world()
    table = neurons(world.trace, np.arange(16), notable_tokens(world.trace, np.arange(16), n_relative=5))
    found = activation_baseline(world.trace, PlantedLM(), table)
    assert len(found) == 20
    assert (found["rank_high"] == 1).all()
    assert (found["mean"] == 1).all()


def test_what_has_no_single_activation_is_refused():
    model, tokens = lively(EinsumLM), ragged(5, 6)
    with pytest.raises(ValueError, match="`W_1` is used 2 times in a forward pass, expected once"):
        all_activations(model, tokens, "W_1", "in")
    with pytest.raises(ValueError, match=r"`W_V` has shape \(2, 6, 3\); only parameters of shape"):
        all_activations(model, tokens, "W_V", "in")
    with pytest.raises(ValueError, match=r"`neurons` lacks the columns \['tokens'\]"):
        activation_baseline(random_trace().trace, model, pd.DataFrame({"param": [], "axis": [], "neuron": []}))
    trace = trace_of_model(random_trace())
    with pytest.raises(ValueError, match="`n_samples` is 0, expected 1 or more"):
        one = pd.DataFrame({"param": ["hidden.weight"], "axis": ["in"], "neuron": [0]})
        top_samples(trace, lively(TinyLM), one, n_samples=0)
