"""Descriptions of weight snapshots equal scipy's and known matrices; bigram shifts equal the whole V x V."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_gradtrace.analysis import (
    bigram_shifts,
    bigrams,
    largest_pairs,
    neuron_weights,
    weight_spectra,
    weight_statistics,
)
from tests.analysis.traces import random_trace, write_trace

V, D = 23, 4


def snapshots(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, 7), "c": (3, 2, 2), "b": (4,), "E": (V, D), "U": (V, D)}
    return {s: {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()} for s in (0, 4, 8)}


def trace_with(weights):
    return write_trace(
        {"w": (5, 7)}, np.zeros((8, 1), int), np.zeros((8, 1), int), weights=weights, vocab=[f"w{i}" for i in range(V)]
    )


def test_statistics_equal_scipy():
    weights = snapshots()
    table = weight_statistics(trace_with(weights), ["w", "c", "b"])
    assert table["step"].tolist() == [0, 4, 8] * 3
    last = None
    for row in table.itertuples():
        w = weights[row.step][row.param].astype(float)
        flat = w.reshape(-1)
        assert row.mean == pytest.approx(flat.mean())
        assert row.std == pytest.approx(flat.std())
        assert row.skewness == pytest.approx(stats.skew(flat))
        assert row.kurtosis == pytest.approx(stats.kurtosis(flat))
        assert (row.l1, row.norm, row.max) == pytest.approx((abs(flat).sum(), np.linalg.norm(flat), abs(flat).max()))
        assert row.distance == pytest.approx(np.linalg.norm(flat - weights[0][row.param].reshape(-1)))
        assert row.change == pytest.approx(np.linalg.norm(flat - last) if row.step else np.nan, nan_ok=True)
        last = flat
        if w.ndim == 1:
            assert np.isnan(row.effective_rank)
            continue
        values = np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)
        p = values / values.sum()
        assert (row.spectral_norm, row.nuclear_norm) == pytest.approx((values[0], values.sum()))
        assert row.stable_rank == pytest.approx(row.norm**2 / values[0] ** 2)
        assert row.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_ranks_of_known_matrices():
    known = {"w": np.ones((5, 7)), "E": np.eye(V, D), "c": np.zeros((3, 2, 2))}
    table = weight_statistics(trace_with({0: {n: w.astype(np.float32) for n, w in known.items()}}), list(known))
    table = table.set_index("param")
    assert table.loc["w", ["effective_rank", "stable_rank"]].tolist() == pytest.approx([1, 1])
    assert table.loc["E", ["effective_rank", "stable_rank"]].tolist() == pytest.approx([D, D])
    assert np.isnan(table.loc["w", "kurtosis"])
    assert table.loc["c", "zeros"] == 1
    assert np.isnan(table.loc["c", "effective_rank"])


def test_spectra_and_neurons_follow_the_snapshots():
    weights = snapshots()
    trace = trace_with(weights)
    spectra = weight_spectra(trace, ["w", "b"], n=2, steps=[4])
    np.testing.assert_allclose(
        spectra["singular_value"], np.linalg.svd(weights[4]["w"], compute_uv=False)[:2], rtol=1e-5
    )
    assert spectra["rank"].tolist() == [1, 2]
    for axis in ("in", "out"):
        table = neuron_weights(trace, axis=axis)
        lines = {s: w["w"].T if axis == "in" else w["w"] for s, w in weights.items()}
        assert len(table) == 3 * len(lines[0])
        for row in table.itertuples():
            one, first = lines[row.step][row.neuron].astype(float), lines[0][row.neuron].astype(float)
            assert row.norm == pytest.approx(np.linalg.norm(one))
            assert row.cosine == pytest.approx(one @ first / np.linalg.norm(one) / np.linalg.norm(first))


def by_hand(before, after, n):
    shift = after["U"].astype(float) @ after["E"].T.astype(float) - before["U"].astype(float) @ before["E"].T.astype(
        float
    )
    pairs = [(t, v, shift[v, t]) for t in range(V) for v in range(V)]
    return sorted(pairs, key=lambda p: -abs(p[2]))[:n]


@pytest.mark.parametrize("block", [3, 2048])
def test_bigram_shifts_equal_the_whole_product(block, monkeypatch):
    monkeypatch.setattr(bigrams, "_BLOCK", block)
    weights = snapshots()
    trace = trace_with(weights)
    spans = bigram_shifts(trace, "E", "U", n=7)
    assert spans[["first_step", "last_step"]].drop_duplicates().to_numpy().tolist() == [[0, 4], [4, 8]]
    summed = bigram_shifts(trace, "E", "U", n=7, summed=True)
    for first, last, table in ((0, 4, spans[:7]), (4, 8, spans[7:]), (0, 8, summed)):
        expected = by_hand(weights[first], weights[last], 7)
        assert list(zip(table["token"], table["next_token"], strict=True)) == [p[:2] for p in expected]
        np.testing.assert_allclose(table["shift"], [p[2] for p in expected], rtol=1e-4)
    assert summed["text"].tolist() == [f"w{t}" for t in summed["token"]]


def test_blocks_below_the_floor_are_skipped_and_nothing_is_lost(monkeypatch):
    """Two rows moved far, all others a little: few blocks are formed, and the result is that of all of them."""
    monkeypatch.setattr(bigrams, "_BLOCK", 4)
    before = snapshots()[0]
    after = {n: w + 1e-4 * np.sin(np.arange(w.size)).reshape(w.shape).astype(w.dtype) for n, w in before.items()}
    after["E"][5] += 3
    after["U"][9] -= 3
    formed = []
    add = bigrams._Largest.add
    monkeypatch.setattr(bigrams._Largest, "add", lambda self, *a: (formed.append(1), add(self, *a)))
    table = largest_pairs(before["U"], before["E"], after["U"], after["E"], 8)
    assert list(zip(table["token"], table["next_token"], strict=True)) == [p[:2] for p in by_hand(before, after, 8)]
    assert len(formed) < 36


def test_tied_weights_and_ranges():
    weights = snapshots()
    tied = {s: {**w, "U": w["E"]} for s, w in weights.items()}
    table = bigram_shifts(trace_with(weights), "E", n=5, steps=slice(4, 8))
    expected = by_hand(tied[4], tied[8], 5)
    np.testing.assert_allclose(table["shift"].abs(), [abs(p[2]) for p in expected], rtol=1e-4)


def test_what_does_not_fit_is_refused():
    trace = trace_with(snapshots())
    with pytest.raises(ValueError, match="reads weight snapshots, and the trace holds none; record with"):
        weight_statistics(random_trace().trace)
    with pytest.raises(ValueError, match=r"no snapshot before the steps \[5\]; there are .* \[0, 4, 8\]"):
        weight_statistics(trace, steps=[0, 5])
    with pytest.raises(KeyError, match="no weights of `x`"):
        weight_statistics(trace, "x")
    with pytest.raises(ValueError, match=r"`steps` holds 1 of the snapshots before the steps \[0, 4, 8\]"):
        bigram_shifts(trace, "E", "U", steps=slice(5, 9))
    with pytest.raises(ValueError, match=r"expected \(vocabulary, width\) each"):
        bigram_shifts(trace, "E", "w")
    with pytest.raises(ValueError, match="`n` is 0, expected 1 or more pairs"):
        bigram_shifts(trace, "E", "U", n=0)
    with pytest.raises(ValueError, match="hold values that are not finite"):
        largest_pairs(np.eye(2), np.eye(2), np.eye(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="`n` is 0, expected 1 or more, or None"):
        weight_spectra(trace, n=0)
