"""Neurons, heads, parts of heads and entries: tables, ablations and controls equal loops over samples and weights."""

from __future__ import annotations

import copy
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lightning_gradtrace.analysis import (
    Predictor,
    attention_heads,
    attributed_samples,
    components,
    count_flips,
    frequency_control,
    frequent_entries,
    neuron_ablation,
    neurons,
    notable_tokens,
    null_control,
    null_tokens,
    peer_control,
    permuted_links,
    random_control,
    with_tokens,
)
from lightning_gradtrace.analysis.flips import sample_flips
from tests.analysis.test_predictions import predict_one_by_one
from tests.analysis.traces import write_trace

SHAPES = {"attn.in_proj_weight": (24, 8), "attn.out_proj.weight": (8, 8)}
OFFSET = {"attn.in_proj_weight": 0, "attn.out_proj.weight": 192}
KINDS = ["neuron", "head", "head_part", "entry"]
PARTS = ["query", "key", "value", "output"]
find_tokens = partial(notable_tokens, min_count=4, n_notable=2)


class Attentive(nn.Module):
    """Four heads of packed attention, fed by an embedding and read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attn = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens):
        x = self.embed(tokens)
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        return self.head(self.attn(x, x, x, attn_mask=mask, need_weights=False)[0] + 0.3 * x)


@cache
def world():
    torch.manual_seed(2)
    model = Attentive()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    rng = np.random.default_rng(2)
    text = {100 + i: rng.integers(0, 12, size=rng.integers(3, 9)).tolist() for i in range(40)}
    sample_id = 100 + np.concatenate([rng.permutation(40) for _ in range(2)]).reshape(-1, 8)
    # a sample selects entries of one or two heads, more often those of the first
    kept = np.arange(40) * 6 + 5
    of_head = np.where(kept < 192, kept % 64 // 8 // 2, kept % 8 // 2)
    likes = rng.integers(-1, 4, size=(40, 2)).clip(0)
    index = np.stack(
        [np.sort(rng.choice(kept[np.isin(of_head, likes[s - 100])], size=3, replace=False)) for s in sample_id.flat]
    )
    trace = write_trace(SHAPES, sample_id, index, text=text, vocab=[f"w{t}" for t in range(12)])
    return trace, model, attention_heads(trace, 4), sample_id.reshape(-1), index, text


def masks(kind, row):
    """Entries of one component, as a boolean array of the shape of each parameter."""
    found = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    if kind == "neuron":
        found[row["param"]][:, row["neuron"]] = True
    elif kind == "entry":
        found[row["param"]].flat[row["index"]] = True
    else:
        own = slice(2 * row["head"], 2 * row["head"] + 2)
        for number, part in enumerate(PARTS):
            if kind == "head" or row["part"] == part:
                if part == "output":
                    found["attn.out_proj.weight"][:, own] = True
                else:
                    found["attn.in_proj_weight"][8 * number : 8 * number + 8][own] = True
    return found


def without(model, mask):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, off in mask.items():
            dict(model.named_parameters())[name][torch.as_tensor(off)] = 0
    return model


def occurrences_of(mask, index):
    own = {OFFSET[name] + int(i) for name, off in mask.items() for i in np.flatnonzero(off)}
    return [at for at, chosen in enumerate(index.tolist()) if own & set(chosen)]


def flips_of(model, mask, text, samples, tokens):
    """Return positions, flips, positions with a notable token, the flipped ones: summed over samples."""
    other = without(model, mask)
    total = np.zeros(4, int)
    for sample in samples:
        one = np.array([text[sample]])
        total += sample_flips(predict_one_by_one(model, one), predict_one_by_one(other, one), tokens)[0]
    return total


def table_of(kind, n=6):
    trace, _, heads, *_ = world()
    entries = frequent_entries(trace, 40)
    table = components(trace, entries, find_tokens(trace, entries), kind, heads=heads)
    return entries, table.head(n)


@pytest.mark.parametrize("kind", KINDS)
def test_table_equals_sets_of_occurrences_and_tokens(kind):
    trace, _, heads, sample_id, index, _ = world()
    entries, table = table_of(kind, None)
    notable = find_tokens(trace, entries)
    assert (table["n_notable"] > 0).any()
    assert table["n_notable"].is_monotonic_decreasing
    for row in table.to_dict("records"):
        mask = masks(kind, row)
        met = occurrences_of(mask, index)
        own = {OFFSET[name] + int(i) for name, off in mask.items() for i in np.flatnonzero(off)}
        assert row["n_entries"] == len(own & set(entries["entry"]))
        assert row["n_occurrences"] == len(met)
        assert row["n_samples"] == len(set(sample_id[met]))
        assert set(row["tokens"]) == set(notable.loc[notable["entry"].isin(own), "token"])
        assert row["text"] == tuple(f"w{token}" for token in row["tokens"])
    samples = attributed_samples(trace, entries, table, heads=heads)
    assert samples.groupby("place").size().tolist() == table["n_occurrences"].tolist()
    if kind == "neuron":
        pd.testing.assert_frame_equal(table, neurons(trace, entries, notable))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_wholes_are_taken_as_they_are(kind):
    trace, _, heads, *_ = world()
    entries, table = table_of(kind)
    whole = find_tokens(trace, entries, by=kind, heads=heads)
    found = with_tokens(trace, entries, whole, table, heads)
    names = [c for c in ("param", "axis", "neuron", "module", "head", "part", "index") if c in table]
    for row in found.to_dict("records"):
        same = np.logical_and.reduce([whole[name] == row[name] for name in names])
        assert set(row["tokens"]) == set(whole.loc[same, "token"])
        assert len(row["tokens"]) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_and_peers_equal_brute_force(kind):
    trace, model, heads, sample_id, index, text = world()
    entries, table = table_of(kind)
    summary = neuron_ablation(trace, model, table, entries, heads=heads)
    found = peer_control(trace, model, table, entries, heads=heads, n_peers=200, n_resamples=20)
    assert summary["flips"].sum() > 0
    sizes = {"neuron": 7, "head": 3, "head_part": 3}
    for place, row in enumerate(table.to_dict("records")):
        samples = sorted(set(sample_id[occurrences_of(masks(kind, row), index)]))
        positions, flips, touched, touched_flips = flips_of(model, masks(kind, row), text, samples, row["tokens"])
        one = summary.iloc[place]
        assert (one["n_predictions"], one["flips"]) == (positions, flips)
        assert (one["notable_positions"], one["notable_flips"]) == (touched, touched_flips)
        part = found.iloc[4 * place : 4 * place + 4]
        assert part["value"].iloc[0] == pytest.approx(flips / positions)
        assert (part["control"] == kind).all()
        if kind == "entry":
            continue
        assert (part["n_control"] == sizes[kind]).all()
        others = [{**row, "head": h} for h in range(4) if h != row["head"]] if "head" in row else []
        others += [{**row, "neuron": n} for n in range(8) if n != row["neuron"]] if kind == "neuron" else []
        rates = [flips_of(model, masks(kind, other), text, samples, row["tokens"]) for other in others]
        assert part["control_value"].iloc[0] == pytest.approx(np.mean([r[1] / r[0] for r in rates]))
        norms = [
            np.sqrt(sum((dict(model.named_parameters())[n].detach().numpy()[m] ** 2).sum() for n, m in mask.items()))
            for mask in [masks(kind, one) for one in (row, *others)]
        ]
        assert part["norm"].iloc[0] == pytest.approx(norms[0])
        assert part["control_norm"].iloc[0] == pytest.approx(np.mean(norms[1:]))


def test_peers_of_an_entry_are_other_entries_of_its_parameter():
    trace, model, _, sample_id, index, text = world()
    entries, table = table_of("entry", 1)
    row = table.iloc[0]
    everyone = peer_control(trace, model, table, entries, n_peers=500, n_resamples=5)
    size = int(np.prod(SHAPES[row["param"]]))
    assert (everyone["n_control"] == size - 1).all()
    samples = sorted(set(sample_id[occurrences_of(masks("entry", row), index)]))[:3]
    few = peer_control(trace, model, table, entries, n_peers=3, n_resamples=5, n_samples=len(samples))
    assert (few["n_control"] == 3).all()
    weight = dict(model.named_parameters())[row["param"]].detach().abs().numpy().reshape(-1)
    assert everyone["norm"].iloc[0] == pytest.approx(weight[row["index"]])
    assert everyone["control_norm"].iloc[0] == pytest.approx(np.delete(weight, row["index"]).mean())
    assert len(text) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_random_samples_equal_brute_force(kind):
    """All samples outside the attributed ones are drawn where these are at least as many."""
    trace, model, heads, sample_id, index, text = world()
    entries, table = table_of(kind, None)
    table = table.head(3)
    found = random_control(trace, model, table, entries, heads=heads, n_resamples=20)
    checked = 0
    for place, row in enumerate(table.to_dict("records")):
        own = set(sample_id[occurrences_of(masks(kind, row), index)])
        size = min(len(own), 40 - len(own))
        part = found.iloc[4 * place : 4 * place + 4]
        assert (part["n"] == size).all()
        assert (part["n_control"] == size).all()
        if len(own) <= 20:
            continue
        others = sorted(set(text) - own)
        total = flips_of(model, masks(kind, row), text, others, row["tokens"])
        assert part["control_value"].iloc[0] == pytest.approx(total[1] / total[0])
        checked += 1
    assert checked or kind != "head"


@pytest.mark.parametrize("kind", KINDS)
def test_matched_tokens_equal_brute_force(kind):
    trace, model, heads, sample_id, index, text = world()
    entries, table = table_of(kind)
    options = {"heads": heads, "n_matches": 50, "min_count": 1, "n_resamples": 20}
    found = frequency_control(trace, model, table, entries, by="token", **options)
    assert len(found) > 3
    names = [c for c in found.columns if c in table.columns and c not in ("tokens", "text")]
    for one in found.to_dict("records"):
        (row,) = (r for r in table.to_dict("records") if all(r[n] == one[n] for n in names))
        samples = sorted(set(sample_id[occurrences_of(masks(kind, row), index)]))
        width = max(map(len, text.values()))
        tokens = np.array([text[s] + [-1] * (width - len(text[s])) for s in samples])
        other = predict_one_by_one(without(model, masks(kind, row)), tokens)
        flips = count_flips(predict_one_by_one(model, tokens), other).set_index("token")
        count = flips.loc[one["token"], "count"]
        pool = [
            r["proportion"]
            for t, r in flips.iterrows()
            if t not in row["tokens"] and count / 2 <= r["count"] <= 2 * count
        ]
        assert one["value"] == pytest.approx(flips.loc[one["token"], "proportion"])
        assert one["n_control"] == len(pool)
        assert one["control_value"] == pytest.approx(np.mean(pool))


@pytest.mark.parametrize("kind", KINDS)
def test_null_equals_the_pipeline_by_hand(kind):
    trace, model, heads, sample_id, index, text = world()
    entries, table = table_of(kind)
    find = partial(find_tokens, by=kind, heads=heads)
    table = with_tokens(trace, entries, find(trace, entries), table, heads)
    # samples exchange their texts as wholes, so that there are as many as in truth, and none has to be drawn
    options = {"heads": heads, "find_tokens": find, "seed": 4, "within": "sample"}
    words = null_tokens(trace, entries, table, n_permutations=2, **options)
    found = null_control(trace, model, table, entries, n_resamples=20, **options)
    links = [permuted_links(trace, seed, "sample") for seed in (4, 5)]
    others = [with_tokens(trace, entries, find(trace, entries, links=one), table, heads) for one in links]
    rows = words[words["measure"] == "n_notable"]
    assert rows["value"].tolist() == table["n_notable"].tolist()
    np.testing.assert_allclose(rows["control_value"], np.mean([one["n_notable"] for one in others], axis=0))
    for place, row in enumerate(table.to_dict("records")):
        met = occurrences_of(masks(kind, row), index)
        linked = sorted(set(sample_id[links[0][met]]))
        part = found.iloc[4 * place : 4 * place + 4]
        total = flips_of(model, masks(kind, row), text, linked, others[0]["tokens"].iloc[place])
        assert (part["n_control"] == len(linked)).all()
        assert part["control_value"].iloc[0] == pytest.approx(total[1] / total[0])
        expected = total[3] / total[2] if total[2] else np.nan
        assert part["control_value"].iloc[1] == pytest.approx(expected, nan_ok=True)


def test_intervals_hold_their_effects_and_seeds_repeat_them():
    trace, model, heads, *_ = world()
    predictor = Predictor(model, trace.tokens()[1])
    for kind in KINDS:
        entries, table = table_of(kind, 2)
        for control in (random_control, peer_control, frequency_control, null_control):
            options = {"heads": heads, "n_resamples": 50, "seed": 3, "n_samples": 9}
            one, other = (control(trace, predictor, table, entries, **options) for _ in range(2))
            pd.testing.assert_frame_equal(one, other)
            bounded = one.dropna(subset="low")
            assert (bounded["low"] <= bounded["effect"] + 1e-12).all()
            assert (bounded["effect"] <= bounded["high"] + 1e-12).all()


def test_grouped_keys_compare_heads_of_the_same_parts():
    shapes = {"a.q_proj.weight": (8, 4), "a.k_proj.weight": (4, 4)}
    trace = write_trace(shapes, np.array([[0, 1]]), np.array([[0], [1]]), text={0: [1], 1: [2]})
    heads = attention_heads(trace, 4)
    from lightning_gradtrace.analysis._components import Components

    named = Components(trace, pd.DataFrame({"module": "a", "head": range(4)}), heads)
    assert [one.n_siblings for one in named] == [2, 2, 2, 2]
    first, _, _, last = named
    rng = np.random.default_rng(0)
    assert [peer.keys["head"] for peer in first.peers(5, rng)] == [1]
    assert [peer.keys["head"] for peer in last.peers(5, rng)] == [2]
    assert first.switch.params == ("a.k_proj.weight", "a.q_proj.weight")
    assert last.switch.params == ("a.q_proj.weight",)


def test_wrong_tables_are_refused():
    trace, model, heads, *_ = world()
    entries, table = table_of("head", 2)
    with pytest.raises(ValueError, match="names attention heads, which needs `heads`"):
        random_control(trace, model, table, entries)
    with pytest.raises(ValueError, match=r"`heads` holds no \{'module': 'attn', 'head': 7\}"):
        neuron_ablation(trace, model, table.head(1).assign(head=7), entries, heads=heads)
    with pytest.raises(ValueError, match="names some heads twice, expected each once"):
        neuron_ablation(trace, model, pd.concat([table, table]), entries, heads=heads)
    with pytest.raises(ValueError, match="names no neurons, heads or entries; pass rows of `neurons`"):
        neuron_ablation(trace, model, table[["tokens"]], entries, heads=heads)
    with pytest.raises(ValueError, match=r"so entries 0 to 63, but `index` is 64"):
        one = pd.DataFrame({"param": ["attn.out_proj.weight"], "index": [64], "tokens": [(1,)]})
        neuron_ablation(trace, model, one, entries)
    with pytest.raises(ValueError, match="`by` is 'param', expected one of 'neuron', 'head_part', 'head', 'entry'"):
        components(trace, entries, find_tokens(trace, entries), "param")
    whole = find_tokens(trace, entries, by="param")
    with pytest.raises(ValueError, match=r"lacks the columns \['head', 'part'\]; .* of entries or `by=\"head_part\"`"):
        components(trace, entries, whole, "head_part", heads=heads)
