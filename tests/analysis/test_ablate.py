"""Ablations in one pass equal models changed by hand and run one text at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradtrace.analysis import (
    Predictor,
    ablate,
    ablation_effects,
    attention_heads,
    count_flips,
    flip_tables,
    neuron_ablation,
    neurons,
    notable_tokens,
    random_control,
    token_losses,
)
from tests.analysis.models import PlantedLM, TinyLM, planted_world
from tests.analysis.test_predictions import ragged

VOCABULARY = 12


class AttentionLM(nn.Module):
    """Position first inside, as in the reference experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.3)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.head(self.layer(x, src_mask=mask)).transpose(0, 1)


class EinsumLM(nn.Module):
    """Bare parameters: einsum heads, a transposed product, a weight used twice, samples and positions merged."""

    def __init__(self) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(VOCABULARY, 6))
        self.W_V = nn.Parameter(torch.randn(2, 6, 3))
        self.W_O = nn.Parameter(torch.randn(2, 3, 6))
        self.W_1 = nn.Parameter(torch.randn(6, 6) * 0.4)

    def forward(self, tokens):
        x = self.W_E[tokens]
        v = torch.einsum("bpd,hdk->bphk", x, self.W_V)
        x = x + torch.einsum("bphk,hkd->bpd", v.cumsum(1), self.W_O)
        for _ in range(2):
            x = torch.tanh(x @ self.W_1.T)
        flat = torch.addmm(torch.zeros(VOCABULARY), x.reshape(-1, 6), self.W_E.T)
        return flat.view(*tokens.shape, VOCABULARY)


class Branching(TinyLM):
    """Control flow that depends on values, which vmap refuses."""

    def forward(self, tokens):
        logits = super().forward(tokens)
        if not logits.isfinite().all().item():
            raise FloatingPointError
        return logits


