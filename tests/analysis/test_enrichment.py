"""Head shifts against brute force, and enrichment where the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import (
    attention_heads,
    head_shifts,
    loss_token_enrichment,
    pattern_enrichment,
    token_enrichment,
    weight_change,
)
from tests.analysis.traces import write_trace

HEADS = {"a.W_Q": (2, 3, 2), "a.W_O": (2, 2, 3), "mlp.weight": (4, 3)}


def moved(amounts: np.ndarray) -> pd.DataFrame:
    """One thing, one row per sample."""
    return pd.DataFrame({"sample_id": np.arange(len(amounts)), "thing": "a", "size": amounts})


def marks(n: int, share: float) -> pd.Series:
    return pd.Series(np.arange(n) < share * n)


def test_a_pattern_that_moves_three_times_as_much_is_enriched_by_what_that_comes_to() -> None:
    pattern = marks(400, 0.25)
    found = pattern_enrichment(moved(np.where(pattern, 3.0, 1.0)), pattern, by=["thing"]).iloc[0]
    assert found["expected"] == 0.25
    assert found["share"] == pytest.approx(0.25 * 3 / (0.25 * 3 + 0.75))
    assert found["enrichment"] == pytest.approx(2.0)
    assert found["low"] < 2 < found["high"]
    assert found["null_high"] < found["low"]
    assert found["p_value"] == pytest.approx(1 / 1000)


def test_a_pattern_without_effect_is_at_chance_in_most_draws() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(40):
        found = pattern_enrichment(
            moved(rng.exponential(size=300)), marks(300, 0.3), by=["thing"], n_resamples=199, seed=seed
        ).iloc[0]
        assert found["low"] <= found["enrichment"] <= found["high"]
        inside.append(found["null_low"] <= found["enrichment"] <= found["null_high"])
    assert 33 <= sum(inside) <= 40  # 95 % of 40, give or take


def test_samples_that_moved_nothing_count_as_seen() -> None:
    pattern = marks(100, 0.5)
    some = moved(np.ones(100))[lambda t: t["sample_id"] < 50]
    occurrences = pd.DataFrame({"sample_id": np.arange(100)})
    found = pattern_enrichment(some, pattern, by=["thing"], occurrences=occurrences).iloc[0]
    assert (found["n_samples"], found["share"], found["enrichment"]) == (100, 1.0, 2.0)


def test_a_sample_seen_twice_is_expected_twice() -> None:
    rows = pd.DataFrame({"sample_id": [0, 0, 1], "thing": "a", "size": [1.0, 1.0, 1.0]})
    found = pattern_enrichment(rows, {0: True, 1: False}, by=["thing"]).iloc[0]
    assert found["expected"] == pytest.approx(2 / 3)
    assert found["enrichment"] == pytest.approx(1.0)


def test_missing_columns_and_unknown_samples_are_said() -> None:
    with pytest.raises(ValueError, match=r"`moved` lacks the columns \['head', 'module', 'part'\]"):
        pattern_enrichment(moved(np.ones(3)), marks(3, 1))
    with pytest.raises(ValueError, match=r"`pattern` says nothing of samples \[2\]"):
        pattern_enrichment(moved(np.ones(3)), marks(2, 1), by=["thing"])


def test_nothing_moved_is_no_number() -> None:
    found = pattern_enrichment(moved(np.zeros(10)), marks(10, 0.5), by=["thing"]).iloc[0]
    assert found["expected"] == 0.5
    assert found[["share", "enrichment", "low", "high", "null_low", "null_high", "p_value"]].isna().all()


def test_tokens_are_counted_over_texts_weighted_by_what_they_moved() -> None:
    text = {3: [1, 1, 2, 5], 4: [2, 2], 7: [1, 5, 5, 5, 5, 2], 9: [5]}
    ids = np.array([[3, 4], [7, 3]])
    trace = write_trace(HEADS, ids, np.array([[0]] * 4), text=text, vocab=list("abcdef"))
    amounts = {3: 2.0, 4: 1.0, 7: 5.0}
    rows = pd.DataFrame({"sample_id": list(amounts), "thing": "a", "size": list(amounts.values())})
    seen = trace.occurrences
    found = token_enrichment(rows, trace, by=["thing"], occurrences=seen, min_count=1).set_index("token")
    assert found["word"].to_dict() == {1: "b", 2: "c", 5: "f"}
    assert found["enrichment"].is_monotonic_decreasing
    for token in (1, 2, 5):
        part = {sample: tokens.count(token) / len(tokens) for sample, tokens in text.items()}
        share = sum(amounts[s] * part[s] for s in amounts) / sum(amounts.values())
        expected = sum(part[s] for s in ids.flat) / 4  # sample 3 was seen twice, sample 9 never
        assert found.loc[token, ["share", "expected"]].tolist() == pytest.approx([share, expected])
        assert found.loc[token, "enrichment"] == pytest.approx(share / expected)
        assert found.loc[token, "n_pattern"] == sum(part[s] > 0 for s in amounts)
    assert list(token_enrichment(rows, trace, [2, 8], by=["thing"], min_count=4)["token"]) == [2]
    with pytest.raises(ValueError, match=r"the trace keeps no text of samples \[5\]"):
        token_enrichment(rows.assign(sample_id=5), trace, by=["thing"])


def test_loss_tokens_are_counted_as_they_are_and_resampled_by_sample() -> None:
    rng = np.random.default_rng(3)
    kept = pd.DataFrame({"occurrence": np.repeat(np.arange(200), 4), "position": np.tile(np.arange(4), 200)})
    kept["sample_id"], kept["token"] = kept["occurrence"] // 2, rng.integers(0, 5, len(kept))
    closes = kept["token"] == 1
    rows = kept.assign(thing="a", size=np.where(closes, 3.0, 1.0))[kept.index % 3 > 0]
    found = loss_token_enrichment(rows, kept, closes, by=["thing"]).iloc[0]
    share = rows["size"][rows["token"] == 1].sum() / rows["size"].sum()
    assert found["share"] == pytest.approx(share)
    assert found["enrichment"] == pytest.approx(share / closes.mean())
    assert (found["n_samples"], found["n_pattern"]) == (800, closes.sum())
    assert found["low"] < found["enrichment"] < found["high"]
    assert found["p_value"] == pytest.approx(1 / 1000)
    one_sample = loss_token_enrichment(rows, kept.assign(sample_id=7), closes, by=["thing"]).iloc[0]
    assert np.isnan(one_sample["low"])  # nothing to resample
    with pytest.raises(ValueError, match="`pattern` has 3 values, expected one for each of 800 loss tokens"):
        loss_token_enrichment(rows, kept, closes.head(3), by=["thing"])
    with pytest.raises(ValueError, match="`moved` holds loss tokens that are not in `loss_tokens`"):
        loss_token_enrichment(rows, kept.head(8), closes.head(8), by=["thing"])


def test_head_shifts_equal_a_loop_over_all_entries() -> None:
    rng = np.random.default_rng(1)
    n_entries, n_steps, batch, k = 36, 4, 3, 9
    index = np.stack([np.sort(rng.choice(n_entries, k, replace=False)) for _ in range(n_steps * batch)])
    shift = rng.normal(size=index.shape).astype(np.float32)
    shift[2, 3], shift[5, 0] = np.nan, 0.0
    ids = rng.permutation(50)[: n_steps * batch].reshape(n_steps, batch)
    trace = write_trace(HEADS, ids, index, shift=shift)
    expected = {}
    for row, (entries, moves) in enumerate(zip(index, shift, strict=True)):
        for entry, move in zip(entries.tolist(), moves.tolist(), strict=True):
            if entry >= 24 or move == 0 or not np.isfinite(move):
                continue
            part, inside = ("query", entry) if entry < 12 else ("output", entry - 12)
            key = (row, ids.flat[row], inside // 6, part)
            old = expected.get(key, (0, 0.0, 0.0))
            expected[key] = (old[0] + 1, old[1] + abs(move), old[2] + move**2)
    found = head_shifts(trace, attention_heads(trace))
    assert len(found) == len(expected)
    for row in found.itertuples():
        n, size, square = expected[row.occurrence, row.sample_id, row.head, row.part]
        assert row.n_entries == n
        assert (row.size, row.square) == pytest.approx((size, square))
        assert row.step == row.occurrence // batch
    some = head_shifts(trace, steps=slice(1, 2))
    pd.testing.assert_frame_equal(some, found[found["step"].between(1, 2)].reset_index(drop=True))


def test_along_a_direction_is_the_inner_product_with_it() -> None:
    index = np.array([[0, 7, 13, 30], [1, 6, 12, 23]])
    shift = np.array([[1.0, -2.0, 3.0, 4.0], [0.5, 1.5, -2.5, 2.0]])
    trace = write_trace(HEADS, np.array([[4, 9]]), index, shift=shift)
    query = np.arange(12.0).reshape(2, 3, 2)
    found = head_shifts(trace, along={"a.W_Q": query})
    values = {(r.sample_id, r.head, r.part): r.along for r in found.itertuples()}
    assert values == {
        (4, 0, "query"): 0.0,  # 1.0 x direction 0
        (4, 1, "query"): -14.0,
        (4, 0, "output"): 0.0,
        (9, 0, "query"): 0.5,
        (9, 1, "query"): 9.0,
        (9, 0, "output"): 0.0,
        (9, 1, "output"): 0.0,
    }
    with pytest.raises(ValueError, match=r"`along` has shape \(12,\) for `a.W_Q`, which has shape \(2, 3, 2\)"):
        head_shifts(trace, along={"a.W_Q": query.reshape(-1)})


def test_a_trace_without_heads_is_said() -> None:
    trace = write_trace({"mlp.weight": (4, 3)}, np.zeros((1, 1), int), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="no tracked parameter was recognised as part of an attention head"):
        head_shifts(trace)


def test_records_that_a_trace_does_not_hold_are_said() -> None:
    trace = write_trace(HEADS, np.zeros((1, 1), int), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="`record` is 'dense', and this trace holds topk"):
        head_shifts(trace, record="dense")
    with pytest.raises(ValueError, match="`record` is 'all', expected one of 'topk', 'dense'"):
        head_shifts(trace, record="all")


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(None, 0, 6), (slice(3, 4), 2, 6), (slice(2, 5), 2, 6), (slice(0, 1), 0, 2)]
)
def test_the_change_is_that_between_the_snapshots_around_the_steps(steps, first: int, last: int) -> None:
    weights = {step: {"a": np.full((2, 2), step**2, np.float32)} for step in (0, 2, 6)}
    trace = write_trace({"a": (2, 2)}, np.zeros((6, 1), int), np.zeros((6, 1), int), weights=weights)
    np.testing.assert_array_equal(weight_change(trace, steps)["a"], np.full((2, 2), last**2 - first**2))


def test_a_change_needs_two_snapshots() -> None:
    trace = write_trace({"a": (2, 2)}, np.zeros((2, 1), int), np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="keeps no two snapshots of the weights around them"):
        weight_change(trace)
