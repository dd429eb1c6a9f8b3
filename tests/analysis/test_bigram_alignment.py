"""The alignment of shifts with bigrams equals correlations of whole matrices, and finds planted pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_gradtrace.analysis import bigram_alignment
from lightning_gradtrace.analysis.bigram_alignment import align
from tests.analysis.traces import SHAPES, write_trace

V, WIDTH = 12, 12
TEXT = {number: np.random.default_rng(number).integers(0, V, 7).tolist() for number in range(6)}


def make_trace(step_of_pairs: float):
    """Two steps of three samples; the second one adds the bigrams of its texts to the scores, and noise."""
    rng = np.random.default_rng(1)
    embedding = np.eye(V, WIDTH).astype(np.float32)
    first = rng.normal(size=(V, WIDTH)).astype(np.float32)
    second = first + 0.1 * rng.normal(size=first.shape).astype(np.float32)
    third = second + step_of_pairs * counts([3, 4, 5]).astype(np.float32)
    weights = {n: {"E": embedding, "U": head} for n, head in enumerate((first, second, third))}
    index = np.tile(np.arange(2), (6, 1))
    return write_trace(SHAPES, np.arange(6).reshape(2, 3), index, text=TEXT, weights=weights)


def counts(samples: list[int]) -> np.ndarray:
    """Bigrams (next, first) of some texts."""
    table = np.zeros((V, V))
    for sample in samples:
        for first, following in zip(TEXT[sample][:-1], TEXT[sample][1:], strict=True):
            table[following, first] += 1
    return table


def test_alignment_equals_the_correlation_of_whole_matrices() -> None:
    trace = make_trace(1.0)
    found = bigram_alignment(trace, "E", "U")
    assert found["first_step"].tolist() == [0, 1] and found["bigrams"].tolist() == [18, 18]
    for step, samples in ((0, [0, 1, 2]), (1, [3, 4, 5])):
        table = counts(samples)
        rows, columns = np.flatnonzero(table.sum(1)), np.flatnonzero(table.sum(0))
        table = table[np.ix_(rows, columns)]
        before, after, embedding = (
            trace.weights(*one).astype(float) for one in (("U", step), ("U", step + 1), ("E", step))
        )
        # As the analysis subtracts: ranks depend on the last digit where shifts are equal but for rounding.
        shift = (after @ embedding.T - before @ embedding.T)[np.ix_(rows, columns)]
        inner = shift - shift.mean(0) - shift.mean(1, keepdims=True) + shift.mean()
        beyond = table - np.outer(table.sum(1), table.sum(0)) / table.sum()
        row = found.iloc[step]
        pearson = (inner * beyond).sum() / np.sqrt((inner**2).sum() * (beyond**2).sum())
        assert row["pearson"] == pytest.approx(pearson, rel=1e-5)
        whole = np.rint(beyond * table.sum())  # ties are ties
        assert row["spearman"] == pytest.approx(stats.spearmanr(inner.ravel(), whole.ravel())[0], rel=1e-5)
        assert row["unigram_share"] == pytest.approx(1 - (inner**2).sum() / (shift**2).sum(), rel=1e-5)
        assert row["pairs"] == inner.size


def test_the_step_that_adds_its_bigrams_is_found_and_the_other_is_not() -> None:
    first, second = bigram_alignment(make_trace(1.0), "E", "U").to_dict("records")
    assert second["pearson"] > 0.8 and second["p_value"] == 1 / 200
    assert first["p_value"] > 0.01
    assert abs(second["null_mean"]) < 0.2 < second["pearson"] - 3 * second["null_std"]


def test_other_texts_and_spans_can_be_asked_for() -> None:
    trace = make_trace(1.0)
    texts = np.array([TEXT[n] for n in (3, 4, 5)])
    whole = bigram_alignment(trace, "E", "U", texts=texts, summed=True)
    assert whole[["first_step", "last_step"]].to_numpy().tolist() == [[0, 2]]
    assert whole["pearson"].iloc[0] > 0.7
    assert bigram_alignment(trace, "E", "U", texts=texts, max_span=1)["first_step"].tolist() == [0, 1]
    assert bigram_alignment(trace, "E", "U", max_tokens=2)["pairs"].max() <= 4


def test_a_shift_of_frequencies_alone_is_no_bigram() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 8, 100), rng.integers(0, 8, 100)
    unigrams = np.outer(np.bincount(pairs[0], minlength=8), np.ones(8))
    found = align(unigrams + 1e-9 * rng.normal(size=(8, 8)), pairs, rng=rng)
    assert found.unigram_share == pytest.approx(1.0)
    assert abs(found.pearson) < 0.4
    empty = np.zeros(0, dtype=np.int64)
    assert np.isnan(align(unigrams, (empty, empty), rng=rng).pearson)


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="`max_tokens` is 1 and `n_permutations` 199, expected 2 and 1 or more"):
        bigram_alignment(make_trace(0.0), "E", "U", max_tokens=1)