class InPlace(TinyLM):
    """Writes a weight's contribution into a tensor that is there already."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.randn(12))
        self.mix = nn.Parameter(torch.randn(12, 12))

    def forward(self, tokens):
        logits = super().forward(tokens).clone()
        flat = logits.view(-1, 12)
        flat.addmm_(F.one_hot(tokens.reshape(-1), 12).float(), self.mix.T)
        flat.add_(self.extra)
        return logits


def lively(kind, seed=0):
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.7)
    return model


def one_by_one(model, tokens):
    """Predictions and losses, text by text."""
    model = copy.deepcopy(model).eval()
    pred, loss = np.full(tokens.shape, -1), np.full(tokens.shape, np.nan)
    for row, text in enumerate(tokens):
        text = torch.as_tensor(text[text >= 0])
        if len(text):
            with torch.no_grad():
                logits = model(text[None])[0]
            pred[row, : len(text)] = logits.argmax(-1).numpy()
            if len(text) > 1:
                loss[row, : len(text) - 1] = F.cross_entropy(logits[:-1], text[1:], reduction="none").numpy()
    return pred, loss


def zeroed(model, *parts):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, index in parts:
            dict(model.named_parameters())[name][index] = 0
    return model


def assert_same(pred, loss, expected):
    np.testing.assert_allclose(loss, expected[1], rtol=2e-4, atol=2e-5)
    assert (pred == expected[0]).mean() > 0.995  # a tie may fall either way
    assert ((pred < 0) == (expected[0] < 0)).all()


CASES = [
    (TinyLM, "hidden.weight", "head.weight"),
    (AttentionLM, "layer.linear1.weight", "layer.self_attn.out_proj.weight"),
    (AttentionLM, "layer.self_attn.in_proj_weight", "embed.weight"),
    (EinsumLM, "W_1", "W_E"),
    (Branching, "hidden.weight", "head.weight"),
]


@pytest.mark.parametrize("max_bytes", [1, 1 << 30])
@pytest.mark.parametrize(("kind", "first", "second"), CASES)
def test_zero_ablation_equals_zeroed_copies(kind, first, second, max_bytes):
    model, tokens = lively(kind), ragged(25, 9)
    rows = [(first, axis, n) for axis in ("in", "out") for n in range(5)] + [(second, "in", 1), (second, "in", 2)]
    what = pd.DataFrame(rows, columns=["param", "axis", "neuron"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = ablate(model, tokens, what, batch_size=4, max_bytes=max_bytes)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_same(found.pred, found.loss, one_by_one(model, tokens))
    changed = 0
    for number, (param, axis, neuron) in enumerate(rows):
        other = zeroed(model, (param, (slice(None), neuron) if axis == "in" else neuron))
        assert_same(found.ablated[number], found.ablated_loss[number], one_by_one(other, tokens))
        changed += (found.ablated[number] != found.pred).sum()
    assert changed > 0
    assert found.keys.to_dict("list") == what.to_dict("list")


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_contributions_written_in_place(how):
    model, tokens = lively(InPlace), ragged(25, 9)
    what = pd.DataFrame({"param": ["mix", "mix", "extra"], "index": [5, 40, 3]})
    reference = np.array([[5]])  # its one-hot input meets column 5 of `mix` only
    found = ablate(model, tokens, what, how, reference=reference, batch_size=4)
    for number, (param, index) in enumerate((("mix", (0, 5)), ("mix", (3, 4)), ("extra", (3,)))):
        other = zeroed(model, (param, index))
        if how == "mean" and number != 1:
            with torch.no_grad():
                other.extra[index[0]] += dict(model.named_parameters())[param][index]
        assert_same(found.ablated[number], found.ablated_loss[number], one_by_one(other, tokens))


def test_vmap_and_one_at_a_time_agree():
    model, tokens = lively(AttentionLM), ragged(25, 9)
    what = pd.DataFrame({"param": "layer.linear2.weight", "axis": "in", "neuron": range(6)})
    together = ablate(model, tokens, what, "mean", batch_size=4)
    alone = [ablate(model, tokens, what.iloc[[i]], "mean", batch_size=4) for i in range(6)]
    np.testing.assert_allclose(
        together.ablated_loss, np.concatenate([a.ablated_loss for a in alone]), rtol=1e-4, atol=1e-5
    )


def with_input(model, change):
    """TinyLM whose input of `hidden` is changed by hand."""
    model = copy.deepcopy(model)
    model.hidden.register_forward_pre_hook(lambda _, args: (change(args[0].clone()),))
    return model


def inputs_of(model, tokens):
    """Inputs of `hidden` at every position of every text: (position, width)."""
    kept = []
    model = copy.deepcopy(model).eval()
    model.hidden.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    for text in tokens:
        if (text >= 0).any():
            model(torch.as_tensor(text[text >= 0])[None])
    return torch.cat(kept).detach()


def test_mean_ablation_of_a_column_replaces_the_input_by_its_mean():
    model, tokens, reference = lively(TinyLM), ragged(25, 9), ragged(30, 7)
    mean = inputs_of(model, reference).mean(0)
    what = pd.DataFrame({"param": "hidden.weight", "axis": "in", "neuron": [0, 3]})
    found = ablate(model, tokens, what, "mean", reference=reference, batch_size=4)
    for number, neuron in enumerate((0, 3)):

        def change(x, neuron=neuron):
            x[..., neuron] = mean[neuron]
            return x

        assert_same(found.ablated[number], found.ablated_loss[number], one_by_one(with_input(model, change), tokens))
    assert (found.ablated != found.pred).any()


def test_mean_ablation_of_a_row_replaces_the_output_by_its_mean():
    model, tokens = lively(TinyLM), ragged(25, 9)
    x = inputs_of(model, tokens)
    mean = F.linear(x, model.hidden.weight).detach().mean(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.hidden.weight[2] = 0
        other.hidden.bias[2] += mean[2]
    found = ablate(model, tokens, pd.DataFrame({"param": ["hidden.weight"], "axis": ["out"], "neuron": [2]}), "mean")
    assert_same(found.ablated[0], found.ablated_loss[0], one_by_one(other, tokens))


def outputs_of_heads(model, tokens):
    """Return what the heads hand to the output projection of the whole model, position by position."""
    plain, kept = copy.deepcopy(model).eval(), []
    with torch.no_grad():
        plain.layer.self_attn.out_proj.weight.copy_(torch.eye(8))
        plain.layer.self_attn.out_proj.bias.zero_()
    plain.layer.self_attn.register_forward_hook(lambda module, given, output: kept.append(output[0].reshape(-1, 8)))
    for text in tokens:
        plain(torch.as_tensor(text[text >= 0])[None])
    return torch.cat(kept).detach()


def test_mean_ablation_of_a_head_replaces_its_output_by_that_of_the_whole_model():
    """Queries, keys, values and outputs are switched off together; none sees what the others' absence does."""
    model, tokens, reference = lively(AttentionLM), ragged(25, 9), ragged(30, 7)
    params = pd.DataFrame([(n, tuple(p.shape)) for n, p in model.named_parameters()], columns=["param", "shape"])
    heads = attention_heads(params, model=model)
    mean = outputs_of_heads(model, reference).mean(0)
    found = ablate(model, tokens, heads, "mean", reference=reference, batch_size=4)
    for head in range(2):
        other, columns = copy.deepcopy(model), slice(4 * head, 4 * head + 4)
        out = other.layer.self_attn.out_proj
        with torch.no_grad():
            out.bias += out.weight[:, columns] @ mean[columns]
            out.weight[:, columns] = 0
        assert_same(found.ablated[head], found.ablated_loss[head], one_by_one(other, tokens))
    drawn = ablate(model, tokens, heads, "resample", reference=reference, batch_size=4)
    assert np.nanmax(np.abs(drawn.ablated_loss - found.ablated_loss)) > 0.01


