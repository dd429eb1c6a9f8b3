"""Ablation changes one line of one weight and leaves no trace of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradtrace.analysis import zero_ablation
from tests.analysis.models import TinyLM


def bits(model):
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("axis", "neuron"), [("in", 4), ("out", 2)])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit(axis, neuron, fails):
    model = TinyLM()
    with torch.no_grad():  # values that a subtraction or a multiplication would not bring back
        model.hidden.weight[2, :3] = torch.tensor([-0.0, float("nan"), 1e-42])
        model.hidden.weight[:3, 4] = torch.tensor([-0.0, float("inf"), 1e-42])
    before = bits(model)
    weight = model.hidden.weight
    try:
        with zero_ablation(model, "hidden.weight", neuron, axis):
            expected = before["hidden.weight"].clone()
            expected[(slice(None), neuron) if axis == "in" else neuron] = 0
            assert torch.equal(weight.detach().view(torch.int32), expected)
            assert same({**bits(model), "hidden.weight": 0 * expected}, {**before, "hidden.weight": 0 * expected})
            if fails:
                raise RuntimeError("inside")
    except RuntimeError as error:
        assert str(error) == "inside"
    assert same(bits(model), before)
    assert model.hidden.weight is weight


def test_gradients_and_mode_are_not_touched():
    model = TinyLM().train()
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    gradient = model.hidden.weight.grad.clone()
    with zero_ablation(model, "hidden.weight", 0):
        assert model.training
        assert model.hidden.weight.requires_grad
    assert torch.equal(model.hidden.weight.grad, gradient)
    assert model.hidden.weight.grad_fn is None


def test_tied_weights_are_found_under_each_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with zero_ablation(model, "b.weight", 1):
        assert np.array_equal(model["a"].weight.detach()[:, 1], np.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hiden.weight", 0), "`TinyLM` has no parameter `hiden.weight`; similar names: `hidden.weight`"),
        (("zzz", 0), "`TinyLM` has no parameter `zzz`; pass the model whose parameter names the trace holds"),
        (("hidden.bias", 0), r"`hidden.bias` has shape \(5,\); only parameters of shape \(out, in\) have neurons"),
        (("hidden.weight", 6), r"`hidden.weight` of this model has 6 columns \(0 to 5\), but `neuron` is 6"),
        (("hidden.weight", 5, "out"), r"has 5 rows \(0 to 4\), but `neuron` is 5"),
        (("hidden.weight", -1), "but `neuron` is -1"),
        (("hidden.weight", 0, "column"), "`axis` is 'column', expected"),
    ],
)
def test_wrong_neurons_are_refused(arguments, message):
    model = TinyLM()
    before = bits(model)
    with pytest.raises(ValueError, match=message), zero_ablation(model, *arguments):
        pass
    assert same(bits(model), before)
