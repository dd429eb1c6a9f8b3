"""Flip counts equal counting positions one by one; the post's numbers come out."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradtrace.analysis import count_flips
from lightning_gradtrace.analysis.flips import sample_flips, token_flips


def predictions(seed=0, n=12, width=6, vocabulary=7):
    rng = np.random.default_rng(seed)
    pred = rng.integers(0, vocabulary, size=(n, width))
    ablated = np.where(rng.random(pred.shape) < 0.4, rng.integers(0, vocabulary, size=pred.shape), pred)
    padding = np.arange(width) >= rng.integers(0, width + 1, size=n)[:, None]
    return np.where(padding, -1, pred), np.where(padding, -1, ablated)


def flips_by_hand(pred, ablated):
    flips, count = {}, {}
    for p, a in zip(pred.reshape(-1).tolist(), ablated.reshape(-1).tolist(), strict=True):
        if p < 0:
            continue
        for token in {p, a}:
            count[token] = count.get(token, 0) + 1
            flips[token] = flips.get(token, 0) + (p != a)
    return flips, count


def test_flip_table_equals_brute_force():
    pred, ablated = predictions()
    flips, count = flips_by_hand(pred, ablated)
    expected = sorted(((t, flips[t], count[t]) for t in count), key=lambda r: (-r[1], -r[2], r[0]))
    table = count_flips(pred, ablated, [f"w{t}" for t in range(7)])
    assert list(table.columns) == ["token", "text", "flips", "count", "proportion"]
    assert list(table[["token", "flips", "count"]].itertuples(index=False, name=None)) == expected
    assert table["proportion"].tolist() == [f / c for _, f, c in expected]
    assert table["text"].tolist() == [f"w{t}" for t, _, _ in expected]


def test_the_posts_word_war_has_130_flips_of_232():
    war = 5
    pred = np.array([[war] * 232])
    ablated = pred.copy()
    ablated[0, :100] = 1
    pred[0, 100:130] = 2
    table = count_flips(pred, ablated).set_index("token")
    assert table.loc[war, ["flips", "count"]].tolist() == [130, 232]
    assert round(table.loc[war, "proportion"], 6) == 0.560345


def test_samples_and_tokens_equal_brute_force_sample_by_sample():
    pred, ablated = predictions(1)
    notable = [2, 5]
    rows = sample_flips(pred, ablated, notable)
    tokens = np.array([0, 2, 5])
    flips, count = token_flips(pred, ablated, tokens)
    for sample in range(len(pred)):
        pairs = [(p, a) for p, a in zip(pred[sample], ablated[sample], strict=True) if p >= 0]
        touched = [pair for pair in pairs if set(pair) & set(notable)]
        expected = [len(pairs), sum(p != a for p, a in pairs), len(touched), sum(p != a for p, a in touched)]
        assert rows[sample].tolist() == expected
        f, c = flips_by_hand(pred[sample], ablated[sample])
        assert flips[sample].tolist() == [f.get(t, 0) for t in tokens.tolist()]
        assert count[sample].tolist() == [c.get(t, 0) for t in tokens.tolist()]


def test_flip_proportion_of_any_token_exceeds_the_flip_rate():
    # why proportions are only ever compared with proportions: a flipped position counts for two tokens
    rng = np.random.default_rng(0)
    pred = rng.integers(0, 50, size=(400, 50))
    ablated = np.where(rng.random(pred.shape) < 0.1, (pred + rng.integers(1, 50, size=pred.shape)) % 50, pred)
    table = count_flips(pred, ablated)
    assert table["proportion"].mean() == pytest.approx(2 * 0.1 / 1.1, abs=0.01)


def test_no_predictions_give_an_empty_table():
    table = count_flips(np.full((2, 3), -1), np.full((2, 3), -1))
    assert len(table) == 0
    assert list(table.columns) == ["token", "text", "flips", "count", "proportion"]


@pytest.mark.parametrize("other", [np.zeros((1, 3), int), np.array([[0, -1]])])
def test_predictions_of_different_tokens_are_refused(other):
    with pytest.raises(ValueError, match=r"`pred` \(1, 2\) and `ablated` .* must have one shape and padding"):
        count_flips(np.zeros((1, 2), int), other)
