"""Predictions equal one sample at a time, and leave the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradtrace.analysis import Predictor, flip_table, predict, zero_ablation
from tests.analysis.models import TinyLM


def ragged(n=23, width=7, vocabulary=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, size=(n, width))
    for row, length in enumerate(rng.integers(0, width + 1, size=n)):
        tokens[row, length:] = -1
    return tokens


def predict_one_by_one(model, tokens):
    model = model.eval()
    found = np.full(tokens.shape, -1)
    for row, text in enumerate(tokens):
        length = int((text >= 0).sum())
        if length:
            logits = model(torch.tensor(text[:length][None])).detach().numpy()[0]
            for position in range(length):
                found[row, position] = max(range(logits.shape[1]), key=lambda t: logits[position, t])
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 64])
def test_predictions_equal_one_sample_at_a_time(batch_size):
    tokens = ragged()
    model = TinyLM()
    found = predict(model, tokens, batch_size=batch_size)
    assert np.array_equal(found, predict_one_by_one(model, tokens))
    assert np.array_equal(found < 0, tokens < 0)


def test_model_never_sees_padding_nor_a_square_batch():
    shapes = []

    def forward(model, tokens):
        assert (tokens >= 0).all()
        shapes.append(tuple(tokens.shape))
        return model(tokens)

    for n in range(1, 12):
        predict(TinyLM(), np.zeros((n, 5), dtype=int), batch_size=5, forward=forward)
        predict(TinyLM(), ragged(n), batch_size=64, forward=forward)
    assert all(rows != length or length == 1 for rows, length in shapes)


def test_modes_and_gradients_are_left_alone():
    model = TinyLM().train()
    model.hidden.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    modes = []

    def forward(model, tokens):
        modes.append((model.training, model.dropout.training, torch.is_grad_enabled()))
        return model(tokens)

    predict(model, ragged(), forward=forward)
    assert set(modes) == {(False, False, False)}
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_mode_comes_back_after_an_exception():
    model = TinyLM().train()

    def forward(model, tokens):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        predict(model, ragged(), forward=forward)
    assert model.training
    assert model.dropout.training


def test_model_stays_trainable_afterwards():
    # inference mode would leave behind tensors that can't be used in training
    class Caching(TinyLM):
        def forward(self, tokens):
            if not hasattr(self, "scale"):
                self.scale = torch.ones(1)
            return super().forward(tokens) * self.scale

    model = Caching()
    predict(model, ragged())
    model.train()(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("length", [6, 4])
def test_swapped_axes_are_noticed(length):
    tokens = np.zeros((4, length), dtype=int)
    with pytest.raises(ValueError, match=r"vocabulary\), samples first; give `forward=lambda model, tokens"):
        predict(TinyLM(), tokens, forward=lambda model, tokens: model(tokens).transpose(0, 1))


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(ValueError, match="the model returned a tuple for tokens of shape"):
        predict(TinyLM(), ragged(), forward=lambda model, tokens: (model(tokens), None))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.array([[1, -1, 2]]), {}, r"`tokens` holds padding \(-1\) before a token"),
        (np.array([[-1, 1]]), {}, "expected padding only after the last token"),
        (np.array([1, 2]), {}, r"`tokens` has shape \(2,\), expected \(sample, position\)"),
        (np.array([[1, 2]]), {"batch_size": 0}, "`batch_size` is 0, expected 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        predict(TinyLM(), tokens, **options)


def test_predictor_predicts_each_sample_once():
    model, tokens, seen = TinyLM(), ragged(), []

    def forward(model, batch):
        seen.append(len(batch))
        return model(batch)

    predictor = Predictor(model, tokens, forward=forward)
    rows = np.array([3, 9, 3, 0])
    assert np.array_equal(predictor(rows), predict(model, tokens)[rows])
    done = sum(seen)
    predictor(np.array([0, 3]))
    assert sum(seen) == done <= 3 + 3  # the first time, three rows to see that samples stay apart
    neuron = ("hidden.weight", 2, "in")
    with zero_ablation(model, *neuron):
        ablated = predict(model, tokens)
    assert np.array_equal(predictor(rows, neuron), ablated[rows])
    assert np.array_equal(predictor(rows), predict(model, tokens)[rows])
    assert predictor(np.zeros(0, dtype=int)).shape == (0, 7)


def test_attention_of_transformer_encoders_is_ablated():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.3, batch_first=True)
    model = nn.Sequential(nn.Embedding(9, 8), layer, nn.Linear(8, 9))
    tokens = ragged(vocabulary=9)
    rows = np.arange(len(tokens))
    predictor = Predictor(model, tokens)
    changed = [predictor(rows, ("1.self_attn.in_proj_weight", n, "out")) != predictor(rows) for n in range(24)]
    assert np.any(changed[16:])  # values
    with torch.no_grad():
        layer.self_attn.in_proj_weight[5] = 0
    assert np.array_equal(predict(model, tokens), predictor(rows, ("1.self_attn.in_proj_weight", 5, "out")))


class PositionsFirst(TinyLM):
    """Takes and returns positions first."""

    def forward(self, tokens):
        return super().forward(tokens.T).transpose(0, 1)


def test_a_model_that_takes_samples_for_positions_is_refused():
    tokens = np.random.default_rng(0).integers(0, 9, (4, 6))
    neuron = ("hidden.weight", 2, "in")
    for call in (
        lambda **options: flip_table(PositionsFirst(), tokens, *neuron, **options),
        lambda **options: Predictor(PositionsFirst(), tokens, **options)(np.arange(4), neuron),
    ):
        with pytest.raises(ValueError, match="takes tokens as \\(position, sample\\); give `forward="):
            call()
        call(forward=lambda model, tokens: model(tokens.T).transpose(0, 1))
        call(batch_size=1)