@pytest.mark.parametrize(
    ("kind", "param", "axis"),
    [
        (AttentionLM, "layer.self_attn.in_proj_weight", "out"),
        (AttentionLM, "layer.self_attn.out_proj.weight", "in"),
        (EinsumLM, "W_1", "in"),
    ],
)
def test_resampling_from_a_single_position_is_mean_ablation(kind, param, axis):
    """One position in the reference: its mean and every draw from it are the same."""
    model, tokens = lively(kind), ragged(25, 9)
    reference = np.array([[3]])
    what = pd.DataFrame({"param": param, "axis": axis, "neuron": range(4)})
    mean = ablate(model, tokens, what, "mean", reference=reference, batch_size=4)
    drawn = ablate(model, tokens, what, "resample", reference=reference, batch_size=4)
    np.testing.assert_allclose(drawn.ablated_loss, mean.ablated_loss, rtol=1e-5, atol=1e-6)
    zero = ablate(model, tokens, what, "zero", batch_size=4)
    assert np.nanmax(np.abs(zero.ablated_loss - mean.ablated_loss)) > 0.01


def test_resampling_draws_values_of_the_reference():
    """Every loss is one that some position of the reference gives, and not all are alike."""
    model, tokens = lively(TinyLM), np.array([[1, 2]] * 40)
    reference = np.array([[4], [5], [6]])
    values = inputs_of(model, reference)[:, 1]
    what = pd.DataFrame({"param": ["hidden.weight"], "axis": ["in"], "neuron": [1]})
    found = ablate(model, tokens, what, "resample", reference=reference, seed=1)
    possible = []
    for value in values:

        def change(x, value=value):
            x[..., 1] = value
            return x

        possible.append(one_by_one(with_input(model, change), tokens[:1])[1][0, 0])
    distance = np.abs(found.ablated_loss[0, :, 0][:, None] - np.array(possible))
    assert (distance.min(axis=1) < 1e-5).all()
    assert len(set(distance.argmin(axis=1))) == 3
    again = ablate(model, tokens, what, "resample", reference=reference, seed=1)
    np.testing.assert_array_equal(again.ablated_loss, found.ablated_loss)


def test_heads_and_entries_equal_zeroed_copies():
    model, tokens = lively(AttentionLM), ragged(25, 9)
    params = pd.DataFrame([(n, tuple(p.shape)) for n, p in model.named_parameters()], columns=["param", "shape"])
    heads = attention_heads(params, model=model)
    found = ablate(model, tokens, heads, batch_size=4)
    assert found.keys.to_dict("list") == {"module": ["layer.self_attn"] * 2, "head": [0, 1]}
    for head in range(2):
        rows = [slice(8 * part + 4 * head, 8 * part + 4 * head + 4) for part in range(3)]
        parts = [("layer.self_attn.in_proj_weight", row) for row in rows]
        parts.append(("layer.self_attn.out_proj.weight", (slice(None), slice(4 * head, 4 * head + 4))))
        expected = one_by_one(zeroed(model, *parts), tokens)
        assert_same(found.ablated[head], found.ablated_loss[head], expected)
    entries = pd.DataFrame({"param": ["layer.linear1.weight"] * 2, "index": [3, 17]})
    found = ablate(model, tokens, entries, batch_size=4)
    for number, index in enumerate(((0, 3), (2, 1))):
        expected = one_by_one(zeroed(model, ("layer.linear1.weight", index)), tokens)
        assert_same(found.ablated[number], found.ablated_loss[number], expected)


def test_tables_equal_sums_over_positions():
    model, tokens = lively(TinyLM), ragged(25, 9)
    what = pd.DataFrame({"param": "hidden.weight", "axis": "in", "neuron": [0, 3]})
    found = ablate(model, tokens, what)
    table = ablation_effects(found, n_resamples=99)
    losses = token_losses(found, vocab=[f"w{t}" for t in range(12)])
    flips = flip_tables(found)
    for number, row in enumerate(table.itertuples()):
        before, after, by_token = [], [], {}
        for sample, text in enumerate(tokens):
            for position in range((text >= 0).sum() - 1):
                change = float(found.loss[sample, position]), float(found.ablated_loss[number][sample, position])
                before.append(change[0])
                after.append(change[1])
                by_token.setdefault(text[position + 1], []).append(change)
        assert (row.n_targets, row.n_predictions) == (len(before), (tokens >= 0).sum())
        assert row.loss == pytest.approx(np.mean(before), rel=1e-5)
        assert row.loss_change == pytest.approx(np.mean(after) - np.mean(before), rel=1e-4)
        assert row.low < row.loss_change < row.high
        part = losses[losses["neuron"] == what["neuron"][number]].set_index("token")
        assert part["loss_change"].is_monotonic_decreasing
        for token, pairs in by_token.items():
            one = part.loc[token]
            assert (one["count"], one["text"]) == (len(pairs), f"w{token}")
            assert one["loss_change"] == pytest.approx(np.mean([b - a for a, b in pairs]), rel=1e-4, abs=1e-6)
        expected = count_flips(found.pred, found.ablated[number])
        got = flips[flips["neuron"] == what["neuron"][number]].reset_index(drop=True)
        assert got[expected.columns].equals(expected)
        assert row.flips == (found.pred != found.ablated[number]).sum()
    few = token_losses(found, min_count=5)
    assert (few["count"] >= 5).all()


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_controls_run_with_any_ablation(how):
    world, entries = planted_world(), np.arange(16)
    table = neurons(world.trace, entries, notable_tokens(world.trace, entries, n_relative=5, n_notable=5))
    predictor = Predictor(PlantedLM(), world.trace.tokens()[1], how=how)
    summary = neuron_ablation(world.trace, predictor, table, entries)
    control = random_control(world.trace, predictor, table, entries, n_resamples=9)
    # The mean of a topic's neuron over all positions is small: its words lose against word 0 as without it.
    assert (summary["notable_flip_rate"] > 0.9).all()
    assert len(control) == 16
    tokens = world.trace.tokens()[1]
    first = tuple(table.iloc[0][["param", "neuron", "axis"]])
    direct = ablate(PlantedLM(), tokens, table.head(1), how, reference=tokens[:512])
    np.testing.assert_array_equal(predictor(np.arange(20), first), direct.ablated[0][:20])


def test_loss_is_nan_where_no_token_follows():
    found = ablate(lively(TinyLM), np.array([[1, 2, -1], [3, -1, -1]]), [])
    assert np.isnan(found.loss).tolist() == [[False, True, True], [True, True, True]]
    assert found.ablated.shape == (0, 2, 3)
    uniform = TinyLM()
    with torch.no_grad():
        for weight in uniform.parameters():
            weight.zero_()
    assert ablate(uniform, np.array([[1, 2]]), []).loss[0, 0] == pytest.approx(math.log(12))


def test_what_does_not_fit_is_refused():
    model, tokens = lively(TinyLM), ragged(5, 6)
    for what, message in (
        ({"param": ["hidden.weight"], "axis": ["in"], "neuron": [6]}, r"has shape \(5, 6\), which doesn't hold"),
        ({"param": ["hidden.weight"], "index": [30]}, r"has shape \(5, 6\), so no entry of index 30"),
        ({"param": ["hidden.bias"], "axis": ["in"], "neuron": [0]}, r"only parameters of shape \(out, in\)"),
        ({"param": ["hiden.weight"], "axis": ["in"], "neuron": [0]}, "similar names: `hidden.weight`"),
        ({"param": ["hidden.weight"]}, "names nothing to switch off; pass rows of `neurons`"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(model, tokens, pd.DataFrame(what))
    with pytest.raises(ValueError, match="`how` is 'median', expected one of 'zero', 'mean', 'resample'"):
        ablate(model, tokens, [], "median")
    what = pd.DataFrame({"param": ["hidden.weight"], "axis": ["in"], "neuron": [0]})
    with pytest.raises(ValueError, match="`reference` holds no token, and mean ablation needs some"):
        ablate(model, tokens, what, "mean", reference=np.full((2, 3), -1))
    with pytest.raises(ValueError, match="`min_count` is 0"):
        token_losses(ablate(model, tokens, what), min_count=0)
